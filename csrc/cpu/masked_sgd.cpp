// Host side of masked_sgd_ on CPU: checks, splits the whole list over threads, calls the kernel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "dispatch.h"

namespace sparsekern {
namespace {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "masked_sgd_: params must be float32, float64, bfloat16 or float16");
  }
}

double scalar_value(const Tensor& t) {
  STD_TORCH_CHECK(t.numel() == 1, "masked_sgd_: grad_scale and found_inf must hold one element");
  if (t.scalar_type() == ScalarType::Double) return *t.const_data_ptr<double>();
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "masked_sgd_: grad_scale and found_inf must be float32");
  return *t.const_data_ptr<float>();
}

// Element i of one's memory is element i of the other's; strides of dimensions of size 1 say nothing.
bool same_layout(const Tensor& a, const Tensor& b) {
  // torch 2.10 has no operator== for sizes.
  if (a.scalar_type() != b.scalar_type() || !a.sizes().equals(b.sizes())) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// Whether the elements fill their memory, in any order of the dimensions: the kernel walks it from end to end.
bool is_dense(const Tensor& t) {
  if (t.is_contiguous() || t.numel() == 0) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    int64_t inside = 1;
    for (size_t e = 0; e < sizes.size(); ++e) inside *= strides[e] < strides[d] ? sizes[e] : 1;
    if (sizes[d] != 1 && strides[d] != inside) return false;
  }
  return true;
}

// Elements per task: 32 Ki, that is 640 KiB of float32 traffic, and a multiple of the 16 lanes that share mask bytes.
constexpr int64_t kGrain = int64_t{1} << 15;

void masked_sgd_cpu(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum,
                    std::vector<std::optional<Tensor>> masks, Tensor fresh, double lr, double mu, double dampening,
                    double weight_decay, bool nesterov, bool maximize, std::string momentum_policy,
                    std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                    std::vector<int64_t> known_zero) {
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && masks.size() == count && fresh.numel() == static_cast<int64_t>(count),
                  "masked_sgd_: params, grads, masks and fresh must have one entry per parameter");
  STD_TORCH_CHECK(mu == 0 || momentum.size() == count, "masked_sgd_: momentum must have one entry per parameter");
  STD_TORCH_CHECK(fresh.scalar_type() == ScalarType::Byte && fresh.is_contiguous(), "masked_sgd_: fresh must be uint8");
  STD_TORCH_CHECK(momentum_policy == "mask" || momentum_policy == "decay",
                  "masked_sgd_: momentum_policy must be 'mask' or 'decay', got '", momentum_policy, "'");
  STD_TORCH_CHECK(known_zero.empty() || (known_zero.size() == count && momentum_policy == "mask"),
                  "masked_sgd_: known_zero must be empty, or have one entry per parameter and momentum_policy 'mask'");
  uint8_t* const is_fresh = fresh.mutable_data_ptr<uint8_t>();

  std::vector<SgdTensor> tensors(count);
  std::vector<int64_t> first_task(count + 1, 0);
  int64_t elements = 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& p = params[i];
    STD_TORCH_CHECK(p.is_cpu() && is_dense(p), "masked_sgd_: params[", i, "] must fill its memory, on the CPU");
    STD_TORCH_CHECK(same_layout(p, grads[i]), "masked_sgd_: grads[", i, "] must have the layout of params[", i, "]");
    STD_TORCH_CHECK(mu == 0 || same_layout(p, momentum[i]), "masked_sgd_: momentum[", i, "] must match params[", i,
                    "]");
    if (masks[i]) {
      STD_TORCH_CHECK(masks[i]->scalar_type() == ScalarType::Byte && masks[i]->is_contiguous() &&
                          masks[i]->numel() == (p.numel() + 7) / 8,
                      "masked_sgd_: masks[", i, "] must be contiguous uint8 with one bit per weight");
    }
    tensors[i] = {p.mutable_data_ptr(),
                  grads[i].const_data_ptr(),
                  mu == 0 ? nullptr : momentum[i].mutable_data_ptr(),
                  masks[i] ? masks[i]->const_data_ptr<uint8_t>() : nullptr,
                  dtype_of(p),
                  is_fresh[i] != 0,
                  !known_zero.empty() && known_zero[i] != 0};
    elements += p.numel();
    first_task[i + 1] = first_task[i] + (p.numel() + kGrain - 1) / kGrain;
  }
  if (found_inf && scalar_value(*found_inf) != 0) return;

  const SgdOptions options{-lr,
                           mu,
                           1 - dampening,
                           weight_decay,
                           grad_scale ? scalar_value(*grad_scale) : 1,
                           nesterov,
                           maximize,
                           momentum_policy == "decay",
                           grad_scale.has_value()};
  const auto step = kernels().masked_sgd;
  // Many small tensors are not worth waking a thread for: a thread gets kGrain elements at least.
  const int64_t tasks = first_task[count], grain = tasks / std::max(int64_t{1}, elements / kGrain) + 1;
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first_task.begin(), first_task.end(), begin) - first_task.begin() - 1;
    while (begin < end) {
      while (begin >= first_task[i + 1]) ++i;
      const int64_t until = std::min(end, first_task[i + 1]), size = params[i].numel();
      // All tasks of one tensor in one call, which can then fetch memory ahead without a break.
      step(tensors[i], options, (begin - first_task[i]) * kGrain, std::min((until - first_task[i]) * kGrain, size));
      begin = until;
    }
  });
  std::fill(is_fresh, is_fresh + count, uint8_t{0});
}

}  // namespace
}  // namespace sparsekern

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("masked_sgd_", TORCH_BOX(&sparsekern::masked_sgd_cpu)); }
