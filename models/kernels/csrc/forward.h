// Scores of one group. Two forms: along the labels, z [B, G] (dense, shared, and private for few rows), and along the batch,
// z^T [G, ldx] (private for many rows, where each label reads other inputs).
#pragma once
#include "kernels.h"
#include "simd.h"
#include "tiles.h"

namespace fanin {
namespace FANIN_LEVEL {
namespace {

constexpr int LONG_SUM = 256;  // partial sums of at most this many products keep fp32 error small for large fan-ins

// z[b, :] for BT rows and NV vectors of labels, in registers while the inputs stream by.
template <class T, int NV, int BT>
FANIN_INLINE void tile(const T* w, const uint16_t* index, int K, int G, const float* xt, int ldx, const float* bias, float* z) {
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
        float* out = z + (int64_t)b * G + v * W;
        store(out, acc[b][v] + load(from ? out : bias + v * W));
      }
  }
}

template <class T, int NV>
void labels_forward(const T* w, const uint16_t* index, int K, int G, const Batch& x, const float* bias, float* z) {
  for_tiles(x.rows, [&](int b, auto height) __attribute__((always_inline)) {
    for (int g = 0; g < G; g += NV * W)
      tile<T, NV, height>(w + g, index, K, G, x.xt + b, x.ldx, bias + g, z + (int64_t)b * G + g);
  });
}

template <class T, int NV>
void one_row_forward(const T* w, const uint16_t* index, int K, int G, const float* x, const float* bias, float* z) {
  for (int g = 0; g < G; g += NV * W) tile<T, NV, 1>(w + g, index, K, G, x, 1, bias + g, z + g);
}

// Private, few rows: inputs of W labels gathered side by side.
template <class T>
void gather_forward(const T* w, const uint16_t* index, int K, int G, const Batch& x, int width, const float* bias, float* z) {
  constexpr int NV = 16 / W;
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
            acc[v] += load(w + at) * gather(in, index + at);
          }
        for (int v = 0; v < NV; ++v) {
          float* out = z + (int64_t)b * G + g + v * W;
          store(out, acc[v] + load(from ? out : bias + g + v * W));
        }
      }
    }
  }
}

// z [B, G] of a group of any connectivity.
template <class T>
void forward_rows(const Block& block, const T* w, const uint16_t* index, const Batch& x, const float* bias, float* z) {
  const int K = block.fan_in, G = block.group_size;
  if (block.connectivity == Connectivity::private_) return gather_forward(w, index, K, G, x, block.width, bias, z);
  if (x.rows == 1 && G % 32 == 0) return one_row_forward<T, 32 / W>(w, index, K, G, x.x, bias, z);
  if (x.rows == 1) return one_row_forward<T, 16 / W>(w, index, K, G, x.x, bias, z);
  if (G % (2 * W) == 0) return labels_forward<T, 2>(w, index, K, G, x, bias, z);
  return labels_forward<T, 1>(w, index, K, G, x, bias, z);
}

// z^T [G, ldx] of a private group: the batch lies along the vectors. `wf` [K, G] is scratch for the weights as fp32.
template <class T>
void forward_columns(const Block& block, const T* w, const uint16_t* index, const Batch& x, const float* bias, float* wf, float* zt) {
  constexpr int NV = 16 / W;    // vectors of 16 rows
  constexpr int LT = 8 / NV;    // labels side by side, so that eight sums are in flight
  const int K = block.fan_in, G = block.group_size;
  for (int64_t i = 0; i < (int64_t)K * G; i += W) store(wf + i, load(w + i));
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
            const float* row = in + (int64_t)index[at] * x.ldx;
            const vf wl = broadcast(wf[at]);
            for (int v = 0; v < NV; ++v) acc[l][v] += wl * load(row + v * W);
          }
        for (int l = 0; l < LT; ++l)
          for (int v = 0; v < NV; ++v) {
            float* out = zt + (int64_t)(g + l) * x.ldx + b + v * W;
            store(out, acc[l][v] + (from ? load(out) : broadcast(bias[g + l])));
          }
      }
    }
  }
}

}  // namespace
}  // namespace FANIN_LEVEL
}  // namespace fanin
