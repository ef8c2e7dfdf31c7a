// Losses of a tile of scores and their derivatives. The tile is [outer, inner]: rows × labels, or labels × rows when transposed.
#pragma once
#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace fanin {
namespace FANIN_LEVEL {
namespace {

// As if no score were a positive's: loss and scaled derivative of every real element. inner_mask is 1 for real, 0 for padding.
template <bool BCE>
FANIN_INLINE double negatives(const float* z, float* g, int outer, int inner, const float* inner_mask, float scale) {
  double total = 0;
  for (int o = 0; o < outer; ++o) {
    vf loss{};
    for (int i = 0; i < inner; i += W) {
      const int64_t at = (int64_t)o * inner + i;
      const vf score = load(z + at), mask = load(inner_mask + i);
      if constexpr (BCE) {
        const vf small = exp_negative(-absolute(score));
        const vf reciprocal = 1.0f / (1.0f + small);
        const vf sigmoid = score > 0.0f ? reciprocal : small * reciprocal;
        loss += mask * (maximum(score, vf{}) + log1p_unit(small));
        store(g + at, (mask * scale) * sigmoid);
      } else {
        const vf slack = mask * maximum(score + 1.0f, vf{});
        loss += slack * slack;
        store(g + at, (2.0f * scale) * slack);
      }
    }
    total += sum(loss);
  }
  return total;
}

// Turns one element into a positive's, whose loss is weight · (target · l₊ + (1 − target) · l₋); returns the change of the loss.
FANIN_INLINE double positive(Loss kind, float z, float* g, float scale, float weight, float target) {
  if (kind == Loss::bce) {
    *g = weight * (*g - target * scale);
    const double negative = weight == 1.0f ? 0.0 : (z > 0.0f ? (double)z : 0.0) + std::log1p(std::exp(-std::fabs((double)z)));
    return (weight - 1.0) * negative - (double)weight * target * z;
  }
  const double against = z > -1.0f ? 1.0 + z : 0.0, towards = z < 1.0f ? 1.0 - z : 0.0, rest = 1.0 - target;
  *g = (float)(2.0 * weight * (rest * against - target * towards)) * scale;
  return weight * (target * towards * towards + rest * against * against) - against * against;
}

FANIN_INLINE double loss_tile(Loss kind, const float* z, float* g, int outer, int inner, const float* inner_mask, float scale) {
  return kind == Loss::bce ? negatives<true>(z, g, outer, inner, inner_mask, scale)
                           : negatives<false>(z, g, outer, inner, inner_mask, scale);
}

}  // namespace
}  // namespace FANIN_LEVEL
}  // namespace fanin
