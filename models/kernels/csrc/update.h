// The optimizer on a run of weights, fp32 or bf16 with stochastic rounding. models/kernels/step.py defines the random numbers.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace fanin {
namespace FANIN_LEVEL {
namespace {

inline uint64_t splitmix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

struct Random {
  vu k0, k1;
  explicit Random(uint64_t mixed) : k0(broadcast((uint32_t)mixed)), k1(broadcast((uint32_t)(mixed >> 32))) {}
  // 16 random bits for the elements first, first + 1, … of the group
  FANIN_INLINE vu bits(uint32_t first) const {
    vu x;
    for (int i = 0; i < W; ++i) x[i] = i;
    x = (x + first + k0) ^ k1;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x >> 16;
  }
};

FANIN_INLINE void store_rounded(float* p, vf v, const Random&, uint32_t) { store(p, v); }

FANIN_INLINE void store_rounded(bf16* p, vf v, const Random& random, uint32_t element) {
  const vu raw = (vu)v;
  store_upper(p, (raw & 0x7F800000u) == 0x7F800000u ? raw : raw + random.bits(element));
}

// n weights (a multiple of W) from `element` of their group on; `first` and `second` are their moments or null.
template <class T>
FANIN_INLINE void update(T* w, const float* grad, float* first, float* second, int n, const Step& step, float decay,
                         const Random& random, uint32_t element) {
  for (int i = 0; i < n; i += W) {
    vf value = load(w + i), g = load(grad + i);
    value = value - decay * value;
    if (step.update == Update::sgd) {
      value = value - step.lr * g;
    } else if (step.update == Update::momentum) {
      const vf m = step.beta1 * load(first + i) + g;
      store(first + i, m);
      value = value - step.lr * m;
    } else {
      const vf m = step.beta1 * load(first + i) + step.rest1 * g;
      const vf v = step.beta2 * load(second + i) + step.rest2 * (g * g);
      store(first + i, m);
      store(second + i, v);
      value = value - step.lr * (m * step.correction1) / (square_root(v * step.correction2) + step.eps);
    }
    store_rounded(w + i, value, random, element + i);
  }
}

}  // namespace
}  // namespace FANIN_LEVEL
}  // namespace fanin
