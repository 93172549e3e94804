// Host side of movement_step_ on CPU: checks, splits the whole list over threads, calls the kernel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "dispatch.h"
#include "masked_step.h"

namespace sparsekern {
namespace {

constexpr char kOp[] = "movement_step_";

void movement_step_cpu(std::vector<Tensor> scores, std::vector<Tensor> grads, std::vector<Tensor> weights,
                       std::vector<std::optional<Tensor>> masks, double lr, std::vector<double> penalties,
                       std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  const size_t count = scores.size();
  STD_TORCH_CHECK(
      grads.size() == count && weights.size() == count && masks.size() == count && penalties.size() == count, kOp,
      ": grads, weights, masks and penalties must match scores");
  std::vector<MovementTensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor& s = scores[i];
    STD_TORCH_CHECK(s.is_cpu() && is_dense(s) && dtype_of(kOp, s) == Dtype::kFloat32, kOp, ": scores[", i,
                    "] must be float32 and fill its memory");
    STD_TORCH_CHECK(same_layout(grads[i], weights[i]) && same_order(s, weights[i]), kOp, ": grads[", i,
                    "] and weights[", i, "] must have the layout of scores[", i, "], and one type");
    const Dtype dtype = dtype_of(kOp, weights[i]);
    STD_TORCH_CHECK(dtype != Dtype::kFloat64, kOp, ": weights[", i, "] must not be float64");
    tensors[i] = {static_cast<float*>(s.mutable_data_ptr()),
                  grads[i].mutable_data_ptr(),
                  weights[i].const_data_ptr(),
                  step_mask(kOp, s, masks[i], i),
                  penalties[i],
                  dtype};
  }
  const bool skipped = found_inf && step_scalar(kOp, *found_inf) != 0;
  if (skipped) return;
  const MovementOptions options{-lr, grad_scale ? step_scalar(kOp, *grad_scale) : 1, grad_scale.has_value()};
  const auto step = kernels().movement_step;
  step_list(scores, [&](size_t i, int64_t begin, int64_t end) { step(tensors[i], options, begin, end); });
}

}  // namespace
}  // namespace sparsekern

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("movement_step_", TORCH_BOX(&sparsekern::movement_step_cpu)); }
