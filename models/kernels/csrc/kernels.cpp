// The kernels of one instruction set: each walks groups of labels once. Compiled once per level, see simd.h.
#include "kernels.h"

#include "backward.h"
#include "forward.h"
#include "gate.h"
#include "group.h"
#include "loss.h"
#include "screen.h"
#include "screen_pairs.h"
#include "screen_quads.h"
#include "select.h"
#include "simd.h"
#include "sketch.h"
#include "sketch_columns.h"
#include "update.h"

namespace fanin {
namespace FANIN_LEVEL {
namespace {

bool along_batch(const Block& block, const Batch& x) {
  return block.connectivity == Connectivity::private_ && x.rows >= PRIVATE_BATCH;
}

#if defined(FANIN_SCREENS)
// A single row looks at several groups of a screen at a time.
template <class T>
void topk_row(const Block& block, const Batch& x, const Rows8& rows8, int64_t begin, int64_t end, Gate* gate, Best& best,
              float* scratch) {
  const int G = block.group_size;
  int64_t open = begin - 1;  // the gate has come to this group
  for (int64_t n = begin; n < end;) {
    if (gate) {
      while (open < n) open = next_group(*gate, 1, open + 1, end, G);
      if ((n = open) == end) break;
    }
    const bool single = (gate && !gate->excluding) || end - n < TOGETHER;  // few labels allowed leave most groups unread
    uint32_t found = single ? candidate_groups<1>(block, rows8, n, best.threshold[0], scratch + G)
                            : candidate_groups<TOGETHER>(block, rows8, n, best.threshold[0], scratch + G);
    for (; found; found &= found - 1) {
      const int64_t at = n + __builtin_ctz(found);
      while (gate && open < at) open = next_group(*gate, 1, open + 1, end, G);
      if (gate && open > at) continue;
      const Group<T> group(block, at);
      forward_rows(block, group, x, scratch);
      select_rows(scratch, 1, G, group.labels, gate ? gate->open : nullptr, best);
    }
    n += single ? 1 : TOGETHER;
  }
}
#endif

template <class T>
void topk(const Block& block, const Batch& x, const Looks& looks, int64_t begin, int64_t end, Gate* gate, Best& best, float* scratch) {
  const int G = block.group_size;
  const bool columns = along_batch(block, x);
  const uint16_t* open = gate ? gate->open : nullptr;
  float *z = scratch, *wf = z + (int64_t)G * x.ldx, *limit = wf + (columns ? (int64_t)block.fan_in * G : 0);
  if (gate) start(*gate, x.rows, begin * G, G);
#if defined(FANIN_SCREENS)
  if (looks.rows8 && x.rows == 1) return topk_row<T>(block, x, *looks.rows8, begin, end, gate, best, scratch);
#endif
  for (int64_t n = begin; n < end; ++n) {
    if (gate && (n = next_group(*gate, x.rows, n, end, G)) == end) break;
    const Group<T> group(block, n);
#if defined(FANIN_AVX512VNNI)
    if (looks.columns8) {
      sketched_columns(block, group, n, x, *looks.columns8, open, best, scratch);
      continue;
    }
#endif
    if (looks.rows8 || looks.rows16) {
      uint8_t found[TOPK_ROWS];
      int count;
#if defined(FANIN_SCREENS)
      if (looks.rows8)
        count = candidate_rows(block, x, *looks.rows8, n, best, limit, found);
      else
#endif
        count = sketched_rows(block, *looks.rows16, x.rows, n, best, found);
      if (count == 0) continue;
      if (count <= x.rows / 4) {  // more are better off together
        for (int b = 0; b < x.rows; ++b) {
          if (!found[b]) continue;
          const float* in = x.x + (int64_t)b * block.width;
          forward_rows(block, group, Batch{1, 1, in, in}, z);
          Best one{best.k, best.scores + (int64_t)b * best.k, best.labels + (int64_t)b * best.k, best.count + b, best.threshold + b};
          select_rows(z, 1, G, group.labels, open ? open + (int64_t)b * (G / 16) : nullptr, one);
        }
        continue;
      }
    }
    if (columns) {
      forward_columns(group, x, wf, z);
      select_columns(z, x.rows, x.ldx, G, group.labels, open, limit, best);
    } else {
      forward_rows(block, group, x, z);
      select_rows(z, x.rows, G, group.labels, open, best);
    }
  }
}

template <class T>
void scores(const Block& block, const Batch& x, int64_t begin, int64_t end, float* out, float* scratch) {
  const int G = block.group_size;
  const bool columns = along_batch(block, x);
  float *z = scratch, *wf = scratch + (int64_t)G * x.ldx;
  for (int64_t n = begin; n < end; ++n) {
    const Group<T> group(block, n);
    if (columns)
      forward_columns(group, x, wf, z);
    else
      forward_rows(block, group, x, z);
    for (int b = 0; b < x.rows; ++b)
      for (int g = 0; g < G; ++g) {
        const float score = columns ? z[(int64_t)g * x.ldx + b] : z[(int64_t)b * G + g];
        out[((int64_t)b * block.groups + n) * G + g] = group.labels[g] < 0 ? -__builtin_inff() : score;
      }
  }
}

// First pair of the sorted positives whose slot is at least `slot`.
int64_t first_positive(const Step& step, int64_t slot) {
  int64_t low = 0, high = step.positives;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (step.slots[middle] < slot)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

template <class T>
double train(const Block& block, const Batch& x, const Step& step, int64_t begin, int64_t end, float* grad_xt, float* scratch) {
  const int K = block.fan_in, G = block.group_size, B = x.rows;
  const bool columns = block.connectivity == Connectivity::private_;
  const int64_t tile = (int64_t)G * x.ldx;
  float *z = scratch, *g = z + tile, *gt = g + tile, *mask = gt + tile;       // mask: G (labels) or ldx (rows) long
  float *strip = mask + (x.ldx > G ? x.ldx : G), *grad_bias = strip + 2 * STRIP * G;
  float *wf = grad_bias + G, *grad_w = wf + (int64_t)K * G;  // private only
  const float scale = 1.0f / B;
  double loss = 0;
  int64_t at = first_positive(step, begin * G);
  if (columns)
    for (int b = 0; b < x.ldx; ++b) mask[b] = b < B;
  for (int64_t n = begin; n < end; ++n) {
    const Group<T> group(block, n);
    if (columns) {
      forward_columns(group, x, wf, z);
      for (int l = 0; l < G; ++l) {
        if (group.labels[l] >= 0)
          loss += loss_tile(step.loss, z + (int64_t)l * x.ldx, gt + (int64_t)l * x.ldx, 1, x.ldx, mask, scale);
        else
          for (int b = 0; b < x.ldx; ++b) gt[(int64_t)l * x.ldx + b] = 0;
      }
    } else {
      for (int l = 0; l < G; ++l) mask[l] = group.labels[l] >= 0;
      forward_rows(block, group, x, z);
      loss += loss_tile(step.loss, z, g, B, G, mask, scale);
    }
    for (; at < step.positives && step.slots[at] < (n + 1) * G; ++at) {
      const int label = (int)(step.slots[at] - n * G), row = step.rows[at];
      const int64_t element = columns ? (int64_t)label * x.ldx + row : (int64_t)row * G + label;
      loss += positive(step.loss, z[element], (columns ? gt : g) + element, scale, step.weights[at], 1.0f - step.smoothing);
    }
    const Random random(splitmix(step.key + (uint64_t)n));
    float *first = step.moment[0] ? step.moment[0] + n * K * G : nullptr, *second = step.moment[1] ? step.moment[1] + n * K * G : nullptr;
    if (columns) {
      backward_private(group, x, gt, grad_xt, grad_w, wf);
      update(group.values, grad_w, first, second, K * G, step, step.decay, random, 0);
      for (int l = 0; l < G; ++l) {
        vf total{};
        for (int b = 0; b < x.ldx; b += W) total += load(gt + (int64_t)l * x.ldx + b);
        grad_bias[l] = sum(total);
      }
    } else {
      transpose_gradient(g, gt, B, G, x.ldx);
      backward_strips(group, x, g, gt, grad_xt, true, strip, [&](int k, int rows, const float* grad) {
        const int64_t from = (int64_t)k * G;
        update(group.values + from, grad, first ? first + from : nullptr, second ? second + from : nullptr, rows * G, step, step.decay,
               random, (uint32_t)from);
      });
      for (int l = 0; l < G; l += W) {
        vf total{};
        for (int b = 0; b < B; ++b) total += load(g + (int64_t)b * G + l);
        store(grad_bias + l, total);
      }
    }
    update(group.bias, grad_bias, step.bias_moment[0] ? step.bias_moment[0] + n * G : nullptr,
           step.bias_moment[1] ? step.bias_moment[1] + n * G : nullptr, G, step, 0.0f, random, 0);
  }
  return loss;
}

template <class T>
void backward(const Block& block, const Batch& x, const float* grad, int64_t begin, int64_t end, float* grad_xt, float* grad_values,
              float* scratch) {
  const int K = block.fan_in, G = block.group_size, B = x.rows;
  const int64_t tile = (int64_t)G * x.ldx;
  float *g = scratch, *gt = g + tile, *strip = gt + tile, *wf = strip + 2 * STRIP * G;
  for (int64_t n = begin; n < end; ++n) {
    const Group<T> group(block, n);
    for (int b = 0; b < B; ++b)
      for (int i = 0; i < G; i += W)
        store(g + (int64_t)b * G + i, group.scaled(load(grad + ((int64_t)b * block.groups + n) * G + i), i));
    transpose_gradient(g, gt, B, G, x.ldx);
    float* out = grad_values ? grad_values + n * K * G : nullptr;
    if (block.connectivity == Connectivity::private_)
      backward_private(group, x, gt, grad_xt, out, wf);
    else
      backward_strips(group, x, g, gt, grad_xt, out != nullptr, strip, [&](int k, int rows, const float* part) {
        if (out) std::memcpy(out + (int64_t)k * G, part, sizeof(float) * rows * G);
      });
  }
}

// Calls work with a null pointer to the type of the block's stored numbers.
template <class Work>
auto of_type(const Block& block, Work work) {
  switch (block.dtype) {
    case DType::fp32: return work((float*)nullptr);
    case DType::fp16: return work((fp16*)nullptr);
    case DType::bf16: return work((bf16*)nullptr);
    case DType::int8: return work((int8_t*)nullptr);
  }
  __builtin_unreachable();
}

void topk_any(const Block& block, const Batch& x, const Looks& looks, int64_t begin, int64_t end, Gate* gate, Best& best,
              float* scratch) {
  of_type(block, [&]<class T>(T*) { topk<T>(block, x, looks, begin, end, gate, best, scratch); });
}

#if defined(FANIN_SCREENS)
constexpr int SCREEN_LANES = LANES;
bool screen_any(const Block& block, int64_t begin, int64_t end, const Screen& out, float* scratch) {
  return of_type(block, [&]<class T>(T*) { return make_screen<T>(block, begin, end, out, scratch); });
}
#else
constexpr int SCREEN_LANES = 0;
constexpr bool (*screen_any)(const Block&, int64_t, int64_t, const Screen&, float*) = nullptr;
#endif

bool sketch_any(const Block& block, int64_t begin, int64_t end, const Sketch& out, float* scratch) {
  return of_type(block, [&]<class T>(T*) { return make_sketch<T>(block, begin, end, out, scratch); });
}

void scores_any(const Block& block, const Batch& x, int64_t begin, int64_t end, float* out, float* scratch) {
  of_type(block, [&]<class T>(T*) { scores<T>(block, x, begin, end, out, scratch); });
}

double train_any(const Block& block, const Batch& x, const Step& step, int64_t begin, int64_t end, float* grad_xt, float* scratch) {
  if (block.dtype == DType::bf16) return train<bf16>(block, x, step, begin, end, grad_xt, scratch);
  return train<float>(block, x, step, begin, end, grad_xt, scratch);
}

void backward_any(const Block& block, const Batch& x, const float* grad, int64_t begin, int64_t end, float* grad_xt, float* grad_values,
                  float* scratch) {
  of_type(block, [&]<class T>(T*) { backward<T>(block, x, grad, begin, end, grad_xt, grad_values, scratch); });
}

#if defined(FANIN_AVX512VNNI)
constexpr bool COLUMNS8 = true;
constexpr int SKETCHED_EIGHTHS = 7;  // with 6, one of 16 rows often leaves a label's score to be computed, for all of them
#else
constexpr bool COLUMNS8 = false;
constexpr int SKETCHED_EIGHTHS = 6;
#endif

}  // namespace
}  // namespace FANIN_LEVEL

#define FANIN_CAT_(a, b) a##b
#define FANIN_CAT(a, b) FANIN_CAT_(a, b)
#define FANIN_STRING_(a) #a
#define FANIN_STRING(a) FANIN_STRING_(a)

const Kernels FANIN_CAT(kernels_, FANIN_LEVEL) = {FANIN_STRING(FANIN_LEVEL), FANIN_LEVEL::SCREEN_LANES, FANIN_LEVEL::COLUMNS8, FANIN_LEVEL::SKETCHED_EIGHTHS,
                                                  FANIN_LEVEL::topk_any, FANIN_LEVEL::screen_any, FANIN_LEVEL::sketch_any,
                                                  FANIN_LEVEL::scores_any, FANIN_LEVEL::train_any, FANIN_LEVEL::backward_any};

}  // namespace fanin
