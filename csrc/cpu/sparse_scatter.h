// The gradient of the input for blocks of four outputs (4x1), added up block by block in a packed tile.
#pragma once
#include <optional>

#include "sparse_plan.h"
#include "sparse_product.h"

namespace sparsekern {

// Where there are few tiles, the channels of the input are cut into as many shares, for the threads.
constexpr int64_t kMostShares = 4;

// False if the structure is not one. `plan` has room for kMostShares sets of the block rows.
bool plan_scattered(const SparseForm& form, const Grid& grid, int32_t* plan);

// Fills `result`, but for pixels that no tap reaches by the stride, unless `spread` says where they are. Sums run in an
// order that depends neither on threads nor on tiles. False, with nothing written, if the plan is for other tiles.
bool scattered_gradient(const Grid& grid, const Image<const float>& gradients, const SparseShape& w, PlanReader plan,
                        const float* weight, const Image<float>& result, const std::optional<SpreadShape>& spread);

}  // namespace sparsekern
