#include "ops.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>

#include "threads.h"

namespace fanin {
namespace {

constexpr int CHUNKS = 16;         // top-k work items per thread, so that a slow core holds nobody up
constexpr int64_t MIN_GROUPS = 8;  // fewer are not worth another thread

const Kernels* active = nullptr;

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> list;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi")) list.push_back(&kernels_avx512vnni);
    list.push_back(&kernels_avx512);
  }
  if (avx2) list.push_back(&kernels_avx2);
#elif defined(__aarch64__)
  list.push_back(&kernels_neon);
#endif
  list.push_back(&kernels_scalar);
  return list;
}

const Kernels& kernels() {
  if (!active) active = available().front();
  return *active;
}

class Floats {  // 64-byte aligned, not initialised
 public:
  explicit Floats(int64_t count) : data_((float*)std::aligned_alloc(64, (std::max<int64_t>(count, 1) * 4 + 63) / 64 * 64)) {
    if (!data_) throw std::bad_alloc();
  }
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
};

int padded(int rows) { return (rows + 15) / 16 * 16; }

int workers_for(int64_t groups) { return (int)std::clamp<int64_t>(groups / MIN_GROUPS, 1, threads()); }

void transpose(const float* from, int rows, int columns, float* to, int ld) {  // [rows, columns] → [columns, ld], zero-padded
  for (int c0 = 0; c0 < columns; c0 += 16) {
    const int c1 = std::min(c0 + 16, columns);
    for (int r = 0; r < rows; ++r)
      for (int c = c0; c < c1; ++c) to[(int64_t)c * ld + r] = from[(int64_t)r * columns + c];
    for (int c = c0; c < c1; ++c) std::fill(to + (int64_t)c * ld + rows, to + (int64_t)(c + 1) * ld, 0.0f);
  }
}

// grad_x [B, D] = the sum over threads of grad_xt [D, ldx], in thread order.
void reduce_transposed(const std::vector<Floats>& parts, int rows, int width, int ldx, float* grad_x) {
  for (int d = 0; d < width; ++d)
    for (int b = 0; b < rows; ++b) {
      float total = 0;
      for (const auto& part : parts) total += part.get()[(int64_t)d * ldx + b];
      grad_x[(int64_t)b * width + d] = total;
    }
}

bool screened(const Block& block) {
  return kernels().screen_lanes && block.group_size % kernels().screen_lanes == 0;
}

// The rows of a batch in 8 bits; none when no block has a screen or a number is too large.
class Bytes {
 public:
  Bytes(const std::vector<Block>& blocks, const Batch& batch) {
    if (std::none_of(blocks.begin(), blocks.end(), [](const Block& block) { return block.screen.coarse; })) return;
    const int width = blocks.front().width, rows = batch.rows, ldx = batch.ldx;
    for (int b = 0; b < rows; ++b) {
      float most = 0;
      for (int d = 0; d < width; ++d) most = std::max(most, std::abs(batch.x[(int64_t)b * width + d]));
      if (!(most < LARGEST_SCREENED)) return;
      inverse_.push_back(1 / std::max(most / 127, SMALLEST_UNIT));
    }
    x_.resize((size_t)width * ldx);
    for (int b = 0; b < rows; ++b)
      for (int d = 0; d < width; ++d)
        x_[(size_t)d * ldx + b] = (int8_t)std::lrint(batch.x[(int64_t)b * width + d] * inverse_[b]);
    if (ldx == 1)
      for (const int8_t u : x_)
        figures_.push_back((uint64_t)(u < 0) << 56 | (uint64_t)(uint8_t)u << 40 | (uint64_t)(uint8_t)u << 24 | (uint64_t)(u * u));
    inverse_.resize(ldx, 1.0f);
    rows_ = {x_.data(), figures_.data(), inverse_.data()};
  }
  const Rows8* of(const Block& block) const {  // a screen may be another instruction set's
    return rows_.x && block.screen.coarse && screened(block) ? &rows_ : nullptr;
  }

 private:
  std::vector<int8_t> x_;
  std::vector<uint64_t> figures_;
  std::vector<float> inverse_;
  Rows8 rows_{};
};

