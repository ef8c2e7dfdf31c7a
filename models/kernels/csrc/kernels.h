// What the drivers (ops.cpp) and the kernels of each instruction set share: plain structs and a table of functions.
// Letters as everywhere: B batch, D width, K fan-in, G group size, N groups. A batch is padded to `ldx` columns when transposed.
#pragma once
#include <cstdint>

namespace fanin {

enum class Connectivity { dense, shared, private_ };
enum class DType { fp32, fp16, bf16, int8 };
enum class Loss { bce, squared_hinge };
enum class Update { sgd, momentum, adam };

// A shared block's weights in 4 + 2 bits, see screen.h. Pairs of inputs lie side by side, so a byte has numbers of inputs k, k + 2, …,
// the first in its low bits.
struct Screen {
  uint8_t* coarse;  // [N, 2 · ⌈K/8⌉, G, 2]; null where a block has none
  uint8_t* fine;    // [N, ⌈K/8⌉, G, 2]
  float* scale[6];  // [N] each: 1 / unit of the group's weights; its greatest bias; for the first look and for the second, what sums
                    // may be short of, whatever the row, and what besides for each unit of ‖u‖, the greatest ‖e‖
};

constexpr float LARGEST_SCREENED = 1e18f, SMALLEST_UNIT = 1e-30f;
constexpr int TOPK_ROWS = 48;  // at most in a call of topk; larger batches stream the weights again
constexpr int MAX_SCREENED_FAN_IN = 128;  // units are too coarse beyond

// The heaviest connections of a private block's labels, see sketch.h.
struct Sketch {
  int kept;           // K', connections of a label, an even number
  int8_t* values;     // [N, K' / 2, G, 2], q; null where a block has none
  uint16_t* offsets;  // the same, 2 · input
  uint16_t* rest;     // [N, G], bf16, the norm of the weights not kept
  float* unit;        // [N], of the group's weights
  float* error;       // [N], the greatest ‖e‖ of the group
};

constexpr int MIN_SKETCHED_FAN_IN = 16, MAX_SKETCHED_FAN_IN = 256, MAX_SKETCHED_WIDTH = 32768;

struct Block {
  Connectivity connectivity;
  DType dtype;
  int64_t groups;
  int width, fan_in, group_size;
  void* values;             // [N, K, G]
  const uint16_t* indices;  // shared [N, K], private [N, K, G], dense null
  float* bias;              // [N, G]
  const float* scales;      // [N, G], of int8 values; else null
  const int32_t* labels;    // [N, G], −1 = padding
  Screen screen;
  Sketch sketch;
};

struct Batch {
  int rows;         // B
  int ldx;          // ≥ B; a multiple of 16 where a kernel runs along the batch
  const float* x;   // [B, D]
  const float* xt;  // [D, ldx], zero beyond B
};

// The rows of a batch in 8 bits, for a block with a screen.
struct Rows8 {
  const int8_t* x;          // [D, ldx], u
  const uint64_t* figures;  // [D], a single row's: u² in bytes 0 and 1, u in 3 and in 5, in 7 whether it is below zero
  const float* inverse;     // [ldx], 1 / unit
};

// The rows of a batch in 16 bits, for a block with a sketch.
struct Rows16 {
  const int16_t* x;       // [B, D + 1], v; the last of a row is only there to be read
  const float* unit;      // [B]
  const float* norms[2];  // [B] of the row's largest inputs: as many as the block's sketch has of a label, and as it lacks
};

// The rows of a batch in 8 bits, for a block with a sketch, where the batch lies along the vectors. All but the bytes are of [ldx].
struct Columns8 {
  const uint8_t* x;       // [ldx / 16, D, 16], v + 128
  const float* unit;
  const float* norms[2];  // of the row's largest inputs: as many as the block's sketch has of a label, and as it lacks
};

// What a top-k's first looks read of a batch; null where there are none.
struct Looks {
  const Rows8* rows8;
  const Rows16* rows16;
  const Columns8* columns8;
};

// The k best of each row so far: one min-heap per row. threshold[b] is what a score must exceed; +inf in padding rows.
struct Best {
  int k;
  float* scores;     // [B, k]
  int32_t* labels;   // [B, k]
  int* count;        // [B]
  float* threshold;  // [ldx]
};

// The labels that a row may give: those in these places, ascending, or with `excluded` all others. A place is a slot counted
// through all blocks.
struct Subset {
  const int64_t* places;
  int64_t count;
  bool excluded;
};

// One thread's walk past the labels that the rows of a batch may give. It goes forward only.
struct Gate {
  const Subset* rows;  // [B]
  int64_t first;       // place of the block's first slot
  int64_t* next;       // [B]: places listed before it are behind
  uint16_t* open;      // [B, G / 16]: a bit for each label of the group
  int64_t nearest;     // of all places ahead, in any list
  bool excluding;      // some row may give all labels but those listed
  bool touched;        // some bits are those of a group with listed places
};

struct Step {
  Loss loss;
  Update update;
  float lr, beta1, beta2, eps, decay;  // decay = lr · weight_decay
  float rest1, rest2;                  // 1 − β, from doubles: 1 − 0.999 in fp32 is off by 5e-5
  float correction1, correction2;      // 1 / (1 − βᵗ)
  uint64_t key;
  float* moment[2];       // [N, K, G] or null
  float* bias_moment[2];  // [N, G] or null
  const int64_t* slots;   // [P] ascending
  const int32_t* rows;    // [P]
  const float* weights;   // [P]
  int64_t positives;      // P
  float smoothing;        // a positive's target is 1 − smoothing
};

// All work on groups [begin, end). `scratch` holds scratch_floats() floats, 64-byte aligned, one per thread.
struct Kernels {
  const char* name;
  int screen_lanes;      // groups that have a screen are multiples of it; 0 where the instruction set has no fast products of 8 bits
  bool columns8;         // whether several rows look at a sketch in 8 bits
  int sketched_eighths;  // of a label's connections that a sketch keeps
  // The gate may be null: then every label is allowed.
  void (*topk)(const Block&, const Batch&, const Looks&, int64_t begin, int64_t end, Gate*, Best&, float* scratch);
  // False where a block's numbers do not fit.
  bool (*screen)(const Block&, int64_t begin, int64_t end, const Screen&, float* scratch);
  bool (*sketch)(const Block&, int64_t begin, int64_t end, const Sketch&, float* scratch);
  void (*scores)(const Block&, const Batch&, int64_t begin, int64_t end, float* out, float* scratch);
  // Adds ∂loss/∂x to grad_xt [D, ldx] and returns the summed loss.
  double (*train)(const Block&, const Batch&, const Step&, int64_t begin, int64_t end, float* grad_xt, float* scratch);
  // From the gradient of the scores [B, N, G]: adds ∂/∂x to grad_xt, or writes ∂/∂values [N, K, G]; the other may be null.
  void (*backward)(const Block&, const Batch&, const float* grad, int64_t begin, int64_t end, float* grad_xt, float* grad_values,
                   float* scratch);
};

// Below this many rows a private block gathers inputs for its labels; from here on it runs along the batch.
constexpr int PRIVATE_BATCH = 8;

inline int64_t scratch_floats(const Block& block, int ldx) {
  const int64_t tile = (int64_t)block.group_size * ldx;
  const int64_t weights = block.connectivity == Connectivity::private_ ? (int64_t)2 * block.fan_in * block.group_size : 0;
  const int64_t screen = block.screen.coarse ? (int64_t)(block.fan_in / 8 + 1) * (4 * ldx + 2 * block.group_size) + 4 * ldx : 0;
  return 3 * tile + weights + screen + 32 * (int64_t)block.group_size + ldx;
}

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512vnni;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

}  // namespace fanin
