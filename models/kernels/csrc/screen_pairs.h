// screen.h's two looks for several rows, where one instruction multiplies pairs of inputs' bytes and adds them up in 16 bits.
#pragma once
#include "kernels.h"
#include "screen.h"
#include "simd.h"
#include "tiles.h"

#if defined(FANIN_SCREENS) && !defined(FANIN_AVX512VNNI)
namespace fanin {
namespace FANIN_LEVEL {
namespace {

// The low 16 bits, twice over.
FANIN_INLINE vu twice(vi a) { return (vu)((a & 0xFFFF) | a << 16); }

// Several rows' inputs to a group. All but the words are of [ldx].
struct RowInputs {
  uint32_t* words;  // [4 · ⌈K/8⌉, ldx]
  uint32_t* start;  // −7.5 · Σ u in 16 bits, twice over
  uint32_t* limit;  // what the first look's sums must exceed, twice over
  int32_t* total;
  float* norm;
  const float *inverse, *threshold;
  int ldx;

  Inputs of(int row) const { return {words + row, ldx, total[row], norm[row], inverse[row], threshold[row]}; }
};

// Which of BT rows may have one of their k best among NV vectors of labels from g on, a bit for each.
template <int NV, int BT>
FANIN_INLINE uint64_t screen_tile(const Block& block, int64_t n, const int16_t* c, int g, const RowInputs& x, int row) {
  const int pairs = 4 * eights(block), G = block.group_size;
  vs sum[BT][NV];
  for (int b = 0; b < BT; ++b)
    for (int v = 0; v < NV; ++v) sum[b][v] = (vs)broadcast(x.start[row + b]);
  for (int j = 0; j < pairs; ++j) {
    vs w[NV];
    for (int v = 0; v < NV; ++v) w[v] = load(c + (int64_t)j * G + g + v * LANES);
    for (int b = 0; b < BT; ++b) {
      const vu both = broadcast(x.words[(int64_t)j * x.ldx + row + b]);
      for (int v = 0; v < NV; ++v) sum[b][v] += pair_products(w[v], both);
    }
  }
  vs above[BT] = {}, one{};
  for (int b = 0; b < BT; ++b) {
    for (int v = 0; v < NV; ++v) above[b] |= sum[b][v] > (vs)broadcast(x.limit[row + b]);
    one |= above[b];
  }
  uint64_t found = 0;
  if (!any(one)) return found;  // as a rule
  for (int b = 0; b < BT; ++b) {
    if (!any(above[b])) continue;
    vs first[NV];  // a copy, so that the sums can stay in registers
    for (int v = 0; v < NV; ++v) first[v] = sum[b][v];
    found |= (uint64_t)passes_again<NV>(block, n, g, x.of(row + b), first) << (row + b);
  }
  return found;
}

template <int NV>
FANIN_INLINE uint64_t screen_tiles(const Block& block, int64_t n, const int16_t* c, const RowInputs& x, int rows) {
  uint64_t found = 0;
  for_tiles(rows, [&](int row, auto height) __attribute__((always_inline)) {
    for (int g = 0; g < block.group_size; g += NV * LANES) found |= screen_tile<NV, height>(block, n, c, g, x, row);
  });
  return found;
}

// The first look's numbers of group n, one a byte: [4 · ⌈K/8⌉, G, 2].
FANIN_INLINE void unpack(const Block& block, int64_t n, int16_t* out) {
  const int G = block.group_size, end = 2 * eights(block) * G;
  const int16_t* coarse = (const int16_t*)(block.screen.coarse + n * coarse_bytes(block));
  for (int i = 0; i < end; i += G, out += 2 * G)
    for (int g = 0; g < G; g += LANES) {
      const vs c = load(coarse + i + g), low = c & 0x0F0F, high = c >> 4 & 0x0F0F;
      std::memcpy(out + g, &low, sizeof low), std::memcpy(out + G + g, &high, sizeof high);
    }
}

// For rows row … row + NV · W.
template <int NV>
FANIN_INLINE void prepare_some(const Block& block, const int8_t* inputs, int64_t n, int row, const RowInputs& out) {
  static constexpr int8_t zero[NV * W] = {};
  const int K = block.fan_in;
  const uint16_t* index = block.indices + n * K;
  vs sums[NV] = {};
  vi squares[NV] = {};
  const auto pair = [&](int k, const int8_t* first, const int8_t* second) {
    uint32_t* words = out.words + (int64_t)(k / 2) * out.ldx + row;
    for (int v = 0; v < NV; ++v) store_pairs(words + v * W, first + v * W, second + v * W, sums[v], squares[v]);
  };
  const auto input = [&](int k) { return inputs + (int64_t)index[k] * out.ldx + row; };
  int k = 0;
  for (; k + 2 <= K; k += 2) pair(k, input(k), input(k + 1));
  if (k < K) pair(k, input(k), zero), k += 2;
  for (; k < 8 * eights(block); k += 2) pair(k, zero, zero);
  const auto scale = [&](int i) { return broadcast(block.screen.scale[i][n]); };
  for (int v = 0; v < NV; ++v) {
    const int b = row + v * W;
    const vi total = sum_pairs(sums[v]);
    const vf norm = norm_of(squares[v]);
    const vf least = needed(scale(0), scale(1), scale(2), scale(3), load(out.threshold + b), load(out.inverse + b), norm);
    const vu start = twice(-15 * total >> 1), limit = twice(__builtin_convertvector(least, vi));
    std::memcpy(out.start + b, &start, sizeof start), std::memcpy(out.limit + b, &limit, sizeof limit);
    std::memcpy(out.total + b, &total, sizeof total), store(out.norm + b, norm);
  }
}

void prepare_rows(const Block& block, const int8_t* inputs, int64_t n, int rows, const RowInputs& out) {
  for (int b = 0; b < rows; b += 16)
    if (rows - b > W)
      prepare_some<16 / W>(block, inputs, n, b, out);
    else
      prepare_some<1>(block, inputs, n, b, out);
}

// For several rows: how many may have one of their k best in group n; found [rows] tells which. `scratch` holds
// (4 · ⌈K/8⌉ + 4) · ldx + 2 · ⌈K/8⌉ · G floats.
int candidate_rows(const Block& block, const Batch& x, const Rows8& rows8, int64_t n, const Best& best, float* scratch, uint8_t* found) {
  const int ldx = x.ldx;
  uint32_t *words = (uint32_t*)scratch, *start = words + (int64_t)4 * eights(block) * ldx;
  int32_t* total = (int32_t*)start + 2 * ldx;
  const RowInputs inputs{words, start, start + ldx, total, (float*)total + ldx, rows8.inverse, best.threshold, ldx};
  int16_t* c = (int16_t*)(start + 4 * ldx);
  prefetch_group(block, n);
  unpack(block, n, c);
  prepare_rows(block, rows8.x, n, x.rows, inputs);
  const bool odd = block.group_size % (2 * LANES);
  return spread(odd ? screen_tiles<1>(block, n, c, inputs, x.rows) : screen_tiles<2>(block, n, c, inputs, x.rows), x.rows, found);
}

}  // namespace
}  // namespace FANIN_LEVEL
}  // namespace fanin
#endif