// The rows of a batch for a block with a sketch: in 8 bits with the batch along the vectors, or in 16. None when no row will ask for
// them or a number is too large.
class Sketched {
 public:
  Sketched(const Block& block, const Batch& batch) {
    const bool columns = kernels().columns8 && batch.rows > 1;
    if (!block.sketch.values || (!columns && batch.rows >= PRIVATE_BATCH)) return;
    const int width = block.width, kept = block.sketch.kept;  // more than half
    unit_.assign(batch.ldx, 1.0f);
    for (auto& norms : norms_) norms.assign(batch.ldx, 0.0f);
    std::vector<double> squares(width);
    for (int b = 0; b < batch.rows; ++b) {
      const float* x = batch.x + (int64_t)b * width;
      std::transform(x, x + width, squares.begin(), [](double a) { return a * a; });
      std::partial_sort(squares.begin(), squares.begin() + kept, squares.end(), std::greater<>());
      for (const bool rest : {false, true}) {
        const int count = rest ? block.fan_in - kept : kept;
        const double norm = std::sqrt(std::accumulate(squares.begin(), squares.begin() + count, 0.0));
        if (!(norm < LARGEST_SCREENED)) return;
        norms_[rest][b] = (float)(norm * (1 + 0x1p-12)) + SMALLEST_UNIT;
      }
      unit_[b] = std::max((float)std::sqrt(squares[0]) / (columns ? 126.99f : 32766), SMALLEST_UNIT);
    }
    if (columns) {
      bytes_.resize((size_t)width * batch.ldx);
      for (int b = 0; b < batch.ldx; ++b)
        for (int d = 0; d < width; ++d) {
          const float x = b < batch.rows ? batch.x[(int64_t)b * width + d] : 0.0f;
          bytes_[((size_t)(b / 16) * width + d) * 16 + b % 16] = (uint8_t)(std::lrint(x / unit_[b]) + 128);
        }
      columns8_ = {bytes_.data(), unit_.data(), {norms_[0].data(), norms_[1].data()}};
    } else {
      for (int b = 0; b < batch.rows; ++b) {
        for (int d = 0; d < width; ++d) words_.push_back((int16_t)std::lrint(batch.x[(int64_t)b * width + d] / unit_[b]));
        words_.push_back(0);
      }
      rows16_ = {words_.data(), unit_.data(), {norms_[0].data(), norms_[1].data()}};
    }
  }
  const Rows16* rows16() const { return rows16_.x ? &rows16_ : nullptr; }
  const Columns8* columns8() const { return columns8_.x ? &columns8_ : nullptr; }

 private:
  std::vector<int16_t> words_;
  std::vector<uint8_t> bytes_;
  std::vector<float> unit_, norms_[2];
  Rows16 rows16_{};
  Columns8 columns8_{};
};

// Contiguous slices, one per thread: the same sums in the same order for the same number of threads.
template <class Work>
void by_slice(int64_t groups, int workers, Work work) {
  parallel(workers, [&](int t) { work(t, groups * t / workers, groups * (t + 1) / workers); });
}

// A long preparation in parts of some milliseconds, between which other calls get their turn.
template <class Work>
void by_part(const Block& block, Work work) {
  const int64_t part = std::max(1, (1 << 22) / (block.fan_in * block.group_size));
  for (int64_t from = 0; from < block.groups; from += part) {
    const int64_t count = std::min(part, block.groups - from);
    by_slice(count, workers_for(count), [&](int, int64_t begin, int64_t end) { work(from + begin, from + end); });
  }
}

}  // namespace

std::vector<const char*> levels() {
  std::vector<const char*> names;
  for (const auto* kernels : available()) names.push_back(kernels->name);
  return names;
}

const char* level() { return kernels().name; }

bool use_level(const char* name) {
  for (const auto* kernels : available())
    if (std::strcmp(kernels->name, name) == 0) {
      active = kernels;
      return true;
    }
  return false;
}

