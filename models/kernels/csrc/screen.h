// A first look at a group in 8 bits, which tells the rows that cannot have one of their k best in it: most of them, so that few
// scores are computed from the weights themselves. The idea is the VA-file's (Weber, Schek & Blott 1998): approximations with
// bounds of their error, so that nothing is missed.
//
// In units of a group, weights are q + e with whole |q| ≤ 64 and |e| ≤ 1/2; in units of a row, inputs are u + d with |u| ≤ 127 and
// |d| ≤ 1/2. A score is Σ q·u and at most Σ|q| / 2 + ‖e‖·‖u + d‖ besides. The sums fit into 16 bits, as Σ|q| ≤ 257.
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

// Fills in groups [begin, end); false when numbers are too large for it. `scratch` [K + 3, G].
template <class T>
bool make_screen(const Block& block, int64_t begin, int64_t end, const Screen& out, float* scratch) {
  const int K = block.fan_in, G = block.group_size, pairs = (K + 1) / 2;
  float *wf = scratch, *sum = wf + (int64_t)K * G, *size = sum + G, *rest = size + G;
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
    for (int g = 0; g < G; ++g) sum[g] = size[g] = rest[g] = 0;
    int8_t* q = out.values + n * pairs * G * 2;
    for (int k = 0; k < 2 * pairs; ++k)
      for (int g = 0; g < G; ++g) {
        const float exact = k < K ? wf[(int64_t)k * G + g] * inverse : 0, whole = __builtin_rintf(exact);
        q[((int64_t)(k / 2) * G + g) * 2 + k % 2] = (int8_t)whole;
        sum[g] += whole;
        size[g] += __builtin_fabsf(whole);
        rest[g] += (exact - whole) * (exact - whole);
      }
    float size_most = 0, rest_most = 0;
    for (int g = 0; g < G; ++g) {
      out.start[n * G + g] = (int16_t)(uint16_t)(-128 * (int)sum[g]);  // inputs come as u + 128
      size_most = size[g] > size_most ? size[g] : size_most;
      rest_most = rest[g] > rest_most ? rest[g] : rest_most;
    }
    out.scale[n] = {inverse, bias, size_most / 2, rest_most};
  }
  return true;
}

// Whether NV vectors of labels have a sum above the limit, for BT rows.
template <int NV, int BT>
FANIN_INLINE void screen_tile(const int8_t* q, const int16_t* start, int pairs, int G, const uint32_t* x, int ldx, const int16_t* limit,
                              uint8_t* found) {
  vs sum[BT][NV];
  for (int b = 0; b < BT; ++b)
    for (int v = 0; v < NV; ++v) sum[b][v] = load(start + v * LANES);
  for (int j = 0; j < pairs; ++j) {
    vs w[NV];
    for (int v = 0; v < NV; ++v) w[v] = load((const int16_t*)(q + (int64_t)j * G * 2) + v * LANES);
    for (int b = 0; b < BT; ++b) {
      const vu both = broadcast(x[(int64_t)j * ldx + b]);
      for (int v = 0; v < NV; ++v) sum[b][v] += pair_products(both, w[v]);
    }
  }
  for (int b = 0; b < BT; ++b) {
    vs above = sum[b][0] > broadcast(limit[b]);
    for (int v = 1; v < NV; ++v) above |= sum[b][v] > broadcast(limit[b]);
    found[b] |= any(above);
  }
}

template <int NV, int BT>
FANIN_INLINE void screen_rows(int rows, const int8_t* q, const int16_t* start, int pairs, int G, const uint32_t* x, int ldx,
                              const int16_t* limit, uint8_t* found) {
  if constexpr (BT > 0) {
    if (rows == BT)
      screen_tile<NV, BT>(q, start, pairs, G, x, ldx, limit, found);
    else
      screen_rows<NV, BT - 1>(rows, q, start, pairs, G, x, ldx, limit, found);
  }
}

template <int NV>
void screen_group(const int8_t* q, const int16_t* start, int pairs, int G, const uint32_t* x, int rows, int ldx, const int16_t* limit,
                  uint8_t* found) {
  const int tiles = (rows + ROWS_PER_TILE - 1) / ROWS_PER_TILE;
  for (int t = 0; t < tiles; ++t) {
    const int b = rows * t / tiles, height = rows * (t + 1) / tiles - b;
    for (int g = 0; g < G; g += NV * LANES)
      screen_rows<NV, ROWS_PER_TILE>(height, q + 2 * g, start + g, pairs, G, x + b, ldx, limit + b, found + b);
  }
}

