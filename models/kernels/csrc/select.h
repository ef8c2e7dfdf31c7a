// Survivors of a group's scores enter each row's min-heap. Most scores fail the comparison with the k-th best and cost nothing more.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace fanin {
namespace FANIN_LEVEL {
namespace {

void push(Best& best, int row, float score, int32_t label) {
  const int k = best.k;
  float* s = best.scores + (int64_t)row * k;
  int32_t* id = best.labels + (int64_t)row * k;
  int at;
  if (best.count[row] < k) {
    at = best.count[row]++;
    while (at > 0 && score < s[(at - 1) / 2]) {
      s[at] = s[(at - 1) / 2], id[at] = id[(at - 1) / 2];
      at = (at - 1) / 2;
    }
  } else {
    at = 0;
    for (int child = 1; child < k; child = 2 * at + 1) {
      if (child + 1 < k && s[child + 1] < s[child]) ++child;
      if (score <= s[child]) break;
      s[at] = s[child], id[at] = id[child];
      at = child;
    }
  }
  s[at] = score, id[at] = label;
  if (best.count[row] == k) best.threshold[row] = s[0];
}

// `open` [B, G / 16] has a bit for each label that a row may give; null: it may give all.
FANIN_INLINE void select_rows(const float* z, int rows, int G, const int32_t* labels, const uint16_t* open, Best& best) {
  for (int b = 0; b < rows; ++b) {
    if (!any_greater(z + (int64_t)b * G, G, best.threshold[b])) continue;
    for (int g = 0; g < G; g += W) {
      uint32_t mask = greater(load(z + (int64_t)b * G + g), broadcast(best.threshold[b]));
      if (mask && open) mask &= open[((int64_t)b * G + g) / 16] >> (g % 16);
      for (; mask; mask &= mask - 1) {
        const int at = g + __builtin_ctz(mask);
        const float score = z[(int64_t)b * G + at];
        if (labels[at] >= 0 && score > best.threshold[b]) push(best, b, score, labels[at]);
      }
    }
  }
}

// `limit` [ldx] is scratch.
FANIN_INLINE void select_columns(const float* zt, int rows, int ldx, int G, const int32_t* labels, const uint16_t* open, float* limit,
                                 Best& best) {
  if (open) {  // a row that may give none of the group has no survivors
    for (int b = 0; b < ldx; ++b) {
      uint32_t any = 0;
      for (int i = 0; b < rows && i < G / 16; ++i) any |= open[(int64_t)b * (G / 16) + i];
      limit[b] = any ? best.threshold[b] : __builtin_inff();
    }
  } else {
    limit = best.threshold;
  }
  for (int g = 0; g < G; ++g) {
    if (labels[g] < 0) continue;
    for (int b = 0; b < ldx; b += W)
      for (uint32_t mask = greater(load(zt + (int64_t)g * ldx + b), load(limit + b)); mask; mask &= mask - 1) {
        const int row = b + __builtin_ctz(mask);
        if (open && !(open[((int64_t)row * G + g) / 16] >> (g % 16) & 1)) continue;
        push(best, row, zt[(int64_t)g * ldx + row], labels[g]);
        limit[row] = best.threshold[row];
      }
  }
}

}  // namespace
}  // namespace FANIN_LEVEL
}  // namespace fanin
