// Host side of masked_sgd_ on CPU: checks, splits the whole list over threads, calls the kernel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "dispatch.h"
#include "masked_step.h"

namespace sparsekern {
namespace {

constexpr char kOp[] = "masked_sgd_";

void masked_sgd_cpu(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum,
                    std::vector<std::optional<Tensor>> masks, Tensor fresh, double lr, double mu, double dampening,
                    double weight_decay, bool nesterov, bool maximize, std::string momentum_policy,
                    std::vector<std::optional<Tensor>> inner, std::optional<Tensor> grad_scale,
                    std::optional<Tensor> found_inf, std::vector<int64_t> known_zero, double inner_decay,
                    double outer_decay) {
  const size_t count = params.size();
  check_sgd_lists(params, grads, momentum, masks, fresh, mu, momentum_policy, known_zero, inner);
  uint8_t* const is_fresh = fresh.mutable_data_ptr<uint8_t>();

  std::vector<SgdTensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor& p = params[i];
    check_step_param(kOp, params, i);
    check_step_operand(kOp, "grads", params, grads, i);
    if (mu != 0) check_step_operand(kOp, "momentum", params, momentum, i);
    tensors[i] = {p.mutable_data_ptr(),
                  grads[i].const_data_ptr(),
                  mu == 0 ? nullptr : momentum[i].mutable_data_ptr(),
                  step_mask(kOp, p, masks[i], i),
                  inner.empty() ? nullptr : step_mask(kOp, p, inner[i], i),
                  dtype_of(kOp, p),
                  is_fresh[i] != 0,
                  !known_zero.empty() && known_zero[i] != 0};
  }
  if (found_inf && step_scalar(kOp, *found_inf) != 0) return;

  const SgdOptions options{-lr,
                           mu,
                           1 - dampening,
                           weight_decay,
                           inner_decay,
                           outer_decay,
                           grad_scale ? step_scalar(kOp, *grad_scale) : 1,
                           nesterov,
                           maximize,
                           momentum_policy == "decay",
                           momentum_policy == "freeze",
                           grad_scale.has_value()};
  const auto step = kernels().masked_sgd;
  step_list(params, [&](size_t i, int64_t begin, int64_t end) { step(tensors[i], options, begin, end); });
  std::fill(is_fresh, is_fresh + count, uint8_t{0});
}

}  // namespace
}  // namespace sparsekern

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("masked_sgd_", TORCH_BOX(&sparsekern::masked_sgd_cpu)); }