void topk(const std::vector<Block>& blocks, const float* x, int rows, int k, const std::vector<Subset>& allowed, float* scores,
          int32_t* labels) {
  const Kernels& run = kernels();
  const int width = blocks.front().width;
  int64_t groups = 0, scratch = 0;
  int largest = 0;  // group
  for (const auto& block : blocks) {
    groups += block.groups;
    largest = std::max(largest, block.group_size);
    scratch = std::max(scratch, scratch_floats(block, padded(std::min(rows, TOPK_ROWS))));
  }
  const int workers = workers_for(groups);
  std::vector<Floats> scratches;
  for (int t = 0; t < workers; ++t) scratches.emplace_back(scratch);
  const int64_t chunk = std::max<int64_t>(1, groups / ((int64_t)workers * CHUNKS));
  Floats xt((int64_t)width * padded(std::min(rows, TOPK_ROWS)));
  for (int row = 0; row < rows; row += TOPK_ROWS) {
    const int part = std::min(TOPK_ROWS, rows - row);
    Batch batch{part, part == 1 ? 1 : padded(part), x + (int64_t)row * width, x + (int64_t)row * width};
    if (part > 1) {
      transpose(batch.x, part, width, xt.get(), batch.ldx);
      batch.xt = xt.get();
    }
    const Bytes bytes(blocks, batch);
    std::vector<Sketched> sketches;
    for (const auto& block : blocks) sketches.emplace_back(block, batch);
    std::vector<float> best_scores((size_t)workers * part * k), thresholds((size_t)workers * batch.ldx);
    std::vector<int32_t> best_labels((size_t)workers * part * k);
    std::vector<int> counts((size_t)workers * part);
    const bool gated = !allowed.empty();
    std::vector<int64_t> gate_next(gated ? (size_t)workers * part : 0);
    std::vector<uint16_t> gate_open(gated ? (size_t)workers * part * (largest / 16) : 0);
    std::atomic<int64_t> next{0};
    parallel(workers, [&](int t) {
      Best best{k, &best_scores[(size_t)t * part * k], &best_labels[(size_t)t * part * k], &counts[(size_t)t * part],
                &thresholds[(size_t)t * batch.ldx]};
      std::fill_n(best.threshold, part, -std::numeric_limits<float>::infinity());
      std::fill_n(best.threshold + part, batch.ldx - part, std::numeric_limits<float>::infinity());
      for (int64_t begin; (begin = next.fetch_add(chunk)) < groups;) {
        int64_t end = std::min(begin + chunk, groups), offset = 0, place = 0;
        for (size_t i = 0; i < blocks.size(); ++i) {
          const Block& block = blocks[i];
          const int64_t from = std::max<int64_t>(begin - offset, 0), to = std::min(end - offset, block.groups);
          Gate gate{};
          gate.rows = gated ? &allowed[row] : nullptr, gate.first = place;
          gate.next = gate_next.data() + (size_t)t * part, gate.open = gate_open.data() + (size_t)t * part * (largest / 16);
          if (from < to)
            run.topk(block, batch, {bytes.of(block), sketches[i].rows16(), sketches[i].columns8()}, from, to,
                     gated ? &gate : nullptr, best, scratches[t].get());
          offset += block.groups;
          place += block.groups * block.group_size;
        }
      }
    });
    std::vector<std::pair<float, int32_t>> merged;
    for (int b = 0; b < part; ++b) {
      merged.clear();
      for (int t = 0; t < workers; ++t)
        for (int i = 0; i < counts[(size_t)t * part + b]; ++i) {
          const size_t at = ((size_t)t * part + b) * k + i;
          merged.emplace_back(-best_scores[at], best_labels[at]);
        }
      const int found = std::min<int>(k, merged.size());
      std::partial_sort(merged.begin(), merged.begin() + found, merged.end());
      for (int i = 0; i < k; ++i) {
        const int64_t at = (int64_t)(row + b) * k + i;
        scores[at] = i < found ? -merged[i].first : -std::numeric_limits<float>::infinity();
        labels[at] = i < found ? merged[i].second : -1;
      }
    }
  }
}

