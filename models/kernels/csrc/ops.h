// The operations on a block, on all threads: batches are transposed, groups are shared out, results are merged.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace fanin {

// Names of the instruction sets this machine can run, best first; the active one; switching (false if it cannot run here).
std::vector<const char*> levels();
const char* level();
bool use_level(const char* name);

// scores [B, k] descending and labels [B, k]; a row with fewer than k comparable scores ends in label −1. `allowed` has an entry
// per row, or none at all when every row may give every label.
void topk(const std::vector<Block>& blocks, const float* x, int rows, int k, const std::vector<Subset>& allowed, float* scores,
          int32_t* labels);
// Fills in the block's screen; false where it can have none on this machine.
bool screen(const Block& block, const Screen& out);
// Connections of a label that a sketch keeps with this instruction set.
int sketched(int fan_in);
// Fills in the block's sketch; false where it can have none.
bool sketch(const Block& block, const Sketch& out);
void scores(const Block& block, const float* x, int rows, float* out);
// grad_x [B, D]; returns the loss, summed over labels and averaged over rows.
double train_step(const Block& block, const float* x, int rows, const Step& step, float* grad_x);
void grad_input(const Block& block, const float* grad, int rows, float* grad_x);
void grad_values(const Block& block, const float* x, const float* grad, int rows, float* out);

}  // namespace fanin
