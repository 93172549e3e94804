// Host side of masked_adamw_ on CPU: checks, splits the whole list over threads, calls the kernel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "dispatch.h"
#include "masked_step.h"

namespace sparsekern {
namespace {

constexpr char kOp[] = "masked_adamw_";

void masked_adamw_cpu(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avg,
                      std::vector<Tensor> exp_avg_sq, std::vector<std::optional<Tensor>> masks, Tensor steps, double lr,
                      double beta1, double beta2, double eps, double weight_decay, bool maximize,
                      std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                      std::vector<int64_t> known_zero) {
  const size_t count = params.size();
  check_adamw_lists(params, grads, exp_avg, exp_avg_sq, masks, steps, known_zero);
  float* const taken = steps.mutable_data_ptr<float>();

  std::vector<AdamwTensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor& p = params[i];
    check_step_param(kOp, params, i);
    check_step_operand(kOp, "grads", params, grads, i);
    check_step_operand(kOp, "exp_avg", params, exp_avg, i);
    check_step_operand(kOp, "exp_avg_sq", params, exp_avg_sq, i);
    // Powers, also for the root, because torch.optim.AdamW takes them.
    const double step = static_cast<double>(taken[i] + 1);
    tensors[i] = {p.mutable_data_ptr(),
                  grads[i].const_data_ptr(),
                  exp_avg[i].mutable_data_ptr(),
                  exp_avg_sq[i].mutable_data_ptr(),
                  step_mask(kOp, p, masks[i], i),
                  dtype_of(kOp, p),
                  !known_zero.empty() && known_zero[i] != 0,
                  -(lr / (1 - std::pow(beta1, step))),
                  std::pow(1 - std::pow(beta2, step), 0.5)};
  }
  if (found_inf && step_scalar(kOp, *found_inf) != 0) return;

  const AdamwOptions options{1 - beta1,
                             beta2,
                             1 - beta2,
                             eps,
                             1 - lr * weight_decay,
                             grad_scale ? step_scalar(kOp, *grad_scale) : 1,
                             weight_decay != 0,
                             maximize,
                             grad_scale.has_value()};
  const auto step = kernels().masked_adamw;
  step_list(params, [&](size_t i, int64_t begin, int64_t end) { step(tensors[i], options, begin, end); });
  for (size_t i = 0; i < count; ++i) taken[i] += 1;
}

}  // namespace
}  // namespace sparsekern

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("masked_adamw_", TORCH_BOX(&sparsekern::masked_adamw_cpu)); }
