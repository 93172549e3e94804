// What the host sides of the optimizer steps share: checked operands as the kernels take them.
#pragma once
#include <map>
#include <optional>
#include <vector>

#include "../step_operands.h"
#include "host.h"
#include "kernels.h"

namespace sparsekern::cuda {

struct StepLists {
  std::map<Dtype, std::vector<StepTensor>> by_dtype;

  // params[i] with its gradient and mask; the caller adds the states.
  StepTensor& add(const char* op, const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                  const std::vector<std::optional<Tensor>>& masks, size_t i) {
    const Tensor& p = params[i];
    STD_TORCH_CHECK(on_device(p) && is_dense(p), op, ": params[", i, "] must fill its memory, on the device");
    check_step_operand(op, "grads", params, grads, i);
    std::vector<StepTensor>& list = by_dtype[step_dtype(op, p)];
    list.push_back({});
    StepTensor& t = list.back();
    t.param = p.mutable_data_ptr();
    t.grad = grads[i].const_data_ptr();
    t.mask = step_mask(op, p, masks[i], i);
    t.size = p.numel();
    t.index = static_cast<uint32_t>(i);
    return t;
  }
};

inline DeviceScalar device_scalar(const char* op, const std::optional<Tensor>& t) {
  using ScalarType = torch::headeronly::ScalarType;
  if (!t) return {nullptr, false};
  const bool wide = t->scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(t->numel() == 1 && (wide || t->scalar_type() == ScalarType::Float) && on_device(*t), op,
                  ": grad_scale and found_inf must be one float32 or float64 number on the device of params");
  return {t->const_data_ptr(), wide};
}

}  // namespace sparsekern::cuda
