// Host side of signed_sums on CPU: checks, splits the whole list over threads, calls the kernel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "dispatch.h"
#include "masked_step.h"

namespace sparsekern {
namespace {

constexpr char kOp[] = "signed_sums";

Tensor signed_sums_cpu(std::vector<Tensor> values, std::vector<Tensor> signs) {
  STD_TORCH_CHECK(!values.empty() && signs.size() == values.size(), kOp, ": signs must match values, one at least");
  std::vector<std::vector<double>> parts;
  for (size_t i = 0; i < values.size(); ++i) {
    STD_TORCH_CHECK(values[i].is_cpu() && is_dense(values[i]), kOp, ": values[", i, "] must fill its memory");
    STD_TORCH_CHECK(signs[i].is_cpu() && same_layout(values[i], signs[i]), kOp, ": signs[", i,
                    "] must have the layout of values[", i, "]");
    dtype_of(kOp, values[i]);
    parts.emplace_back((values[i].numel() + kStepGrain - 1) / kStepGrain);
  }
  const auto sum = kernels().signed_sum;
  step_list(values, [&](size_t i, int64_t begin, int64_t end) {
    // One number for each stretch, so that the result does not depend on who took which.
    for (; begin < end; begin += kStepGrain) {
      sum(values[i].const_data_ptr(), signs[i].const_data_ptr(), dtype_of(kOp, values[i]), begin,
          std::min(begin + kStepGrain, end), &parts[i][begin / kStepGrain]);
    }
  });
  Tensor result =
      torch::stable::new_empty(values[0], {static_cast<int64_t>(values.size())}, torch::headeronly::ScalarType::Double);
  double* const out = result.mutable_data_ptr<double>();
  for (size_t i = 0; i < parts.size(); ++i) out[i] = std::accumulate(parts[i].begin(), parts[i].end(), 0.0);
  return result;
}

}  // namespace
}  // namespace sparsekern

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("signed_sums", TORCH_BOX(&sparsekern::signed_sums_cpu)); }
