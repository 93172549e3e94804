// Host side of soft_threshold_ on CPU: checks, splits the whole list over threads, calls the kernel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "masked_step.h"

namespace sparsekern {
namespace {

constexpr char kOp[] = "soft_threshold_";

// Rows must keep to cache lines.
bool streams(const ShrinkTensor& t, int64_t elements) {
  return past_caches(t.dtype, t.output, elements) && t.output != t.weight && t.output != t.gradient && t.row % 16 == 0;
}

void soft_threshold_cpu(std::vector<Tensor> outputs, std::vector<Tensor> weights, std::vector<Tensor> thresholds,
                        std::vector<Tensor> gradients, bool rescale) {
  const size_t count = outputs.size();
  STD_TORCH_CHECK(weights.size() == count && thresholds.size() == count, kOp,
                  ": weights and thresholds must match outputs");
  STD_TORCH_CHECK(gradients.empty() || (gradients.size() == count && !rescale), kOp,
                  ": gradients must be empty, or match outputs and not be rescaled");
  std::vector<ShrinkTensor> tensors(count);
  std::vector<int64_t> grains(count, kStepGrain);
  for (size_t i = 0; i < count; ++i) {
    const Tensor& out = outputs[i];
    STD_TORCH_CHECK(out.is_cpu() && is_dense(out), kOp, ": outputs[", i, "] must fill its memory");
    STD_TORCH_CHECK(weights[i].is_cpu() && same_layout(out, weights[i]), kOp, ": weights[", i,
                    "] must have the layout of outputs[", i, "]");
    if (!gradients.empty()) {
      STD_TORCH_CHECK(gradients[i].is_cpu() && same_layout(out, gradients[i]), kOp, ": gradients[", i,
                      "] must have the layout of outputs[", i, "]");
    }
    int64_t row = 0;
    if (rescale && out.numel() > 0) {
      STD_TORCH_CHECK(out.dim() >= 2, kOp, ": weights[", i, "] must have two dims or more");
      row = out.numel() / out.size(0);
      STD_TORCH_CHECK(out.size(0) == 1 || out.stride(0) == row, kOp, ": weights[", i,
                      "] must have one output channel behind the other");
      grains[i] = row * std::max<int64_t>(1, kStepGrain / row);
    }
    STD_TORCH_CHECK(thresholds[i].numel() == 1, kOp, ": thresholds[", i, "] must be one number");
    tensors[i] = {out.mutable_data_ptr(),
                  weights[i].const_data_ptr(),
                  gradients.empty() ? nullptr : gradients[i].const_data_ptr(),
                  step_scalar(kOp, thresholds[i]),
                  row,
                  dtype_of(kOp, out),
                  false};
    tensors[i].stream = streams(tensors[i], out.numel());
  }
  const auto shrink = kernels().soft_threshold;
  step_list(outputs, grains, [&](size_t i, int64_t begin, int64_t end) { shrink(tensors[i], begin, end); });
}

}  // namespace
}  // namespace sparsekern

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("soft_threshold_", TORCH_BOX(&sparsekern::soft_threshold_cpu)); }
