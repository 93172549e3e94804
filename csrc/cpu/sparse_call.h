// The convolution that a plan was made for, kept at its head: a repeated call need not be told it again.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "../direct_call.h"
#include "sparse_gradient.h"

namespace sparsekern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// Where a tensor of at most four dims has its elements.
struct Form {
  int64_t dims, sizes[4], strides[4];

  // Whether `t` is like this and has such numbers.
  bool fits(const Operand& t, Number number) const;
  // Raises unless it is like this, of float32.
  void check(const Operand& t, const char* name) const;
};

// What is not on a CPU has numbers of another kind.
Operand operand(const Tensor& t);
inline Operand operand(const std::optional<Tensor>& t) { return t ? operand(*t) : Operand{}; }

// Raises unless `t` is of `type`, on CPU and of `dims` dims.
void check_values(const Tensor& t, const char* name, int64_t dims, ScalarType type);
void check_ints(const Tensor& t);

// A tensor as images. The rows of a linear layer are the pixels of one image one pixel high.
struct Images {
  int64_t count, channels, size[2];
  Strides strides;
};

// Stride, padding and dilation are vertical then horizontal. Plain numbers, so that a plan can hold them.
struct SparseCall {
  Form input, result, weight;  // or their gradients, which lie like them
  Images in, out;
  SparseShape shape;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  bool bfloat16;

  Number number() const { return bfloat16 ? Number::kBFloat16 : Number::kFloat32; }
  GradientAxis axis(int i) const;
  Grid grid() const { return Grid(axis(0).forward, axis(1).forward, in.count, limits().lanes); }
  Plan tiles(const Grid& grid) const { return Plan(grid, in.channels, shape.tall, in.strides, !bfloat16); }
};

// Of a convolution, with `shape` (out, in / groups, rows, columns) and `geometry` stride, padding, dilation; or of a
// linear layer, with (out, in) and none, whose input and result are contiguous. A packed weight is 1-d. Raises unless
// all of it fits together.
SparseCall sparse_call(const Tensor& input, const Tensor& result, const Tensor& weight, ScalarType type,
                       const std::string& layout, Ints shape, Ints geometry, int64_t groups);

// The head of a plan, which is as many numbers.
SparseCall head(const Operand& plan);
constexpr int64_t kHeadInts = sizeof(SparseCall) / sizeof(int32_t);

// The sets behind it.
PlanReader sets(const Operand& plan);

}  // namespace sparsekern
