// Host side of masked_adamw_ on CUDA: checks, groups by type, launches. Reads nothing from the device.
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "host.h"
#include "host_step.h"

namespace sparsekern::cuda {
namespace {

using ScalarType = torch::headeronly::ScalarType;
constexpr char kOp[] = "masked_adamw_";

void masked_adamw_cuda(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avg,
                       std::vector<Tensor> exp_avg_sq, std::vector<std::optional<Tensor>> masks, Tensor steps,
                       double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize,
                       std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                       std::vector<int64_t> known_zero) {
  const size_t count = params.size();
  check_adamw_lists(params, grads, exp_avg, exp_avg_sq, masks, steps, known_zero);
  STD_TORCH_CHECK(on_device(steps), "masked_adamw_: steps must be on the device of params");
  StepLists lists;
  for (size_t i = 0; i < count; ++i) {
    check_step_operand(kOp, "exp_avg", params, exp_avg, i);
    check_step_operand(kOp, "exp_avg_sq", params, exp_avg_sq, i);
    StepTensor& t = lists.add(kOp, params, grads, masks, i);
    t.state[0] = exp_avg[i].mutable_data_ptr();
    t.state[1] = exp_avg_sq[i].mutable_data_ptr();
    t.known_zero = !known_zero.empty() && known_zero[i] != 0;
  }
  if (count == 0) return;
  const OnDeviceOf device(steps);
  const DeviceScalar scale = device_scalar(kOp, grad_scale), inf = device_scalar(kOp, found_inf);
  const AdamwStep step{lr, beta1, beta2, eps, weight_decay, maximize};
  Tensor rates = torch::stable::new_empty(steps, {2 * static_cast<int64_t>(count)}, ScalarType::Double);
  check_launch(kOp, adamw_rates(steps.mutable_data_ptr<float>(), steps.numel(), step, rates.mutable_data_ptr(), inf,
                                device.stream));
  for (auto& [dtype, tensors] : lists.by_dtype) {
    check_launch(kOp, masked_adamw(dtype, tensors.data(), static_cast<int64_t>(tensors.size()), step,
                                   rates.const_data_ptr(), scale, inf, device.stream));
  }
}

}  // namespace
}  // namespace sparsekern::cuda

SPARSEKERN_CUDA_LIBRARY(m) { m.impl("masked_adamw_", TORCH_BOX(&sparsekern::cuda::masked_adamw_cuda)); }
