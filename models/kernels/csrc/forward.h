// Scores of one group. Two forms: along the labels, z [B, G] (dense, shared, and private for few rows), and along the batch,
// z^T [G, ldx] (private for many rows, where each label reads other inputs).
#pragma once
#include "group.h"
#include "kernels.h"
#include "simd.h"
#include "tiles.h"

namespace fanin {
namespace FANIN_LEVEL {
namespace {

constexpr int LONG_SUM = 256;  // partial sums of at most this many products keep fp32 error small for large fan-ins

// z[b, g…] for BT rows and NV vectors of labels, in registers while the inputs stream by; `z` is that of the first row.
template <class T, int NV, int BT>
FANIN_INLINE void tile(const Group<T>& group, int g, const float* xt, int ldx, float* z) {
  const int K = group.K, G = group.G;
  const T* w = group.values + g;
  const uint16_t* index = group.index;
  for (int from = 0; from < K; from += LONG_SUM) {
    const int to = K - from < LONG_SUM ? K : from + LONG_SUM;
    vf acc[BT][NV];
    for (int b = 0; b < BT; ++b)
      for (int v = 0; v < NV; ++v) acc[b][v] = vf{};
    for (int k = from; k < to; ++k) {
      const float* in = xt + (int64_t)(index ? index[k] : k) * ldx;
      vf wv[NV];
      for (int v = 0; v < NV; ++v) wv[v] = load(w + (int64_t)k * G + v * W);
      for (int b = 0; b < BT; ++b) {
        const vf xb = broadcast(in[b]);
        for (int v = 0; v < NV; ++v) acc[b][v] += xb * wv[v];
      }
    }
    for (int b = 0; b < BT; ++b)
      for (int v = 0; v < NV; ++v) {
        float* out = z + (int64_t)b * G + g + v * W;
        store(out, group.finished(acc[b][v], g + v * W, load(from ? out : group.bias + g + v * W)));
      }
  }
}

template <class T, int NV>
void labels_forward(const Group<T>& group, const Batch& x, float* z) {
  for_tiles(x.rows, [&](int b, auto height) __attribute__((always_inline)) {
    for (int g = 0; g < group.G; g += NV * W) tile<T, NV, height>(group, g, x.xt + b, x.ldx, z + (int64_t)b * group.G);
  });
}

template <class T, int NV>
void one_row_forward(const Group<T>& group, const float* x, float* z) {
  for (int g = 0; g < group.G; g += NV * W) tile<T, NV, 1>(group, g, x, 1, z);
}

// Private, few rows: inputs of W labels gathered side by side.
template <class T>
void gather_forward(const Group<T>& group, const Batch& x, int width, float* z) {
  constexpr int NV = 16 / W;
  const int K = group.K, G = group.G;
  for (int b = 0; b < x.rows; ++b) {
    const float* in = x.x + (int64_t)b * width;
    asm("" : "+r"(in));  // else GCC adds b·width to every index
    for (int g = 0; g < G; g += 16) {
      for (int from = 0; from < K; from += LONG_SUM) {
        const int to = K - from < LONG_SUM ? K : from + LONG_SUM;
        vf acc[NV];
        for (int v = 0; v < NV; ++v) acc[v] = vf{};
        for (int k = from; k < to; ++k)
          for (int v = 0; v < NV; ++v) {
            const int64_t at = (int64_t)k * G + g + v * W;
            acc[v] += load(group.values + at) * gather(in, group.index + at);
          }
        for (int v = 0; v < NV; ++v) {
          float* out = z + (int64_t)b * G + g + v * W;
          store(out, group.finished(acc[v], g + v * W, load(from ? out : group.bias + g + v * W)));
        }
      }
    }
  }
}

// z [B, G] of a group of any connectivity.
template <class T>
void forward_rows(const Block& block, const Group<T>& group, const Batch& x, float* z) {
  if (block.connectivity == Connectivity::private_) return gather_forward(group, x, block.width, z);
  if (x.rows == 1 && group.G % 32 == 0) return one_row_forward<T, 32 / W>(group, x.x, z);
  if (x.rows == 1) return one_row_forward<T, 16 / W>(group, x.x, z);
  if (group.G % (2 * W) == 0) return labels_forward<T, 2>(group, x, z);
  return labels_forward<T, 1>(group, x, z);
}

// z^T [G, ldx] of a private group: the batch lies along the vectors. `wf` [K, G] is scratch for the stored numbers as fp32.
template <class T>
void forward_columns(const Group<T>& group, const Batch& x, float* wf, float* zt) {
  constexpr int NV = 16 / W;    // vectors of 16 rows
  constexpr int LT = 8 / NV;    // labels side by side, so that eight sums are in flight
  const int K = group.K, G = group.G;
  for (int64_t i = 0; i < (int64_t)K * G; i += W) store(wf + i, load(group.values + i));
  for (int b = 0; b < x.ldx; b += 16) {
    const float* in = x.xt + b;
    for (int g = 0; g < G; g += LT) {
      for (int from = 0; from < K; from += LONG_SUM) {
        const int to = K - from < LONG_SUM ? K : from + LONG_SUM;
        vf acc[LT][NV];
        for (int l = 0; l < LT; ++l)
          for (int v = 0; v < NV; ++v) acc[l][v] = vf{};
        for (int k = from; k < to; ++k)
          for (int l = 0; l < LT; ++l) {
            const int64_t at = (int64_t)k * G + g + l;
            const float* row = in + (int64_t)group.index[at] * x.ldx;
            const vf wl = broadcast(wf[at]);
            for (int v = 0; v < NV; ++v) acc[l][v] += wl * load(row + v * W);
          }
        for (int l = 0; l < LT; ++l)
          for (int v = 0; v < NV; ++v) {
            float* out = zt + (int64_t)(g + l) * x.ldx + b + v * W;
            store(out, group.finished_rows(acc[l][v], g + l, from ? load(out) : broadcast(group.bias[g + l])));
          }
      }
    }
  }
}

}  // namespace
}  // namespace FANIN_LEVEL
}  // namespace fanin
