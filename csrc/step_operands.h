// Checks of the operands of the masked optimizer steps, on any device. Header only: two libraries use it.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "dtype_of.h"

namespace sparsekern {

// Element i of one's memory is element i of the other's; strides of dimensions of size 1 say nothing.
inline bool same_order(const Tensor& a, const Tensor& b) {
  // torch 2.10 has no operator== for sizes.
  if (!a.sizes().equals(b.sizes())) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// Also of one type.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && same_order(a, b);
}

// Whether the elements fill their memory, in any order of the dimensions: the kernel walks it from end to end.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous() || t.numel() == 0) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    int64_t inside = 1;
    for (size_t e = 0; e < sizes.size(); ++e) inside *= strides[e] < strides[d] ? sizes[e] : 1;
    if (sizes[d] != 1 && strides[d] != inside) return false;
  }
  return true;
}

// The lists of masked_sgd_ fit each other.
inline void check_sgd_lists(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                            const std::vector<Tensor>& momentum, const std::vector<std::optional<Tensor>>& masks,
                            const Tensor& fresh, double mu, const std::string& momentum_policy,
                            const std::vector<int64_t>& known_zero, const std::vector<std::optional<Tensor>>& inner) {
  const size_t count = params.size();
  STD_TORCH_CHECK(inner.empty() || inner.size() == count, "masked_sgd_: inner must be empty or match params");
  STD_TORCH_CHECK(grads.size() == count && masks.size() == count && fresh.numel() == static_cast<int64_t>(count),
                  "masked_sgd_: params, grads, masks and fresh must have one entry per parameter");
  STD_TORCH_CHECK(mu == 0 || momentum.size() == count, "masked_sgd_: momentum must have one entry per parameter");
  STD_TORCH_CHECK(fresh.scalar_type() == torch::headeronly::ScalarType::Byte && fresh.is_contiguous(),
                  "masked_sgd_: fresh must be uint8");
  STD_TORCH_CHECK(momentum_policy == "mask" || momentum_policy == "decay" || momentum_policy == "freeze",
                  "masked_sgd_: momentum_policy must be one of ('mask', 'decay', 'freeze'), got '", momentum_policy,
                  "'");
  STD_TORCH_CHECK(known_zero.empty() || (known_zero.size() == count && momentum_policy == "mask"),
                  "masked_sgd_: known_zero must be empty, or have one entry per parameter and momentum_policy 'mask'");
}

// The lists of masked_adamw_ fit each other.
inline void check_adamw_lists(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                              const std::vector<Tensor>& exp_avg, const std::vector<Tensor>& exp_avg_sq,
                              const std::vector<std::optional<Tensor>>& masks, const Tensor& steps,
                              const std::vector<int64_t>& known_zero) {
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && exp_avg.size() == count && exp_avg_sq.size() == count &&
                      masks.size() == count && steps.numel() == static_cast<int64_t>(count),
                  "masked_adamw_: grads, exp_avg, exp_avg_sq, masks and steps must have one entry per parameter");
  STD_TORCH_CHECK(steps.scalar_type() == torch::headeronly::ScalarType::Float && steps.is_contiguous(),
                  "masked_adamw_: steps must be contiguous float32");
  STD_TORCH_CHECK(known_zero.empty() || known_zero.size() == count,
                  "masked_adamw_: known_zero must be empty or have one entry per parameter");
}

// `values[i]` is like params[i] in type, shape and layout.
inline void check_step_operand(const char* op, const char* name, const std::vector<Tensor>& params,
                               const std::vector<Tensor>& values, size_t i) {
  STD_TORCH_CHECK(same_layout(params[i], values[i]), op, ": ", name, "[", i, "] must have the layout of params[", i,
                  "]");
}

// The bits of one mask, null without one.
inline const uint8_t* step_mask(const char* op, const Tensor& param, const std::optional<Tensor>& mask, size_t i) {
  if (!mask) return nullptr;
  STD_TORCH_CHECK(mask->scalar_type() == torch::headeronly::ScalarType::Byte && mask->is_contiguous() &&
                      mask->numel() == (param.numel() + 7) / 8,
                  op, ": masks[", i, "] must be contiguous uint8 with one bit per weight");
  return mask->const_data_ptr<uint8_t>();
}

}  // namespace sparsekern
