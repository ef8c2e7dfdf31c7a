// The rows of a batch, cut into tiles whose heights the compiler knows.
#pragma once
#include <type_traits>

#include "simd.h"

namespace fanin {
namespace FANIN_LEVEL {
namespace {

template <int HEIGHT = ROWS_PER_TILE, class F>
FANIN_INLINE void at_height(int rows, int row, const F& f) {
  if constexpr (HEIGHT > 0) {
    if (rows == HEIGHT)
      f(row, std::integral_constant<int, HEIGHT>{});
    else
      at_height<HEIGHT - 1>(rows, row, f);
  }
}

// Calls f(row, height) for each tile, rows row … row + height. Heights are nearly equal, as 8 rows are better off as 4 + 4 than as 6 + 2.
template <class F>
FANIN_INLINE void for_tiles(int rows, const F& f) {
  const int tiles = (rows + ROWS_PER_TILE - 1) / ROWS_PER_TILE;
  for (int t = 0; t < tiles; ++t) {
    const int row = rows * t / tiles;
    at_height(rows * (t + 1) / tiles - row, row, f);
  }
}

}  // namespace
}  // namespace FANIN_LEVEL
}  // namespace fanin
