#include "masked_step.h"

namespace sparsekern {

double step_scalar(const char* op, const Tensor& t) {
  using ScalarType = torch::headeronly::ScalarType;
  STD_TORCH_CHECK(t.numel() == 1, op, ": grad_scale and found_inf must hold one element");
  if (t.scalar_type() == ScalarType::Double) return *t.const_data_ptr<double>();
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, op, ": grad_scale and found_inf must be float32");
  return *t.const_data_ptr<float>();
}

void check_step_param(const char* op, const std::vector<Tensor>& params, size_t i) {
  STD_TORCH_CHECK(params[i].is_cpu() && is_dense(params[i]), op, ": params[", i, "] must fill its memory, on the CPU");
}

}  // namespace sparsekern
