// Host side of masked_combine_ on CPU: checks, splits the whole list over threads, calls the kernel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "dispatch.h"
#include "masked_step.h"

namespace sparsekern {
namespace {

constexpr char kOp[] = "masked_combine_";

void check_operand(const std::vector<Tensor>& outputs, const char* name, const std::vector<Tensor>& values, size_t i) {
  STD_TORCH_CHECK(values[i].is_cpu() && same_layout(outputs[i], values[i]), kOp, ": ", name, "[", i,
                  "] must have the layout of outputs[", i, "]");
}

bool streams(const CombineTensor& t, int64_t elements) {
  return past_caches(t.dtype, t.output, elements) && t.output != t.first && t.output != t.second && t.output != t.times;
}

void masked_combine_cpu(std::vector<Tensor> outputs, std::vector<Tensor> first, std::vector<Tensor> second,
                        std::vector<std::optional<Tensor>> masks, std::vector<double> live, std::vector<double> pruned,
                        std::optional<Tensor> scale, std::vector<Tensor> times, bool magnitude,
                        std::vector<std::optional<Tensor>> within) {
  const size_t count = outputs.size();
  STD_TORCH_CHECK(live.size() == 2 && pruned.size() == 2, kOp, ": live and pruned must be two coefficients each");
  const bool reads_second = live[1] != 0 || pruned[1] != 0;
  STD_TORCH_CHECK(first.size() == count && masks.size() == count, kOp, ": first and masks must match outputs");
  STD_TORCH_CHECK(second.size() == count || (second.empty() && !reads_second), kOp, ": second must match outputs");
  STD_TORCH_CHECK(times.empty() || times.size() == count, kOp, ": times must be empty or match outputs");
  STD_TORCH_CHECK(within.empty() || within.size() == count, kOp, ": within must be empty or match outputs");
  std::vector<CombineTensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(outputs[i].is_cpu() && is_dense(outputs[i]), kOp, ": outputs[", i, "] must fill its memory");
    check_operand(outputs, "first", first, i);
    if (reads_second) check_operand(outputs, "second", second, i);
    if (!times.empty()) check_operand(outputs, "times", times, i);
    tensors[i] = {outputs[i].mutable_data_ptr(),
                  first[i].const_data_ptr(),
                  reads_second ? second[i].const_data_ptr() : nullptr,
                  reads_second && !times.empty() ? times[i].const_data_ptr() : nullptr,
                  step_mask(kOp, outputs[i], masks[i], i),
                  within.empty() ? nullptr : step_mask(kOp, outputs[i], within[i], i),
                  dtype_of(kOp, outputs[i]),
                  false};
    tensors[i].stream = streams(tensors[i], outputs[i].numel());
  }
  const CombineOptions options{
      {live[0], live[1]}, {pruned[0], pruned[1]}, scale ? step_scalar(kOp, *scale) : 1, scale.has_value(), magnitude};
  const auto combine = kernels().masked_combine;
  step_list(outputs, [&](size_t i, int64_t begin, int64_t end) { combine(tensors[i], options, begin, end); });
}

}  // namespace
}  // namespace sparsekern

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("masked_combine_", TORCH_BOX(&sparsekern::masked_combine_cpu)); }