bool screen(const Block& block, const Screen& out) {
  if (!screened(block) || block.connectivity != Connectivity::shared || block.fan_in > MAX_SCREENED_FAN_IN) return false;
  std::atomic<bool> fits{true};
  by_part(block, [&](int64_t begin, int64_t end) {
    if (!fits) return;
    Floats scratch((int64_t)(block.fan_in + 4) * block.group_size);
    if (!kernels().screen(block, begin, end, out, scratch.get())) fits = false;
  });
  return fits;
}

int sketched(int fan_in) { return (kernels().sketched_eighths * fan_in / 8 + 1) / 2 * 2; }

bool sketch(const Block& block, const Sketch& out) {
  if (block.connectivity != Connectivity::private_ || block.fan_in < MIN_SKETCHED_FAN_IN || block.fan_in > MAX_SKETCHED_FAN_IN ||
      block.width > MAX_SKETCHED_WIDTH)
    return false;
  std::atomic<bool> fits{true};
  by_part(block, [&](int64_t begin, int64_t end) {
    if (!fits) return;
    Floats scratch((int64_t)block.fan_in * block.group_size);
    if (!kernels().sketch(block, begin, end, out, scratch.get())) fits = false;
  });
  return fits;
}

void scores(const Block& block, const float* x, int rows, float* out) {
  const int ldx = padded(rows);
  Floats xt((int64_t)block.width * ldx);
  transpose(x, rows, block.width, xt.get(), ldx);
  const Batch batch{rows, ldx, x, xt.get()};
  by_slice(block.groups, workers_for(block.groups), [&](int, int64_t begin, int64_t end) {
    Floats scratch(scratch_floats(block, ldx));
    kernels().scores(block, batch, begin, end, out, scratch.get());
  });
}

double train_step(const Block& block, const float* x, int rows, const Step& step, float* grad_x) {
  const int ldx = padded(rows), workers = workers_for(block.groups);
  Floats xt((int64_t)block.width * ldx);
  transpose(x, rows, block.width, xt.get(), ldx);
  const Batch batch{rows, ldx, x, xt.get()};
  std::vector<Floats> grad_xt;
  for (int t = 0; t < workers; ++t) grad_xt.emplace_back((int64_t)block.width * ldx);
  std::vector<double> loss(workers);
  by_slice(block.groups, workers, [&](int t, int64_t begin, int64_t end) {
    Floats scratch(scratch_floats(block, ldx));
    std::fill_n(grad_xt[t].get(), (int64_t)block.width * ldx, 0.0f);
    loss[t] = kernels().train(block, batch, step, begin, end, grad_xt[t].get(), scratch.get());
  });
  reduce_transposed(grad_xt, rows, block.width, ldx, grad_x);
  double total = 0;
  for (const double part : loss) total += part;
  return rows > 0 ? total / rows : 0.0;
}

void grad_input(const Block& block, const float* grad, int rows, float* grad_x) {
  const int ldx = padded(rows), workers = workers_for(block.groups);
  const Batch batch{rows, ldx, nullptr, nullptr};
  std::vector<Floats> grad_xt;
  for (int t = 0; t < workers; ++t) grad_xt.emplace_back((int64_t)block.width * ldx);
  by_slice(block.groups, workers, [&](int t, int64_t begin, int64_t end) {
    Floats scratch(scratch_floats(block, ldx));
    std::fill_n(grad_xt[t].get(), (int64_t)block.width * ldx, 0.0f);
    kernels().backward(block, batch, grad, begin, end, grad_xt[t].get(), nullptr, scratch.get());
  });
  reduce_transposed(grad_xt, rows, block.width, ldx, grad_x);
}

void grad_values(const Block& block, const float* x, const float* grad, int rows, float* out) {
  const int ldx = padded(rows);
  Floats xt((int64_t)block.width * ldx);
  transpose(x, rows, block.width, xt.get(), ldx);
  const Batch batch{rows, ldx, x, xt.get()};
  by_slice(block.groups, workers_for(block.groups), [&](int, int64_t begin, int64_t end) {
    Floats scratch(scratch_floats(block, ldx));
    kernels().backward(block, batch, grad, begin, end, nullptr, out, scratch.get());
  });
}

}  // namespace fanin
