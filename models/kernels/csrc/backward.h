// Gradients of one group from the gradient of its scores. For dense and shared blocks K is walked in strips of a few inputs, so
// that a strip's old weights, its gradients and its update stay in registers and L1.
#pragma once
#include "group.h"
#include "kernels.h"
#include "simd.h"

namespace fanin {
namespace FANIN_LEVEL {
namespace {

constexpr int STRIP = 6;  // inputs handled together

// gt [G, ldx] = gᵀ of g [B, G]; columns beyond B are zero.
FANIN_INLINE void transpose_gradient(const float* g, float* gt, int B, int G, int ldx) {
  for (int b = 0; b < ldx; b += W)
    for (int i = 0; i < G; i += W) {
      vf rows[W];
      for (int r = 0; r < W; ++r) rows[r] = b + r < B ? load(g + (int64_t)(b + r) * G + i) : vf{};
      transpose(rows);
      for (int r = 0; r < W; ++r) store(gt + (int64_t)(i + r) * ldx + b, rows[r]);
    }
}

// grad_xt[input, :] += Σ_g w[input, g] · gt[g, :] for N inputs; w [N, G] fp32.
template <int N>
FANIN_INLINE void strip_input(const float* w, const float* gt, int G, int ldx, float* const* out) {
  constexpr int NV = 16 / W < 2 ? 16 / W : 2;
  for (int b = 0; b < ldx; b += NV * W) {
    vf acc[N][NV];
    for (int n = 0; n < N; ++n)
      for (int v = 0; v < NV; ++v) acc[n][v] = vf{};
    for (int g = 0; g < G; ++g) {
      vf gv[NV];
      for (int v = 0; v < NV; ++v) gv[v] = load(gt + (int64_t)g * ldx + b + v * W);
      for (int n = 0; n < N; ++n) {
        const vf wn = broadcast(w[n * G + g]);
        for (int v = 0; v < NV; ++v) acc[n][v] += wn * gv[v];
      }
    }
    for (int n = 0; n < N; ++n)
      for (int v = 0; v < NV; ++v) store(out[n] + b + v * W, load(out[n] + b + v * W) + acc[n][v]);
  }
}

// grad_w[n, :] = Σ_b in[n][b] · g[b, :] for N inputs; g [B, G], grad_w [N, G].
template <int N>
FANIN_INLINE void strip_values(const float* const* in, const float* g, int B, int G, float* grad_w) {
  constexpr int NV = 16 / W < 2 ? 16 / W : 2;
  for (int i = 0; i < G; i += NV * W) {
    for (int n = 0; n < N; ++n)
      for (int v = 0; v < NV; ++v) store(grad_w + n * G + i + v * W, vf{});
    for (int from = 0; from < B; from += 256) {
      const int to = B - from < 256 ? B : from + 256;
      vf acc[N][NV];
      for (int n = 0; n < N; ++n)
        for (int v = 0; v < NV; ++v) acc[n][v] = vf{};
      for (int b = from; b < to; ++b) {
        vf gv[NV];
        for (int v = 0; v < NV; ++v) gv[v] = load(g + (int64_t)b * G + i + v * W);
        for (int n = 0; n < N; ++n) {
          const vf xn = broadcast(in[n][b]);
          for (int v = 0; v < NV; ++v) acc[n][v] += xn * gv[v];
        }
      }
      for (int n = 0; n < N; ++n)
        for (int v = 0; v < NV; ++v) {
          float* out = grad_w + n * G + i + v * W;
          store(out, load(out) + acc[n][v]);
        }
    }
  }
}

// Calls each(k, n, grad_w [n, G]) for every strip of a dense or shared group. grad_xt may be null;
// strip [2, STRIP, G] is scratch; grad_w is only computed when `values` is set.
template <class T, class Each>
FANIN_INLINE void backward_strips(const Group<T>& group, const Batch& x, const float* g, const float* gt, float* grad_xt, bool values,
                                  float* strip, Each each) {
  const int K = group.K, G = group.G;
  float *old = strip, *grad_w = strip + STRIP * G;
  for (int k = 0; k < K; k += STRIP) {
    const int n = K - k < STRIP ? K - k : STRIP;
    const float* in[STRIP];
    float* out[STRIP];
    for (int i = 0; i < n; ++i) {
      const int64_t offset = (int64_t)(group.index ? group.index[k + i] : k + i) * x.ldx;
      in[i] = x.xt + offset;
      out[i] = grad_xt + offset;
    }
    if (grad_xt) {
      for (int i = 0; i < n * G; i += W) store(old + i, load(group.values + (int64_t)k * G + i));
      if (n == STRIP)
        strip_input<STRIP>(old, gt, G, x.ldx, out);
      else
        for (int i = 0; i < n; ++i) strip_input<1>(old + i * G, gt, G, x.ldx, out + i);
    }
    if (values) {
      if (n == STRIP)
        strip_values<STRIP>(in, g, x.rows, G, grad_w);
      else
        for (int i = 0; i < n; ++i) strip_values<1>(in + i, g, x.rows, G, grad_w + i * G);
    }
    each(k, n, grad_w);
  }
}

// Private: every label has its own inputs. gt [G, ldx]; grad_w [K, G] and grad_xt may be null.
template <class T>
FANIN_INLINE void backward_private(const Group<T>& group, const Batch& x, const float* gt, float* grad_xt, float* grad_w, float* wf) {
  constexpr int NV = 16 / W;
  const int K = group.K, G = group.G, ldx = x.ldx;
  for (int64_t i = 0; i < (int64_t)K * G; i += W) store(wf + i, load(group.values + i));
  for (int k = 0; k < K; ++k)
    for (int g = 0; g < G; ++g) {
      const int64_t at = (int64_t)k * G + g, offset = (int64_t)group.index[at] * ldx;
      const float* gradient = gt + (int64_t)g * ldx;
      if (grad_xt) {
        float* out = grad_xt + offset;
        const vf weight = broadcast(wf[at]);
        for (int b = 0; b < ldx; b += W) store(out + b, load(out + b) + weight * load(gradient + b));
      }
      if (grad_w) {
        vf acc[NV];
        for (int v = 0; v < NV; ++v) acc[v] = vf{};
        for (int b = 0; b < ldx; b += 16)
          for (int v = 0; v < NV; ++v) acc[v] += load(x.xt + offset + b + v * W) * load(gradient + b + v * W);
        for (int v = 1; v < NV; ++v) acc[0] += acc[v];
        grad_w[at] = sum(acc[0]);
      }
    }
}

}  // namespace
}  // namespace FANIN_LEVEL
}  // namespace fanin
