// A first look at a group in 4 bits and, where it leaves a chance, a second one in 6 tell the rows that cannot have one of their k
// best in it: most of them, so that few scores are computed from the weights themselves. The idea is the VA-file's (Weber, Schek &
// Blott 1998): approximations with bounds of their error, so that nothing is missed. A single row waits for memory, and hardly ever
// reads more than the 4 bits.
//
// In units of a group, weights lie within ±8; in units of a row, inputs are u + d with |u| ≤ 127 and |d| ≤ 1/2. A number of 6 bits,
// 4 · c + f, says in which of 64 equal parts a weight lies, c alone in which of 16. With q the middle of that part, the weight is
// q + e, and a score is Σ q·u and at most Σ|q| / 2 + ‖e‖·‖u + d‖ besides, where ‖u + d‖ ≤ ‖u‖ + √K / 2. The first look's Σ q·u is
// Σ c·u − 7.5 · Σ u, the second's is that and (Σ f·u − 1.5 · Σ u) / 4. Both fit into 16 bits, as units are chosen such that
// Σ|q| ≤ 257; on the way they may leave these bits and come back.
#pragma once
#include "group.h"
#include "kernels.h"
#include "simd.h"

#if defined(FANIN_AVX2) || defined(FANIN_AVX512)
#define FANIN_SCREENS

