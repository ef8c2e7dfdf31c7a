// sketch.h's first look at private labels for several rows, where one instruction multiplies four inputs' bytes and adds them up:
// inputs in 8 bits, and the batch lies along the vectors. Only labels that may be among a row's k best have scores computed.
//
// In units of a row, inputs are v + d with whole |v| ≤ 127 and |d| ≤ 1/2; the bounds are sketch.h's, with Σ|q| each label's own.
#pragma once
#include "forward.h"
#include "kernels.h"
#include "select.h"
#include "simd.h"
#include "sketch.h"

#if defined(FANIN_AVX512VNNI)
namespace fanin {
namespace FANIN_LEVEL {
namespace {

// A group's labels, as the look needs them; all but the weights are of [G].
struct Columns {
  uint32_t* weights;  // [⌈K'/4⌉, G]: q of four connections; zero beyond the last
  int32_t* start;     // Σ|q| / 2 − 128 · Σ q, as bytes of inputs are v + 128
  float* rest;        // ‖w''‖
  float* bias;        // and what it may be off by
};

void prepare_columns(const Block& block, int64_t n, const Columns& out) {
  const int G = block.group_size, kept = block.sketch.kept;
  const uint8_t* values = (const uint8_t*)(block.sketch.values + n * kept * G);
  const vu ones = broadcast(0x01010101u);
  for (int g = 0; g < G; g += W) {
    vi size{}, total{};
    for (int k = 0; k < kept; k += 4) {
      vu four = widened(values + (int64_t)k * G + 2 * g);
      if (k + 2 < kept) four |= widened(values + (int64_t)(k + 2) * G + 2 * g) << 16;
      std::memcpy(out.weights + (int64_t)(k / 4) * G + g, &four, sizeof four);
      size = add_quad_products(size, absolute_bytes(four), ones), total = add_quad_products(total, ones, four);
    }
    const vi start = ((size + 1) >> 1) - 128 * total;
    std::memcpy(out.start + g, &start, sizeof start);
    const vf bias = load(block.bias + n * G + g);
    store(out.bias + g, bias + absolute(bias) * 0x1p-20f), store(out.rest + g, load((const bf16*)block.sketch.rest + n * G + g));
  }
}

static_assert(MAX_SKETCHED_FAN_IN <= LONG_SUM);  // or forward_columns would add partial sums

// The label's scores for the 16 rows from b on, as forward_columns has them.
template <class T>
vf exact_column(const Group<T>& group, int g, const Batch& x, int b) {
  vf sum{};
  for (int k = 0; k < group.K; ++k) {
    const int64_t at = (int64_t)k * group.G + g;
    sum += broadcast(decoded(group.values[at])) * load(x.xt + (int64_t)group.index[at] * x.ldx + b);
  }
  return group.finished_rows(sum, g, broadcast(group.bias[g]));
}

// What the labels of group n have for the k best of each row; as select_columns, but for what need not be computed.
// `scratch` holds ⌈K'/4⌉ · G + 3 · G floats.
template <class T>
void sketched_columns(const Block& block, const Group<T>& group, int64_t n, const Batch& x, const Columns8& x8, const uint16_t* open,
                      Best& best, float* scratch) {
  constexpr int LABELS = 8;  // side by side
  const int G = block.group_size, kept = block.sketch.kept;
  uint32_t* weights = (uint32_t*)scratch;
  float* rest = scratch + (int64_t)(kept + 3) / 4 * G;
  const Columns columns{weights, (int32_t*)(rest + G), rest, rest + 2 * G};
  prefetch_sketch(block, n);
  prepare_columns(block, n, columns);
  const uint16_t* offsets = block.sketch.offsets + n * kept * G;
  for (int b = 0; b < x.ldx; b += 16) {
    const uint8_t* in = x8.x + (int64_t)b * block.width;
    const vf unit = load(x8.unit + b) * block.sketch.unit[n], norm = load(x8.norms[1] + b);
    const vf error = load(x8.norms[0] + b) * block.sketch.error[n] + 1e-36f;  // 1e-36: numbers too small for fp32 to round by size
    uint32_t live = 0;  // rows that may give some label of the group
    for (int i = 0; i < 16 && b + i < x.rows; ++i) {
      uint32_t some = open == nullptr;
      for (int j = 0; open && j < G / 16; ++j) some |= open[(int64_t)(b + i) * (G / 16) + j];
      live |= (uint32_t)(some != 0) << i;
    }
    const auto limit = [&] {
      const vf threshold = load(best.threshold + b);
      return threshold - (absolute(threshold) * 0x1p-20f + error);
    };
    vf least = limit();
    for (int g = 0; g < G; g += LABELS) {
      vi sum[LABELS];
      for (int l = 0; l < LABELS; ++l) sum[l] = broadcast(columns.start[g + l]);
      for (int k = 0; k < kept; k += 4) {
        const uint16_t* first = offsets + (int64_t)k * G + 2 * g;
        const uint16_t* second = k + 2 < kept ? first + 2 * G : first;  // or weights are zero
        for (int l = 0; l < LABELS; ++l) {
          const auto input = [&](uint16_t offset) { return in + 8 * (int64_t)offset; };
          const vu four = interleaved(input(first[2 * l]), input(first[2 * l + 1]), input(second[2 * l]), input(second[2 * l + 1]));
          sum[l] = add_quad_products(sum[l], four, broadcast(weights[(int64_t)(k / 4) * G + g + l]));
        }
      }
      for (int l = 0; l < LABELS; ++l) {
        const vf most = __builtin_convertvector(sum[l], vf) * unit + (norm * rest[g + l] + columns.bias[g + l]);
        uint32_t mask = greater(most, least) & live;
        if (!mask || group.labels[g + l] < 0) continue;
        const vf score = exact_column(group, g + l, x, b);
        for (mask &= greater(score, load(best.threshold + b)); mask; mask &= mask - 1) {
          const int at = __builtin_ctz(mask), row = b + at;
          if (open && !(open[((int64_t)row * G + g + l) / 16] >> ((g + l) % 16) & 1)) continue;
          push(best, row, score[at], group.labels[g + l]);
        }
        least = limit();
      }
    }
  }
}

}  // namespace
}  // namespace FANIN_LEVEL
}  // namespace fanin
#endif
