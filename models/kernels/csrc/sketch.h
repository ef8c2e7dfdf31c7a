// A first look at private labels, for few rows: each weight costs a read of an input, so of each label only its heaviest connections
// are looked at, with weights in 8 bits. Labels that the rest cannot bring among a row's k best are left at that.
//
// In units of a group, kept weights are q + e with whole |q| ≤ 127; in units of a row, inputs are v + d with whole |v| ≤ 32767 and
// |d| ≤ 1/2. A score is Σ q·v and at most Σ|q| / 2 + ‖e‖ · ‖x'‖ + ‖w''‖ · ‖x''‖ besides (Cauchy and Schwarz): w'' are the weights not
// kept, x' and x'' as many of the row's inputs as are kept and as are not, its largest.
#pragma once
#include <algorithm>

#include "group.h"
#include "kernels.h"
#include "simd.h"

namespace fanin {
namespace FANIN_LEVEL {
namespace {

// Fills in groups [begin, end); false when numbers are too large for it. `scratch` [K, G].
template <class T>
bool make_sketch(const Block& block, int64_t begin, int64_t end, const Sketch& out, float* wf) {
  const int K = block.fan_in, G = block.group_size, kept = out.kept;
  for (int64_t n = begin; n < end; ++n) {
    float most = 0;
    weights(Group<T>(block, n), wf);
    for (int64_t i = 0; i < (int64_t)K * G; ++i) {
      const float a = __builtin_fabsf(wf[i]);
      if (!(a < LARGEST_SCREENED)) return false;
      most = a > most ? a : most;
    }
    const float unit = most / 127 > SMALLEST_UNIT ? most / 127 : SMALLEST_UNIT;
    double error_most = 0;
    for (int g = 0; g < G; ++g) {
      uint16_t order[MAX_SKETCHED_FAN_IN];
      for (int k = 0; k < K; ++k) order[k] = (uint16_t)k;
      const auto heavier = [&](int a, int b) {
        const float first = __builtin_fabsf(wf[(int64_t)a * G + g]), second = __builtin_fabsf(wf[(int64_t)b * G + g]);
        return first > second || (first == second && a < b);
      };
      std::nth_element(order, order + kept, order + K, heavier);
      double error = 0, rest = 0;
      for (int k = 0; k < K; ++k) {
        const int64_t at = (int64_t)order[k] * G + g;
        if (k < kept) {
          const float q = __builtin_rintf(wf[at] / unit);
          const double e = wf[at] - (double)unit * q;
          const int64_t to = n * kept * G + ((int64_t)(k / 2) * G + g) * 2 + k % 2;
          out.values[to] = (int8_t)q;
          out.offsets[to] = (uint16_t)(2 * block.indices[n * K * G + at]);
          error += e * e;
        } else {
          rest += (double)wf[at] * wf[at];
        }
      }
      const float norm = (float)(__builtin_sqrt(rest) * (1 + 0x1p-12)) + SMALLEST_UNIT;
      uint32_t pattern;
      std::memcpy(&pattern, &norm, 4);
      out.rest[n * G + g] = (uint16_t)((pattern + 0xFFFF) >> 16);  // bf16, rounded up
      error_most = error > error_most ? error : error_most;
    }
    // Besides, what the kept products' sum may be off by in fp32, here and in the score: Σ |q·x| ≤ 128 · √K · ‖x'‖, with room for what else it rounds.
    const double rounding = (double)unit * 128 * __builtin_sqrt((double)K) * K * 0x1p-22;
    out.unit[n] = unit;
    out.error[n] = (float)(__builtin_sqrt(error_most) * (1 + 0x1p-12) + rounding) + SMALLEST_UNIT;
  }
  return true;
}

// The processor fetches ahead too, but not far enough: this saves a fifth of the time for one row (Emerald Rapids).
FANIN_INLINE void prefetch_sketch(const Block& block, int64_t n) {
  const int64_t count = (int64_t)block.sketch.kept * block.group_size, from = (n + 2) * count;
  for (int64_t i = 0; i < count; i += 64) __builtin_prefetch(block.sketch.values + from + i);
  for (int64_t i = 0; i < count; i += 32) __builtin_prefetch(block.sketch.offsets + from + i);
}

// How many rows may have one of their k best in group n; found [rows] tells which.
int sketched_rows(const Block& block, const Rows16& x, int rows, int64_t n, const Best& best, uint8_t* found) {
  constexpr int NV = 16 / W;
  const int G = block.group_size, kept = block.sketch.kept;
  const int8_t* values = block.sketch.values + n * kept * G;
  const uint16_t* offsets = block.sketch.offsets + n * kept * G;
  int count = 0;
  prefetch_sketch(block, n);
  for (int b = 0; b < rows; ++b) {
    const int16_t* in = x.x + (int64_t)b * (block.width + 1);
    asm("" : "+r"(in));  // else GCC adds b·(width + 1) to every index
    const float unit = block.sketch.unit[n] * x.unit[b];
    const vf threshold = broadcast(best.threshold[b]), rest = broadcast(x.norms[1][b]);
    // 1e-36: numbers too small for fp32 to round by size
    const vf error = broadcast(block.sketch.error[n] * x.norms[0][b] + 64 * kept * unit + 1e-36f);
    uint32_t passes = 0;
    for (int g = 0; g < G; g += 16) {
      vi sum[NV] = {};
      for (int k = 0; k < kept; k += 2)
        for (int v = 0; v < NV; ++v) {
          const int64_t at = (int64_t)k * G + 2 * (g + v * W);
          sum[v] += gathered_pairs(in, offsets + at, values + at);
        }
      for (int v = 0; v < NV; ++v) {
        const int64_t at = n * G + g + v * W;
        const vf bias = load(block.bias + at), margin = (absolute(bias) + absolute(threshold)) * 0x1p-20f + error;
        const vf score = __builtin_convertvector(sum[v], vf) * unit + bias;
        passes |= greater(score + (load((const bf16*)block.sketch.rest + at) * rest + margin), threshold);
      }
    }
    count += found[b] = passes != 0;
  }
  return count;
}

}  // namespace
}  // namespace FANIN_LEVEL
}  // namespace fanin
