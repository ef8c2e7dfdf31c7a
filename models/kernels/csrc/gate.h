// The walk past the labels that rows may give: it fills in each group's bits and leaps over groups without one.
#pragma once
#include "kernels.h"

namespace fanin {
namespace FANIN_LEVEL {
namespace {

// Sets every row's bits to what they are in a group without listed places.
void clear(Gate& gate, int rows, int G) {
  for (int b = 0; b < rows; ++b)
    for (int i = 0; i < G / 16; ++i) gate.open[(int64_t)b * (G / 16) + i] = gate.rows[b].excluded ? 0xFFFF : 0;
  gate.touched = false;
}

void start(Gate& gate, int rows, int64_t slot, int G) {
  const int64_t place = gate.first + slot;
  gate.excluding = false;
  gate.nearest = INT64_MAX;
  for (int b = 0; b < rows; ++b) {
    const Subset& subset = gate.rows[b];
    int64_t low = 0, high = subset.count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (subset.places[middle] < place)
        low = middle + 1;
      else
        high = middle;
    }
    gate.next[b] = low;
    gate.excluding |= subset.excluded;
    if (low < subset.count && subset.places[low] < gate.nearest) gate.nearest = subset.places[low];
  }
  clear(gate, rows, G);
}

// The first group of [n, end) in which some row may give some label, with its bits in gate.open; `end` if there is none.
int64_t next_group(Gate& gate, int rows, int64_t n, int64_t end, int G) {
  while (n < end) {
    const int64_t from = gate.first + n * G, to = from + G;
    if (gate.touched) clear(gate, rows, G);
    if (gate.nearest >= to) {  // most groups, where lists are short
      if (gate.excluding) return n;
      if (gate.nearest == INT64_MAX) return end;
      n = (gate.nearest - gate.first) / G;
      continue;
    }
    gate.touched = true;
    gate.nearest = INT64_MAX;
    uint32_t any = 0;
    for (int b = 0; b < rows; ++b) {
      const Subset& subset = gate.rows[b];
      uint16_t* open = gate.open + (int64_t)b * (G / 16);
      int64_t& next = gate.next[b];
      for (; next < subset.count && subset.places[next] < to; ++next) {
        const int at = (int)(subset.places[next] - from);
        open[at / 16] ^= 1 << (at % 16);
      }
      if (next < subset.count && subset.places[next] < gate.nearest) gate.nearest = subset.places[next];
      for (int i = 0; i < G / 16; ++i) any |= open[i];
    }
    if (any) return n;
    ++n;
  }
  return end;
}

}  // namespace
}  // namespace FANIN_LEVEL
}  // namespace fanin
