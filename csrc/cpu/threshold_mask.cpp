// Host side of threshold_mask on CPU: checks, splits the whole list over threads, calls the kernel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../topk_operands.h"
#include "dispatch.h"
#include "masked_step.h"

namespace sparsekern {
namespace {

constexpr char kOp[] = "threshold_mask";

// The highest number of the compute type that is not above the threshold: the same values are above it.
double as_computed(double threshold, Dtype dtype) {
  if (dtype == Dtype::kFloat64) return threshold;
  const float near = static_cast<float>(threshold);
  return near > threshold ? std::nextafter(near, -std::numeric_limits<float>::infinity()) : near;
}

std::tuple<std::vector<Tensor>, Tensor> threshold_mask_cpu(std::vector<Tensor> values, double threshold) {
  using ScalarType = torch::headeronly::ScalarType;
  STD_TORCH_CHECK(!values.empty() && !std::isnan(threshold), kOp, ": values must hold a tensor, threshold a number");
  std::vector<Tensor> dense, masks;
  for (const Tensor& v : values) {
    STD_TORCH_CHECK(v.is_cpu(), kOp, ": values must be on the CPU");
    dtype_of(kOp, v);
    dense.push_back(dense_scores(v).first);
    masks.push_back(torch::stable::new_empty(v, {static_cast<int64_t>(v.numel() + 7) / 8}, ScalarType::Byte));
  }
  std::vector<std::atomic<int64_t>> found(values.size());
  const auto kernel = kernels().threshold_mask;
  step_list(dense, [&](size_t i, int64_t begin, int64_t end) {
    const Dtype dtype = dtype_of(kOp, dense[i]);
    int64_t count = 0;
    kernel(dense[i].const_data_ptr(), dtype, as_computed(threshold, dtype), begin, end,
           masks[i].mutable_data_ptr<uint8_t>(), &count);
    found[i] += count;
  });
  Tensor counts = torch::stable::new_empty(values[0], {static_cast<int64_t>(values.size())}, ScalarType::Long);
  for (size_t i = 0; i < found.size(); ++i) counts.mutable_data_ptr<int64_t>()[i] = found[i];
  return {masks, counts};
}

}  // namespace
}  // namespace sparsekern

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("threshold_mask", TORCH_BOX(&sparsekern::threshold_mask_cpu)); }
