// One step of AdamW over a list of tensors. The contract is sparsekern/ops/masked_adamw.py.
#include "masked_step.cuh"

namespace sparsekern::cuda {
namespace {

// Per parameter, because each has taken steps of its own.
struct Rates {
  double negative_step_size, correction;
};

__global__ void take_step(float* steps, int64_t count, double lr, double beta1, double beta2, Rates* rates,
                          const DeviceScalar found_inf) {
  if (found_inf.at && read(found_inf) != 0) return;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const double step = steps[i] += 1;
  rates[i] = {-(lr / (1 - pow(beta1, step))), pow(1 - pow(beta2, step), 0.5)};
}

template <class C>
struct AdamwUpdate {
  C weight, beta2, rest2, eps, shrink, scale, negative_step_size, correction;
  DeviceScalar grad_scale;
  const Rates* rates;
  static constexpr bool freeze_pruned = false, kInner = false;
  bool near, decays, maximize;

  __device__ void prepare(const StepTensor& t) {
    negative_step_size = static_cast<C>(rates[t.index].negative_step_size);
    correction = static_cast<C>(rates[t.index].correction);
    if (grad_scale.at) scale = static_cast<C>(read(grad_scale));
  }

  // `p` and `g` of what is pruned are 0 already.
  __device__ __forceinline__ void operator()(C& p, C g, C (&state)[2], bool keep, bool) const {
    C m = keep ? state[0] : C(0), v = keep ? state[1] : C(0);
    if (grad_scale.at) g = g / scale;
    if (maximize) g = -g;
    if (decays) p = p * shrink;
    m = fma(weight, g - m, near ? m : g);
    v = fma(rest2 * g, g, v * beta2);
    p = p + negative_step_size * m / (sqrt(v) / correction + eps);
    state[0] = keep ? m : C(0);
    state[1] = keep ? v : C(0);
  }
};

template <class S>
int adamw_typed(StepTensor* tensors, int64_t count, const AdamwStep& o, const Rates* rates, DeviceScalar grad_scale,
                DeviceScalar found_inf, void* stream) {
  using C = typename ComputeOf<S>::type;
  AdamwUpdate<C> update{};
  update.near = static_cast<C>(1 - o.beta1) < C(0.5);  // torch.lerp's choice of the end to start from
  update.weight = update.near ? C(1 - o.beta1) : C(1 - o.beta1) - C(1);
  update.beta2 = C(o.beta2);
  update.rest2 = C(1 - o.beta2);
  update.eps = C(o.eps);
  update.shrink = C(1 - o.lr * o.weight_decay);
  update.decays = o.weight_decay != 0;
  update.maximize = o.maximize;
  update.grad_scale = grad_scale;
  update.rates = rates;
  return launch_step<S, 2, 2>(tensors, count, update, found_inf, stream);
}

}  // namespace

int adamw_rates(float* steps, int64_t count, const AdamwStep& step, void* rates, DeviceScalar found_inf, void* stream) {
  SPARSEKERN_LAUNCH(take_step, dim3((count + 127) / 128), dim3(128), 0, stream, steps, count, step.lr, step.beta1,
                    step.beta2, static_cast<Rates*>(rates), found_inf);
  return launch_status();
}

int masked_adamw(Dtype dtype, StepTensor* tensors, int64_t count, const AdamwStep& step, const void* rates,
                 DeviceScalar grad_scale, DeviceScalar found_inf, void* stream) {
  const Rates* const r = static_cast<const Rates*>(rates);
  switch (dtype) {
    case Dtype::kFloat32:
      return adamw_typed<float>(tensors, count, step, r, grad_scale, found_inf, stream);
    case Dtype::kFloat64:
      return adamw_typed<double>(tensors, count, step, r, grad_scale, found_inf, stream);
    case Dtype::kBFloat16:
      return adamw_typed<__nv_bfloat16>(tensors, count, step, r, grad_scale, found_inf, stream);
    case Dtype::kFloat16:
      return adamw_typed<__half>(tensors, count, step, r, grad_scale, found_inf, stream);
  }
  return 1;
}

}  // namespace sparsekern::cuda
