// Host side of batch_norm and its backward on CPU: checks, splits channels over threads, calls the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "dispatch.h"

namespace sparsekern {
namespace {

using torch::stable::Tensor;

// Numbers that a thread takes at least: 32 Ki, 128 KiB of one tensor.
constexpr int64_t kGrain = int64_t{1} << 15;

void check(const Tensor& t, int64_t numel, const char* name) {
  STD_TORCH_CHECK(
      t.scalar_type() == torch::headeronly::ScalarType::Float && t.is_cpu() && t.is_contiguous() && t.numel() == numel,
      "batch_norm: ", name, " must be contiguous float32 on CPU with ", numel, " elements");
}

const float* read(const std::optional<Tensor>& t, int64_t numel, const char* name) {
  if (!t) return nullptr;
  check(*t, numel, name);
  return t->const_data_ptr<float>();
}

// Null for a tensor without elements, which nobody asks for.
float* written(const Tensor& t, int64_t numel, const char* name) {
  if (t.numel() == 0) return nullptr;
  check(t, numel, name);
  return t.mutable_data_ptr<float>();
}

BatchNormShape shape_of(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() >= 2 && input.numel() > 0, "batch_norm: input must have two dims or more and elements");
  const int64_t images = input.size(0), channels = input.size(1);
  return {images, channels, input.numel() / (images * channels)};
}

template <class F>
void each_channel(const BatchNormShape& s, const F& body) {
  torch::stable::parallel_for(0, s.channels, std::max<int64_t>(1, kGrain / (s.images * s.pixels)), body);
}

void batch_norm_cpu(Tensor input, std::optional<Tensor> weight, std::optional<Tensor> bias,
                    std::optional<Tensor> residual, bool relu, double eps, Tensor output, Tensor mean,
                    Tensor variance) {
  const BatchNormShape s = shape_of(input);
  const int64_t all = input.numel();
  STD_TORCH_CHECK(output.numel() == all && mean.numel() == s.channels && variance.numel() == s.channels,
                  "batch_norm: output, mean and variance must have room for the results");
  const BatchNorm b{s,
                    read(input, all, "input"),
                    read(weight, s.channels, "weight"),
                    read(bias, s.channels, "bias"),
                    read(residual, all, "residual"),
                    written(output, all, "output"),
                    written(mean, s.channels, "mean"),
                    written(variance, s.channels, "variance"),
                    eps,
                    relu};
  const auto kernel = kernels().batch_norm;
  each_channel(s, [&](int64_t begin, int64_t end) { kernel(b, begin, end); });
}

void batch_norm_backward_cpu(Tensor grad, Tensor input, std::optional<Tensor> weight, std::optional<Tensor> output,
                             Tensor mean, Tensor variance, double eps, Tensor grad_input, Tensor grad_weight,
                             Tensor grad_bias, Tensor grad_residual) {
  const BatchNormShape s = shape_of(input);
  const int64_t all = input.numel();
  const BatchNormGradient b{s,
                            read(grad, all, "grad"),
                            read(input, all, "input"),
                            read(weight, s.channels, "weight"),
                            read(output, all, "output"),
                            read(mean, s.channels, "mean"),
                            read(variance, s.channels, "variance"),
                            written(grad_input, all, "grad_input"),
                            written(grad_weight, s.channels, "grad_weight"),
                            written(grad_bias, s.channels, "grad_bias"),
                            written(grad_residual, all, "grad_residual"),
                            eps};
  const auto kernel = kernels().batch_norm_backward;
  each_channel(s, [&](int64_t begin, int64_t end) { kernel(b, begin, end); });
}

}  // namespace
}  // namespace sparsekern

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("_batch_norm_cpu", TORCH_BOX(&sparsekern::batch_norm_cpu));
  m.impl("_batch_norm_backward_cpu", TORCH_BOX(&sparsekern::batch_norm_backward_cpu));
}
