// The parts of a block that belong to one group.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace fanin {
namespace FANIN_LEVEL {
namespace {

template <class T>
constexpr bool SCALED = false;
template <>
constexpr bool SCALED<int8_t> = true;

template <class T>
struct Group {
  int K, G;
  T* values;              // [K, G]
  const uint16_t* index;  // [K], private [K, G], dense null
  float* bias;            // [G]
  const float* scale;     // [G], what stored numbers stand for; null where that is themselves
  const int32_t* labels;  // [G]

  Group(const Block& block, int64_t n) : K(block.fan_in), G(block.group_size) {
    const int64_t stride = block.connectivity == Connectivity::private_ ? (int64_t)K * G : K;
    values = (T*)block.values + n * K * G;
    index = block.indices ? block.indices + n * stride : nullptr;
    bias = block.bias + n * G;
    scale = SCALED<T> ? block.scales + n * G : nullptr;
    labels = block.labels + n * G;
  }

  // Sums over stored numbers of labels g, g + 1, … to sums over weights, with `more` added; and of rows, for label g.
  FANIN_INLINE vf finished(vf sum, int g, vf more) const {
    return SCALED<T> ? multiply_add(sum, load(scale + g), more) : sum + more;
  }
  FANIN_INLINE vf finished_rows(vf sum, int g, vf more) const {
    return SCALED<T> ? multiply_add(sum, broadcast(scale[g]), more) : sum + more;
  }

  // Stored numbers of labels g, g + 1, … to weights, or gradients of weights' sums to gradients of stored numbers' sums.
  FANIN_INLINE vf scaled(vf a, int g) const { return SCALED<T> ? a * load(scale + g) : a; }
};

// All weights in fp32.
template <class T>
void weights(const Group<T>& group, float* out) {
  for (int k = 0; k < group.K; ++k)
    for (int g = 0; g < group.G; g += W) {
      const int64_t at = (int64_t)k * group.G + g;
      store(out + at, group.scaled(load(group.values + at), g));
    }
}

}  // namespace
}  // namespace FANIN_LEVEL
}  // namespace fanin
