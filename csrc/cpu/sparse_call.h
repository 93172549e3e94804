// The convolution that a plan was made for, kept at its head: a repeated call need not be told it again.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "sparse_gradient.h"

namespace sparsekern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// Where a tensor of at most four dims has its elements.
struct Form {
  int64_t dims, sizes[4], strides[4];

  Strides image() const { return {strides[0], strides[1], strides[2], strides[3]}; }
  // Whether `t` is like this, of `type` and on CPU.
  bool fits(const Tensor& t, ScalarType type) const;
  // Raises unless it is.
  void check(const Tensor& t, const char* name, ScalarType type = ScalarType::Float) const;
};

// Raises unless `t` is of `type`, on CPU and of `dims` dims.
void check_values(const Tensor& t, const char* name, int64_t dims, ScalarType type);
void check_ints(const Tensor& t);

// Stride, padding and dilation are vertical then horizontal. Plain numbers, so that a plan can hold them.
struct SparseCall {
  Form input, result, weight;  // or their gradients, which lie like them
  SparseShape shape;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  bool bfloat16;

  ScalarType type() const { return bfloat16 ? ScalarType::BFloat16 : ScalarType::Float; }
  int64_t images() const { return input.sizes[0]; }
  GradientAxis axis(int i) const;
  Grid grid() const { return Grid(axis(0).forward, axis(1).forward, images(), limits().lanes); }
  Plan tiles(const Grid& grid) const { return Plan(grid, input.sizes[1], shape.tall, input.image(), !bfloat16); }
};

// `geometry`: stride, padding, dilation. Raises unless all of it fits together. The weight is dense, (out, in / groups,
// rows, columns) or (out, in), or packed: 1-d.
SparseCall sparse_call(const Tensor& input, const Tensor& result, const Tensor& weight, ScalarType type,
                       const std::string& layout, const Ints& shape, const Ints& geometry, int64_t groups);

// The head of a plan, which is as many numbers.
SparseCall head(const Tensor& plan);
constexpr int64_t kHeadInts = sizeof(SparseCall) / sizeof(int32_t);

// The sets behind it.
PlanReader sets(const Tensor& plan);

}  // namespace sparsekern
