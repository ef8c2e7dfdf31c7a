// A first look at a group in 8 bits, which tells the rows that cannot have one of their k best in it: most of them, so that few
// scores are computed from the weights themselves. The idea is the VA-file's (Weber, Schek & Blott 1998): approximations with
// bounds of their error, so that nothing is missed.
//
// In units of a group, weights are q + e with whole |q| ≤ 64 and |e| ≤ 1/2; in units of a row, inputs are u + d with |u| ≤ 127 and
// |d| ≤ 1/2. A score is Σ q·u and at most Σ|q| / 2 + ‖e‖·‖u + d‖ besides, where ‖u + d‖ ≤ ‖u‖ + √K / 2. The sums fit into 16 bits,
// as Σ|q| ≤ 257; on the way they may leave these bits and come back. Stored are q + 64 ≥ 0, so sums start at −64 · Σ u.
#pragma once
#include "kernels.h"
#include "simd.h"

#if defined(FANIN_AVX2) || defined(FANIN_AVX512)
#define FANIN_SCREENS

namespace fanin {
namespace FANIN_LEVEL {
namespace {

constexpr int LANES = 2 * W;  // of 16 bits
constexpr int AHEAD = 6;      // groups fetched before they are looked at
constexpr int TOGETHER = 4;   // groups of one row looked at together; more would let memory wait in between

// Fills in groups [begin, end); false when numbers are too large for it. `scratch` [K + 2, G].
template <class T>
bool make_screen(const Block& block, int64_t begin, int64_t end, const Screen& out, float* scratch) {
  const int K = block.fan_in, G = block.group_size, pairs = (K + 1) / 2;
  float *wf = scratch, *size = wf + (int64_t)K * G, *rest = size + G;
  for (int64_t n = begin; n < end; ++n) {
    const T* w = (const T*)block.values + n * K * G;
    float most = 0, largest = 0;
    for (int64_t i = 0; i < (int64_t)K * G; i += W) store(wf + i, load(w + i));
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
    const float wanted = most / 64 > largest / (257 - pairs) ? most / 64 : largest / (257 - pairs);
    const float inverse = 1 / (wanted > SMALLEST_UNIT ? wanted : SMALLEST_UNIT);
    for (int g = 0; g < G; ++g) size[g] = rest[g] = 0;
    uint8_t* q = out.values + n * pairs * G * 2;
    for (int k = 0; k < 2 * pairs; ++k)
      for (int g = 0; g < G; ++g) {
        const float exact = k < K ? wf[(int64_t)k * G + g] * inverse : 0, whole = __builtin_rintf(exact);
        q[((int64_t)(k / 2) * G + g) * 2 + k % 2] = (uint8_t)(whole + 64);
        size[g] += __builtin_fabsf(whole);
        rest[g] += (exact - whole) * (exact - whole);
      }
    float size_most = 0, rest_most = 0;
    for (int g = 0; g < G; ++g) {
      size_most = size[g] > size_most ? size[g] : size_most;
      rest_most = rest[g] > rest_most ? rest[g] : rest_most;
    }
    const float root = __builtin_sqrtf(rest_most) * 1.001f;
    // Two units: for rounding sums, in 8 bits and in the score, and for rounding the limit down.
    out.scale[0][n] = inverse, out.scale[1][n] = bias + __builtin_fabsf(bias) * 0x1p-20f;
    out.scale[2][n] = (size_most / 2 + root * __builtin_sqrtf((float)K) / 2) * 1.001f + 2, out.scale[3][n] = root;
  }
  return true;
}

// What the products want of each row.
struct Inputs {
  uint32_t* words;  // [⌈K/2⌉, ldx], u of a pair of inputs, twice over
  uint32_t* start;  // [ldx], −64 · Σ u in 16 bits, twice over
  int16_t* limit;   // [ldx], what a sum must exceed
};

// Whether NV vectors of labels have a sum above the limit, for BT rows.
template <int NV, int BT>
FANIN_INLINE void screen_tile(const uint8_t* q, int pairs, int G, Inputs x, int row, int ldx, uint8_t* found) {
  vs sum[BT][NV];
  for (int b = 0; b < BT; ++b)
    for (int v = 0; v < NV; ++v) sum[b][v] = (vs)broadcast(x.start[row + b]);
  for (int j = 0; j < pairs; ++j) {
    vs w[NV];
    for (int v = 0; v < NV; ++v) w[v] = load((const int16_t*)(q + (int64_t)j * G * 2) + v * LANES);
    for (int b = 0; b < BT; ++b) {
      const vu both = broadcast(x.words[(int64_t)j * ldx + row + b]);
      for (int v = 0; v < NV; ++v) sum[b][v] += pair_products(w[v], both);
    }
  }
  for (int b = 0; b < BT; ++b) {
    vs above = sum[b][0] > broadcast(x.limit[row + b]);
    for (int v = 1; v < NV; ++v) above |= sum[b][v] > broadcast(x.limit[row + b]);
    found[row + b] |= any(above);
  }
}

template <int NV, int BT>
FANIN_INLINE void screen_rows(int rows, const uint8_t* q, int pairs, int G, Inputs x, int row, int ldx, uint8_t* found) {
  if constexpr (BT > 0) {
    if (rows == BT)
      screen_tile<NV, BT>(q, pairs, G, x, row, ldx, found);
    else
      screen_rows<NV, BT - 1>(rows, q, pairs, G, x, row, ldx, found);
  }
}

template <int NV>
FANIN_INLINE void screen_tiles(const uint8_t* q, int pairs, int G, Inputs x, int rows, int ldx, uint8_t* found) {
  const int tiles = (rows + ROWS_PER_TILE - 1) / ROWS_PER_TILE;
  for (int t = 0; t < tiles; ++t) {
    const int row = rows * t / tiles, height = rows * (t + 1) / tiles - row;
    for (int g = 0; g < G; g += NV * LANES) screen_rows<NV, ROWS_PER_TILE>(height, q + 2 * g, pairs, G, x, row, ldx, found);
  }
}

// Sets found [rows] where a row has a sum above its limit.
FANIN_INLINE void screen_group(const uint8_t* q, int pairs, int G, Inputs x, int rows, int ldx, uint8_t* found) {
  if (G % (2 * LANES) == 0)
    screen_tiles<2>(q, pairs, G, x, rows, ldx, found);
  else
    screen_tiles<1>(q, pairs, G, x, rows, ldx, found);
}

// A group's walk is too short for the processor to see where it leads.
FANIN_INLINE void prefetch(const uint8_t* q, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(q + AHEAD * bytes + i);
}

// What sums of group n must exceed: a score above the threshold, less what the sum may be short of, less the rounding of scores in
// fp32. For a vector of rows, or of groups n, n + 1, …
FANIN_INLINE vf needed(vf inverse, vf bias, vf margin, vf rest, vf threshold, vf row_inverse, vf norm) {
  const vf distance = threshold - absolute(threshold) * 0x1p-20f - bias;
  const vf least = distance * (row_inverse * inverse) - (rest * norm + margin);
  const vf above = least > -32768.0f ? least : vf{} - 32768.0f;  // also where it is not a number
  return above < 32767.0f ? above : vf{} + 32767.0f;
}

// From the sum of K of Rows8's figures: the norm ‖u‖, or a little more.
FANIN_INLINE vf norm_of(vu figures) { return square_root(__builtin_convertvector((vi)(figures >> 10), vf)); }

// And the start of sums, twice over: −64 · Σ u modulo 2¹⁶.
FANIN_INLINE vu start_of(vu figures, int K) { return ((128u * K - figures) * 64 & 0xFFFF) * 0x10001; }

// The inputs of group n in one row, in pairs as the products want them. Returns the sum of their figures.
FANIN_INLINE uint32_t prepare_row(const Block& block, const Rows8& x, int64_t n, uint32_t* words) {
  const int K = block.fan_in;
  const uint16_t* index = block.indices + n * K;
  const auto word = [&x](int input, int at) {
    uint32_t both;
    std::memcpy(&both, (const uint8_t*)(x.spread + input) + 3 - at, 4);
    return both;
  };
  uint32_t figures = 0;
  int k = 0;
  for (; k + 2 <= K; k += 2) {
    words[k / 2] = word(index[k], 0) | word(index[k + 1], 1);
    figures += x.figures[index[k]] + x.figures[index[k + 1]];
  }
  if (k < K) words[k / 2] = word(index[k], 0), figures += x.figures[index[k]];
  return figures;
}

// For a single row: which of `count` groups from n on, at most TOGETHER, may have one of its k best, a bit for each. Several at a
// time, as the way from a group's inputs to its limit is a long one. `scratch` holds TOGETHER · ⌈K/2⌉ floats.
uint32_t candidate_groups(const Block& block, const Rows8& x, int64_t n, int count, float threshold, float* scratch) {
  const int G = block.group_size, pairs = (block.fan_in + 1) / 2;
  const Screen& screen = block.screen;
  uint32_t* words = (uint32_t*)scratch;
  vu figures{};
  vf scale[4] = {};
  for (int i = 0; i < count; ++i) {
    figures[i] = prepare_row(block, x, n + i, words + (int64_t)i * pairs);
    for (int j = 0; j < 4; ++j) scale[j][i] = screen.scale[j][n + i];
  }
  const vf least = needed(scale[0], scale[1], scale[2], scale[3], broadcast(threshold), broadcast(x.inverse[0]), norm_of(figures));
  const vu start = start_of(figures, block.fan_in);
  uint32_t found = 0;
  for (int i = 0; i < count; ++i) {
    const uint8_t* q = screen.values + (n + i) * pairs * G * 2;
    prefetch(q, pairs * G * 2);
    uint32_t first = start[i];
    int16_t limit = (int16_t)least[i];
    uint8_t any = 0;
    screen_group(q, pairs, G, {words + (int64_t)i * pairs, &first, &limit}, 1, 1, &any);
    found |= (uint32_t)any << i;
  }
  return found;
}

void prepare_rows(const Block& block, const Rows8& x, int64_t n, int ldx, const float* threshold, Inputs out) {
  constexpr int NV = 16 / W;
  static constexpr int8_t zero[16] = {};
  const int K = block.fan_in;
  const Screen& screen = block.screen;
  const uint16_t* index = block.indices + n * K;
  for (int b = 0; b < ldx; b += 16) {
    vu figures[NV] = {};
    for (int k = 0; k < K; ++k)
      for (int v = 0; v < NV; ++v) figures[v] += load(x.figures + (int64_t)index[k] * ldx + b + v * W);
    for (int k = 0; k < K; k += 2) {
      const int8_t *first = x.x + (int64_t)index[k] * ldx + b, *second = k + 1 < K ? x.x + (int64_t)index[k + 1] * ldx + b : zero;
      store_pairs(out.words + (int64_t)(k / 2) * ldx + b, first, second);
    }
    float least[16];
    for (int v = 0; v < NV; ++v) {
      const vu start = start_of(figures[v], K);
      std::memcpy(out.start + b + v * W, &start, sizeof start);
      store(least + v * W, needed(broadcast(screen.scale[0][n]), broadcast(screen.scale[1][n]), broadcast(screen.scale[2][n]),
                                  broadcast(screen.scale[3][n]), load(threshold + b + v * W), load(x.inverse + b + v * W),
                                  norm_of(figures[v])));
    }
    for (int i = 0; i < 16; ++i) out.limit[b + i] = (int16_t)least[i];
  }
}

// For several rows: how many may have one of their k best in group n; found [ldx] tells which. `scratch` holds (⌈K/2⌉ + 3) · ldx
// floats.
int candidate_rows(const Block& block, const Batch& x, const Rows8& rows8, int64_t n, const Best& best, float* scratch, uint8_t*& found) {
  const int G = block.group_size, pairs = (block.fan_in + 1) / 2, ldx = x.ldx;
  uint32_t *words = (uint32_t*)scratch, *start = words + (int64_t)pairs * ldx;
  const Inputs inputs{words, start, (int16_t*)(start + ldx)};
  found = (uint8_t*)(inputs.limit + ldx);
  prepare_rows(block, rows8, n, ldx, best.threshold, inputs);
  for (int b = 0; b < ldx; ++b) found[b] = 0;
  const uint8_t* q = block.screen.values + n * pairs * G * 2;
  prefetch(q, pairs * G * 2);
  __builtin_prefetch(block.indices + (n + AHEAD) * block.fan_in);
  screen_group(q, pairs, G, inputs, x.rows, ldx, found);
  int count = 0;
  for (int b = 0; b < x.rows; ++b) count += found[b];
  return count;
}

}  // namespace
}  // namespace FANIN_LEVEL
}  // namespace fanin

#endif
