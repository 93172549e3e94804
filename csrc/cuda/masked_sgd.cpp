// Host side of masked_sgd_ on CUDA: checks, groups by type, launches. Reads nothing from the device.
#include <optional>
#include <string>
#include <vector>

#include "host.h"
#include "host_step.h"

namespace sparsekern::cuda {
namespace {

constexpr char kOp[] = "masked_sgd_";

void masked_sgd_cuda(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum,
                     std::vector<std::optional<Tensor>> masks, Tensor fresh, double lr, double mu, double dampening,
                     double weight_decay, bool nesterov, bool maximize, std::string momentum_policy,
                     std::vector<std::optional<Tensor>> inner, std::optional<Tensor> grad_scale,
                     std::optional<Tensor> found_inf, std::vector<int64_t> known_zero, double inner_decay,
                     double outer_decay) {
  const size_t count = params.size();
  check_sgd_lists(params, grads, momentum, masks, fresh, mu, momentum_policy, known_zero, inner);
  STD_TORCH_CHECK(on_device(fresh), "masked_sgd_: fresh must be on the device of params");
  StepLists lists;
  for (size_t i = 0; i < count; ++i) {
    if (mu != 0) check_step_operand(kOp, "momentum", params, momentum, i);
    StepTensor& t = lists.add(kOp, params, grads, masks, i);
    t.state[0] = mu == 0 ? nullptr : momentum[i].mutable_data_ptr();
    t.inner = inner.empty() ? nullptr : step_mask(kOp, params[i], inner[i], i);
    t.known_zero = !known_zero.empty() && known_zero[i] != 0;
  }
  if (count == 0) return;
  const OnDeviceOf device(fresh);
  const DeviceScalar scale = device_scalar(kOp, grad_scale), inf = device_scalar(kOp, found_inf);
  const SgdStep step{-lr,
                     mu,
                     1 - dampening,
                     weight_decay,
                     inner_decay,
                     outer_decay,
                     nesterov,
                     maximize,
                     momentum_policy == "decay",
                     momentum_policy == "freeze"};
  for (auto& [dtype, tensors] : lists.by_dtype) {
    check_launch(kOp, masked_sgd(dtype, tensors.data(), static_cast<int64_t>(tensors.size()), step,
                                 fresh.const_data_ptr<uint8_t>(), scale, inf, device.stream));
  }
  check_launch(kOp, clear_fresh(fresh.mutable_data_ptr<uint8_t>(), fresh.numel(), inf, device.stream));
}

}  // namespace
}  // namespace sparsekern::cuda

SPARSEKERN_CUDA_LIBRARY(m) { m.impl("masked_sgd_", TORCH_BOX(&sparsekern::cuda::masked_sgd_cuda)); }