namespace fanin {
namespace FANIN_LEVEL {
namespace {

static_assert(TOPK_ROWS <= 64);  // a bit for each row

constexpr int LANES = 2 * W;  // of 16 bits
constexpr int AHEAD = 6;      // groups fetched before they are looked at
constexpr int TOGETHER = 4;   // groups of one row looked at together; more would let memory wait in between

int eights(const Block& block) { return (block.fan_in + 7) / 8; }
int64_t fine_bytes(const Block& block) { return (int64_t)eights(block) * block.group_size * 2; }
int64_t coarse_bytes(const Block& block) { return 2 * fine_bytes(block); }

// Fills in groups [begin, end); false when numbers are too large for it. `scratch` [K + 4, G].
template <class T>
bool make_screen(const Block& block, int64_t begin, int64_t end, const Screen& out, float* scratch) {
  const int K = block.fan_in, G = block.group_size;
  float *wf = scratch, *size = wf + (int64_t)K * G, *rest = size + 2 * G;
  for (int64_t n = begin; n < end; ++n) {
    float most = 0, largest = 0;
    weights(Group<T>(block, n), wf);
    for (int g = 0; g < G; ++g) size[g] = 0;
    for (int k = 0; k < K; ++k)
      for (int g = 0; g < G; ++g) {
        const float a = __builtin_fabsf(wf[(int64_t)k * G + g]);
        size[g] += a;
        most = a > most ? a : most;
      }
    float bias = -LARGEST_SCREENED;
    for (int g = 0; g < G; ++g) {
      const float b = block.bias[n * G + g];
      largest = size[g] > largest ? size[g] : largest;
      if (!(size[g] < LARGEST_SCREENED && __builtin_fabsf(b) < LARGEST_SCREENED)) return false;
      if (block.labels[n * G + g] >= 0 && b > bias) bias = b;
    }
    const float room = 257 - K / 2.0f, wanted = most / 7.99f > largest / room ? most / 7.99f : largest / room;
    const float inverse = 1 / (wanted > SMALLEST_UNIT ? wanted : SMALLEST_UNIT);
    for (int g = 0; g < 2 * G; ++g) size[g] = rest[g] = 0;
    uint8_t *coarse = out.coarse + n * coarse_bytes(block), *fine = out.fine + n * fine_bytes(block);
    std::memset(coarse, 0, coarse_bytes(block)), std::memset(fine, 0, fine_bytes(block));
    for (int k = 0; k < K; ++k)
      for (int g = 0; g < G; ++g) {
        const float exact = wf[(int64_t)k * G + g] * inverse;
        const int part = (int)__builtin_floorf(exact * 4) + 32;
        coarse[((int64_t)(k / 4) * G + g) * 2 + k % 2] |= (uint8_t)(part / 4 << k / 2 % 2 * 4);
        fine[((int64_t)(k / 8) * G + g) * 2 + k % 2] |= (uint8_t)(part % 4 << k / 2 % 4 * 2);
        const float middle[] = {part / 4 - 7.5f, (part + 0.5f) / 4 - 8};
        for (int look = 0; look < 2; ++look) {
          size[look * G + g] += __builtin_fabsf(middle[look]);
          rest[look * G + g] += (exact - middle[look]) * (exact - middle[look]);
        }
      }
    out.scale[0][n] = inverse, out.scale[1][n] = bias + __builtin_fabsf(bias) * 0x1p-20f;
    for (int look = 0; look < 2; ++look) {
      float size_most = 0, rest_most = 0;
      for (int g = look * G; g < (look + 1) * G; ++g) {
        size_most = size[g] > size_most ? size[g] : size_most;
        rest_most = rest[g] > rest_most ? rest[g] : rest_most;
      }
      const float root = __builtin_sqrtf(rest_most) * 1.001f;
      // Some units more: for rounding sums, in 16 bits and in the score, and for rounding the limit down.
      out.scale[2 + 2 * look][n] = (size_most / 2 + root * __builtin_sqrtf((float)K) / 2) * 1.001f + 4;
      out.scale[3 + 2 * look][n] = root;
    }
  }
  return true;
}

// What sums of group n must exceed: a score above the threshold, less what the sum may be short of, less the rounding of scores in
// fp32. For a vector of rows, or of groups n, n + 1, …
FANIN_INLINE vf needed(vf inverse, vf bias, vf margin, vf rest, vf threshold, vf row_inverse, vf norm) {
  // 1e-36: numbers too small for fp32 to round by size. The two units' product would leave fp32 where neither unit does.
  const vf distance = threshold - absolute(threshold) * 0x1p-20f - bias - 1e-36f;
  const vf least = distance * row_inverse * inverse - (rest * norm + margin);
  const vf above = least > -32768.0f ? least : vf{} - 32768.0f;  // also where it is not a number
  return above < 32767.0f ? above : vf{} + 32767.0f;
}

FANIN_INLINE vf norm_of(vi squares) { return square_root(__builtin_convertvector(squares, vf)); }

// One row's inputs to a group, and what its scores must exceed.
struct Inputs {
  const uint32_t* words;  // [4 · ⌈K/8⌉] at a distance of `step`: u of a pair of inputs, twice over; zero beyond the last
  int step;
  int total;      // Σ u
  float norm;     // ‖u‖
  float inverse;  // 1 / unit
  float threshold;
};

// Whether a row's second look finds a sum above its limit, in NV vectors of labels from g on; `sum` is the first look's.
template <int NV>
[[gnu::noinline]] bool passes_again(const Block& block, int64_t n, int g, const Inputs& x, const vs* sum) {
  const int16_t* fine = (const int16_t*)(block.screen.fine + n * fine_bytes(block)) + g;
  const auto scale = [&](int i) { return broadcast(block.screen.scale[i][n]); };
  vs quarters[NV];
  for (int v = 0; v < NV; ++v) quarters[v] = broadcast((int16_t)(-3 * x.total >> 1));
  for (int i = 0; i < eights(block); ++i, fine += block.group_size)
    for (int j = 0; j < 4; ++j) {
      const vu both = broadcast(x.words[(4 * i + j) * x.step]);
      for (int v = 0; v < NV; ++v) quarters[v] += pair_products(load(fine + v * LANES) >> (2 * j) & 0x0303, both);
    }
  const vf least = needed(scale(0), scale(1), scale(4), scale(5), broadcast(x.threshold), broadcast(x.inverse), broadcast(x.norm));
  const vs limit = broadcast((int16_t)least[0]);
  vs above{};
  for (int v = 0; v < NV; ++v) above |= sum[v] + (quarters[v] >> 2) > limit;
  return any(above);
}

// Whether a row may have one of its k best in group n; `limit` is what the first look's sums must exceed.
template <int NV>
FANIN_INLINE bool passes(const Block& block, int64_t n, const Inputs& x, int16_t limit) {
  for (int g = 0; g < block.group_size; g += NV * LANES) {
    const int16_t* coarse = (const int16_t*)(block.screen.coarse + n * coarse_bytes(block)) + g;
    vs sum[NV], above{};
    for (int v = 0; v < NV; ++v) sum[v] = broadcast((int16_t)(-15 * x.total >> 1));
    for (int i = 0; i < 2 * eights(block); ++i, coarse += block.group_size)
      for (int j = 0; j < 2; ++j) {
        const vu both = broadcast(x.words[(2 * i + j) * x.step]);
        for (int v = 0; v < NV; ++v) sum[v] += pair_products(load(coarse + v * LANES) >> (4 * j) & 0x0F0F, both);
      }
    for (int v = 0; v < NV; ++v) above |= sum[v] > broadcast(limit);
    if (any(above) && passes_again<NV>(block, n, g, x, sum)) return true;
  }
  return false;
}

// A group's walk is too short for the processor to see where it leads.
FANIN_INLINE void prefetch(const uint8_t* values, int64_t n, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(values + (n + AHEAD) * bytes + i);
}

FANIN_INLINE void prefetch_group(const Block& block, int64_t n) {
  prefetch(block.screen.coarse, n, coarse_bytes(block)), prefetch(block.screen.fine, n, fine_bytes(block));
  __builtin_prefetch(block.indices + (n + AHEAD) * block.fan_in);
}

// A bit for each row to a byte; returns how many are set.
FANIN_INLINE int spread(uint64_t bits, int rows, uint8_t* out) {
  if (!bits) return 0;  // `out` is not looked at then
  int count = 0;
  for (int b = 0; b < rows; ++b) count += out[b] = bits >> b & 1;
  return count;
}

// The inputs of group n in a single row. Returns the sum of their figures.
FANIN_INLINE uint64_t prepare_row(const Block& block, const Rows8& x, int64_t n, uint32_t* words) {
  const int64_t K = block.fan_in;
  const uint16_t* index = block.indices + n * K;
  const auto word = [&x](int input, int at) {
    uint32_t both;
    std::memcpy(&both, (const uint8_t*)(x.figures + input) + 3 - at, 4);
    return both;
  };
  uint64_t figures = 0;
  int64_t k = 0;
  for (; k + 2 <= K; k += 2) {
    words[k / 2] = word(index[k], 0) | word(index[k + 1], 1);
    figures += x.figures[index[k]] + x.figures[index[k + 1]];
  }
  if (k < K) words[k / 2] = word(index[k], 0), figures += x.figures[index[k]], k += 2;
  for (; k < 8 * eights(block); k += 2) words[k / 2] = 0;
  return figures;
}

// For a single row: which of COUNT groups from n on may have one of its k best, a bit for each. Several at a time, as the way from a
// group's inputs to its limit is a long one. `scratch` holds COUNT · 4 · ⌈K/8⌉ floats.
template <int COUNT>
uint32_t candidate_groups(const Block& block, const Rows8& x, int64_t n, float threshold, float* scratch) {
  const int pairs = 4 * eights(block);
  uint32_t* words = (uint32_t*)scratch;
  int total[COUNT];
  vi squares{};
  vf scale[4] = {};
  for (int i = 0; i < COUNT; ++i) {
    const uint64_t figures = prepare_row(block, x, n + i, words + i * pairs);
    total[i] = (int)(figures >> 24 & 0xFFFF) - (int)(figures >> 56 << 8), squares[i] = (int)(figures & 0xFFFFFF);
  }
  for (int j = 0; j < 4; ++j) std::memcpy(&scale[j], block.screen.scale[j] + n, COUNT * sizeof(float));
  const vf norm = norm_of(squares);
  const vf least = needed(scale[0], scale[1], scale[2], scale[3], broadcast(threshold), broadcast(x.inverse[0]), norm);
  const bool odd = block.group_size % (2 * LANES);
  uint32_t found = 0;
  for (int i = 0; i < COUNT; ++i) {
    prefetch(block.screen.coarse, n + i, coarse_bytes(block));
    const Inputs inputs{words + i * pairs, 1, total[i], norm[i], x.inverse[0], threshold};
    const int16_t limit = (int16_t)least[i];
    found |= (uint32_t)(odd ? passes<1>(block, n + i, inputs, limit) : passes<2>(block, n + i, inputs, limit)) << i;
  }
  return found;
}

}  // namespace
}  // namespace FANIN_LEVEL
}  // namespace fanin

#endif
