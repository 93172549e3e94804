// The order in which a kernel reads the flat blocks of a tile fastest.
#pragma once
#include "sparse_plan.h"

namespace sparsekern {

// A tile of `channels` rows, `width` floats apart, of which a call of the kernel takes `part` pixels; a block reads up
// to `reach` floats behind its pixel.
struct OrderedTile {
  int64_t channels, width, part, reach;
};

// A slice of the tile has at least as many blocks of a row, on average.
constexpr int64_t kSliceBlocks = 16;

// Numbers that an order needs at most.
inline int64_t order_size(int64_t rows, int64_t blocks) { return rows + 1 + blocks / kSliceBlocks; }

// Puts planned blocks of `wide` channels in order, where that pays. Returns the end of what was written.
int32_t* order_rows(const PlanParts& parts, int64_t rows, int64_t wide, const OrderedTile& tile);

}  // namespace sparsekern