// What sums must exceed: a score above the threshold, less what the sum may be short of, less the rounding of scores in fp32. V is
// a vector of rows or one row.
template <class V>
FANIN_INLINE V needed(const ScreenScale& scale, V threshold, V row_inverse, V root) {
  const V slack = (absolute(threshold) + __builtin_fabsf(scale.bias)) * 0x1p-20f;
  const V margin = (root + scale.half_size) * 1.001f + 2.0f;  // a unit for rounding down
  const V least = (threshold - scale.bias - slack) * (row_inverse * scale.inverse) - margin;
  const V above = least > -32768.0f ? least : V{} - 32768.0f;  // also where it is not a number
  return above < 32767.0f ? above : V{} + 32767.0f;
}

// Pairs of inputs of the group as the products want them, and limits.
void prepare_row(const Block& block, const Rows8& x, int64_t n, float threshold, uint32_t* words, int16_t* limit) {
  const int K = block.fan_in;
  const uint16_t* index = block.indices + n * K;
  const ScreenScale& scale = block.screen.scale[n];
  float norm[4] = {};
  int k = 0;
  for (; k + 4 <= K; k += 4) {
    const uint16_t i0 = index[k], i1 = index[k + 1], i2 = index[k + 2], i3 = index[k + 3];
    words[k / 2] = x.twice[i0] | x.twice[i1] << 8, words[k / 2 + 1] = x.twice[i2] | x.twice[i3] << 8;
    norm[0] += x.squares[i0], norm[1] += x.squares[i1], norm[2] += x.squares[i2], norm[3] += x.squares[i3];
  }
  for (; k < K; ++k) {
    words[k / 2] = k % 2 ? words[k / 2] | x.twice[index[k]] << 8 : x.twice[index[k]];
    norm[k % 4] += x.squares[index[k]];
  }
  const float root = __builtin_sqrtf(scale.rest * ((norm[0] + norm[1]) + (norm[2] + norm[3])));
  *limit = (int16_t)needed(scale, threshold, x.inverse[0], root);
}

void prepare_rows(const Block& block, const Rows8& x, int64_t n, int ldx, const float* threshold, uint32_t* words, int16_t* limit) {
  constexpr int NV = 16 / W;
  const int K = block.fan_in;
  const uint16_t* index = block.indices + n * K;
  const ScreenScale& scale = block.screen.scale[n];
  for (int b = 0; b < ldx; b += 16) {
    vf norm[NV] = {};
    for (int k = 0; k < K; ++k) {
      const float* square = x.squares + (int64_t)index[k] * ldx + b;
      for (int v = 0; v < NV; ++v) norm[v] += load(square + v * W);
    }
    for (int k = 0; k < K; k += 2) {
      const uint8_t *first = x.x + (int64_t)index[k] * ldx + b, *second = x.x + (int64_t)index[k + 1 < K ? k + 1 : k] * ldx + b;
      store_pairs(words + (int64_t)(k / 2) * ldx + b, first, second);
    }
    float least[16];
    for (int v = 0; v < NV; ++v)
      store(least + v * W, needed(scale, load(threshold + b + v * W), load(x.inverse + b + v * W), square_root(scale.rest * norm[v])));
    for (int i = 0; i < 16; ++i) limit[b + i] = (int16_t)least[i];
  }
}

// How many rows may have one of their k best in group n; found [ldx] tells which. `scratch` holds (⌈K/2⌉ + 2) · ldx floats.
int candidates(const Block& block, const Batch& x, const Rows8& rows8, int64_t n, const Best& best, float* scratch, uint8_t*& found) {
  const int G = block.group_size, pairs = (block.fan_in + 1) / 2, ldx = x.ldx;
  uint32_t* words = (uint32_t*)scratch;
  int16_t* limit = (int16_t*)(words + (int64_t)pairs * ldx);
  found = (uint8_t*)(limit + ldx);
  if (ldx == 1)
    prepare_row(block, rows8, n, best.threshold[0], words, limit);
  else
    prepare_rows(block, rows8, n, ldx, best.threshold, words, limit);
  for (int b = 0; b < ldx; ++b) found[b] = 0;
  const int8_t* q = block.screen.values + n * pairs * G * 2;
  // Its walk is too short for the processor to see where it leads.
  for (int i = 0; i < pairs * G * 2; i += 64) __builtin_prefetch(q + (int64_t)AHEAD * pairs * G * 2 + i);
  __builtin_prefetch(block.indices + (n + AHEAD) * block.fan_in);
  const int16_t* start = block.screen.start + n * G;
  if (G % (2 * LANES) == 0)
    screen_group<2>(q, start, pairs, G, words, x.rows, ldx, limit, found);
  else
    screen_group<1>(q, start, pairs, G, words, x.rows, ldx, limit, found);
  int count = 0;
  for (int b = 0; b < x.rows; ++b) count += found[b];
  return count;
}

}  // namespace
}  // namespace FANIN_LEVEL
}  // namespace fanin

#endif
