// screen.h's two looks for several rows, where one instruction multiplies four inputs' bytes and adds them up in 32 bits. The bounds
// are the same; sums have room here.
#pragma once
#include "kernels.h"
#include "screen.h"
#include "simd.h"
#include "tiles.h"

#if defined(FANIN_AVX512VNNI)
namespace fanin {
namespace FANIN_LEVEL {
namespace {

// Several rows' inputs to a group. All but the words are of [ldx].
struct QuadInputs {
  uint32_t* words;    // [2 · ⌈K/8⌉, ldx]: u of four inputs; zero beyond the last
  int32_t* limit[2];  // what Σ c·u must exceed, and what 4 · Σ c·u + Σ f·u
  const float *inverse, *threshold;
  int ldx;
};

int quads(const Block& block) { return 2 * eights(block); }

void prepare_quads(const Block& block, const uint8_t* inputs, int64_t n, int rows, const QuadInputs& out) {
  static constexpr uint8_t zero[16] = {};
  const int K = block.fan_in, ldx = out.ldx;
  const uint16_t* index = block.indices + n * K;
  const vu ones = broadcast(0x01010101u);
  const auto scale = [&](int i) { return broadcast(block.screen.scale[i][n]); };
  for (int b = 0; b < rows; b += 16) {
    vi total{}, squares{};
    const auto quad = [&](int q, const uint8_t* first, const uint8_t* second, const uint8_t* third, const uint8_t* fourth) {
      const vu word = interleaved(first, second, third, fourth), size = absolute_bytes(word);
      std::memcpy(out.words + (int64_t)q * ldx + b, &word, sizeof word);
      total = add_quad_products(total, ones, word), squares = add_quad_products(squares, size, size);
    };
    const auto input = [&](int k) { return inputs + (int64_t)index[k] * ldx + b; };
    const auto last = [&](int k) { return k < K ? input(k) : zero; };
    int k = 0;
    for (; k + 4 <= K; k += 4) quad(k / 4, input(k), input(k + 1), input(k + 2), input(k + 3));
    for (; k < 4 * quads(block); k += 4) quad(k / 4, last(k), last(k + 1), last(k + 2), last(k + 3));
    const vf norm = norm_of(squares), sum = __builtin_convertvector(total, vf);
    for (int look = 0; look < 2; ++look) {
      const vf margin = scale(2 + 2 * look), rest = scale(3 + 2 * look);
      const vf least = needed(scale(0), scale(1), margin, rest, load(out.threshold + b), load(out.inverse + b), norm);
      const vi limit = __builtin_convertvector(look ? least * 4 + sum * 31.5f : least + sum * 7.5f, vi);
      std::memcpy(out.limit[look] + b, &limit, sizeof limit);
    }
  }
}

// Four inputs' numbers of 16 labels, one a byte, out of 4 · 4 bits each; out of 4 · 2 bits.
FANIN_INLINE vu coarse_quads(const uint8_t* p) { const vu w = widened(p); return (w | w << 12) & 0x0F0F0F0Fu; }
FANIN_INLINE vu fine_quads(const uint8_t* p, int odd) { const vu w = widened(p) >> (4 * odd); return (w | w << 14) & 0x03030303u; }

// Whether the second look finds a sum above its limit for a row, in NV vectors of labels from g on; `sum` is the first look's.
template <int NV>
[[gnu::noinline]] bool passes_quads_again(const Block& block, int64_t n, int g, const QuadInputs& x, int row, const vi* sum) {
  vi quarters[NV];
  for (int v = 0; v < NV; ++v) quarters[v] = sum[v] * 4 - x.limit[1][row];
  for (int q = 0; q < quads(block); ++q) {
    const uint8_t* fine = block.screen.fine + n * fine_bytes(block) + ((int64_t)(q / 2) * block.group_size + g) * 2;
    const vu inputs = broadcast(x.words[(int64_t)q * x.ldx + row]);
    for (int v = 0; v < NV; ++v) quarters[v] = add_quad_products(quarters[v], fine_quads(fine + 2 * v * W, q % 2), inputs);
  }
  vi most = quarters[0];
  for (int v = 1; v < NV; ++v) most = maximum(most, quarters[v]);
  return any_positive(most);
}

// Which of BT rows may have one of their k best among NV vectors of labels from g on, a bit for each. c [2 · ⌈K/8⌉, G]
template <int NV, int BT>
FANIN_INLINE uint64_t screen_quads(const Block& block, int64_t n, const uint32_t* c, int g, const QuadInputs& x, int row) {
  vi sum[BT][NV];
  for (int b = 0; b < BT; ++b)
    for (int v = 0; v < NV; ++v) sum[b][v] = vi{};
  for (int q = 0; q < quads(block); ++q) {
    vu w[NV];
    for (int v = 0; v < NV; ++v) w[v] = load(c + (int64_t)q * block.group_size + g + v * W);
    for (int b = 0; b < BT; ++b) {
      const vu inputs = broadcast(x.words[(int64_t)q * x.ldx + row + b]);
      for (int v = 0; v < NV; ++v) sum[b][v] = add_quad_products(sum[b][v], w[v], inputs);
    }
  }
  vi most[BT], one = broadcast(INT32_MIN);  // the limit comes last: a row's way there is long, and sums need not wait for it
  for (int b = 0; b < BT; ++b) {
    most[b] = sum[b][0];
    for (int v = 1; v < NV; ++v) most[b] = maximum(most[b], sum[b][v]);
    one = maximum(one, most[b] -= x.limit[0][row + b]);
  }
  uint64_t found = 0;
  if (!any_positive(one)) return found;  // as a rule
  for (int b = 0; b < BT; ++b) {
    if (!any_positive(most[b])) continue;
    vi first[NV];  // a copy, so that the sums can stay in registers
    for (int v = 0; v < NV; ++v) first[v] = sum[b][v];
    found |= (uint64_t)passes_quads_again<NV>(block, n, g, x, row + b, first) << (row + b);
  }
  return found;
}

// For several rows: how many may have one of their k best in group n; found [rows] tells which. `scratch` holds
// 2 · ⌈K/8⌉ · (ldx + G) + 2 · ldx floats.
int candidate_rows(const Block& block, const Batch& x, const Rows8& rows8, int64_t n, const Best& best, float* scratch, uint8_t* found) {
  const int ldx = x.ldx, G = block.group_size;
  uint32_t *words = (uint32_t*)scratch, *c = words + (int64_t)quads(block) * ldx;
  int32_t* limit = (int32_t*)(c + (int64_t)quads(block) * G);
  const QuadInputs inputs{words, {limit, limit + ldx}, rows8.inverse, best.threshold, ldx};
  prefetch_group(block, n);
  const uint8_t* coarse = block.screen.coarse + n * coarse_bytes(block);
  for (int64_t i = 0; i < (int64_t)quads(block) * G; i += W) {
    const vu four = coarse_quads(coarse + 2 * i);
    std::memcpy(c + i, &four, sizeof four);
  }
  prepare_quads(block, (const uint8_t*)rows8.x, n, x.rows, inputs);
  uint64_t left = 0;
  for_tiles(x.rows, [&](int row, auto height) __attribute__((always_inline)) {
    for (int g = 0; g < G; g += 2 * W) left |= screen_quads<2, height>(block, n, c, g, inputs, row);
  });
  return spread(left, x.rows, found);
}

}  // namespace
}  // namespace FANIN_LEVEL
}  // namespace fanin
#endif
