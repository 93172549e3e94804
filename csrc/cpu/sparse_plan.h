// From a structure that may lie to rows that a kernel may follow blindly: made once per structure and geometry.
//
// A plan is int32 numbers: for each set of rows its width, its count of blocks, the lanes and slices of a SparseOrder
// or twice 0, the pointers of the rows, per block the activation that it reads (in a tile whose channels are `width`
// floats apart) and the element of the weight where it begins, and where the parts of an order begin. The product and
// the gradient of the weight have one set; the gradient of the input has one per pair of phases of the stride, made of
// the transposed weight.
#pragma once
#include "sparse_buffer.h"
#include "sparse_tiling.h"

namespace sparsekern {

// A sparse weight (out, in / groups, rows, columns) in blocks of `tall` outputs by `wide` inputs. Where it is stored,
// `step` elements lie between those of one block.
struct SparseShape {
  int64_t outputs, channels, groups;
  int32_t tall, wide;
  int64_t step;

  int64_t block_rows() const { return outputs / tall; }
  int32_t block() const { return tall * wide; }
};

// Its structure, over the grid of sparsekern/ops/sparse_structure.py. A `packed` weight holds the kept blocks only, one
// after another; else `strides` are its strides.
struct SparseForm {
  SparseShape shape;
  bool packed;
  int64_t strides[4];
  const int32_t* pointers;
  const int32_t* indices;
  int64_t blocks;

  // Where a block lies behind the first element of its row.
  int32_t in_row(int64_t channel, int64_t y, int64_t x) const {
    return static_cast<int32_t>(channel * strides[1] + y * strides[2] + x * strides[3]);
  }
  // Where block k of a row of blocks begins.
  int32_t element(int64_t k, int64_t row, int32_t in_row) const {
    return static_cast<int32_t>(packed ? k * shape.block() : row * shape.tall * strides[0] + in_row);
  }
};

// One set of rows of a plan.
struct PlannedRows {
  const int32_t* pointers;
  const int32_t* activations;
  const int32_t* elements;
  int64_t rows, blocks, width;
  SparseOrder order;
};

// Reads the sets of a plan in order.
class PlanReader {
 public:
  PlanReader(const int32_t* plan, int64_t size) : at_(plan), end_(plan + size) {}
  // False if the plan does not hold `rows` rows next.
  bool next(int64_t rows, PlannedRows& found);

 private:
  const int32_t* at_;
  const int32_t* end_;
};

// Numbers that a plan needs for a set of rows, but for the order of its blocks.
inline int64_t planned_size(int64_t rows, int64_t blocks) { return rows + 5 + 2 * blocks; }

// The first numbers of a set, which this writes, then its parts.
struct PlanParts {
  int32_t* lanes;
  int32_t* slices;
  int32_t* pointers;
  int32_t* activations;
  int32_t* elements;
  int32_t* end;
  PlanParts(int32_t* plan, int64_t rows, int64_t blocks, int64_t width)
      : lanes(plan + 2),
        slices(plan + 3),
        pointers(plan + 4),
        activations(pointers + rows + 1),
        elements(activations + blocks),
        end(elements + blocks) {
    plan[0] = static_cast<int32_t>(width);
    plan[1] = static_cast<int32_t>(blocks);
    *lanes = *slices = 0;
  }
};

// Writes the rows as they are or, unless `part` is 0, where it pays in a SparseOrder for calls of the kernel with as
// many pixels. False if the structure is not one: pointers that fall or leave the indices, indices that leave the grid
// or do not ascend.
bool plan_rows(const SparseForm& form, const Grid& grid, int64_t width, int64_t part, int32_t* plan);

// One phase of the stride along one axis: every `stride`-th input position from `first` on.
struct Phase {
  int64_t first;
  Axis axis;              // reads the gradients
  std::vector<int> taps;  // of the kernel -> tap of `axis`, or -1
};

// Writes the blocks whose taps lie in a pair of phases, by input channel: 4 x 1 becomes 1 x 4 and vice versa. Returns
// the end of what was written. The structure must have passed `is_structure`.
int32_t* plan_transposed(const SparseForm& form, const Phase& v, const Phase& h, const Grid& grid, const Plan& tiles,
                         int32_t* plan);

bool is_structure(const SparseForm& form, int64_t taps);

// The values of the rows, block after block; of T = float or BFloat16.
template <class T>
const float* gather_values(const PlannedRows& rows, const SparseShape& shape, const T* weight, Buffer<float>& buffer);

}  // namespace sparsekern
