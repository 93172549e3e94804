// One step of SGD with momentum over a list of tensors. The contract is sparsekern/ops/masked_sgd.py.
#include "masked_step.cuh"

namespace sparsekern::cuda {
namespace {

template <class C>
struct SgdUpdate {
  static constexpr bool kInner = false;
  C negative_lr, mu, decay, gain, scale;
  DeviceScalar grad_scale;
  const uint8_t* fresh;
  bool nesterov, maximize, keep_pruned_momentum, freeze_pruned, first;

  __device__ void prepare(const StepTensor& t) {
    first = fresh[t.index];
    if (grad_scale.at) scale = static_cast<C>(read(grad_scale));
  }

  // `p` and `g` of what is pruned are 0 already.
  __device__ __forceinline__ void apply(C& p, C g, C (&state)[1], bool keep, bool decays, C rate) const {
    if (grad_scale.at) g = g / scale;
    if (maximize) g = -g;
    if (decays) g = fma(rate, p, g);
    C u = g;
    if (mu != 0) {
      C v = first ? g : fma(gain, g, mu * state[0]);
      if (!keep && !keep_pruned_momentum) v = 0;
      u = nesterov ? fma(mu, v, g) : v;
      state[0] = v;
    }
    p = fma(negative_lr, u, p);
  }
  __device__ __forceinline__ void operator()(C& p, C g, C (&state)[1], bool keep, bool) const {
    apply(p, g, state, keep, decay != 0, decay);
  }
};

// With a weight decay inside of a second mask and one outside. A kernel of its own: the other has no register to spare.
template <class C>
struct DividedSgdUpdate : SgdUpdate<C> {
  static constexpr bool kInner = true;
  C inner_decay, outer_decay;
  bool divided;

  __device__ void prepare(const StepTensor& t) {
    SgdUpdate<C>::prepare(t);
    divided = t.inner;
  }
  __device__ __forceinline__ void operator()(C& p, C g, C (&state)[1], bool keep, bool inner) const {
    const C rate = divided ? inner ? inner_decay : outer_decay : this->decay;
    this->apply(p, g, state, keep, divided || rate != 0, rate);
  }
};

template <class S>
int sgd_typed(StepTensor* tensors, int64_t count, const SgdStep& o, const uint8_t* fresh, DeviceScalar grad_scale,
              DeviceScalar found_inf, void* stream) {
  using C = typename ComputeOf<S>::type;
  const SgdUpdate<C> plain{
      C(o.negative_lr), C(o.mu),    C(o.weight_decay),      C(o.one_minus_dampening), C(1), grad_scale, fresh,
      o.nesterov,       o.maximize, o.keep_pruned_momentum, o.freeze_pruned,          false};
  const auto launch = [&](const auto& update) {
    return o.mu != 0 ? launch_step<S, 1, 1>(tensors, count, update, found_inf, stream)
                     : launch_step<S, 1, 0>(tensors, count, update, found_inf, stream);
  };
  bool divided = false;
  for (int64_t i = 0; i < count; ++i) divided = divided || tensors[i].inner;
  if (!divided) return launch(plain);
  return launch(DividedSgdUpdate<C>{plain, C(o.inner_decay), C(o.outer_decay), false});
}

__global__ void clear_fresh_kernel(uint8_t* fresh, int64_t count, const DeviceScalar found_inf) {
  if (found_inf.at && read(found_inf) != 0) return;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) fresh[i] = 0;
}

}  // namespace

int masked_sgd(Dtype dtype, StepTensor* tensors, int64_t count, const SgdStep& step, const uint8_t* fresh,
               DeviceScalar grad_scale, DeviceScalar found_inf, void* stream) {
  switch (dtype) {
    case Dtype::kFloat32:
      return sgd_typed<float>(tensors, count, step, fresh, grad_scale, found_inf, stream);
    case Dtype::kFloat64:
      return sgd_typed<double>(tensors, count, step, fresh, grad_scale, found_inf, stream);
    case Dtype::kBFloat16:
      return sgd_typed<__nv_bfloat16>(tensors, count, step, fresh, grad_scale, found_inf, stream);
    case Dtype::kFloat16:
      return sgd_typed<__half>(tensors, count, step, fresh, grad_scale, found_inf, stream);
  }
  return 1;
}

int clear_fresh(uint8_t* fresh, int64_t count, DeviceScalar found_inf, void* stream) {
  SPARSEKERN_LAUNCH(clear_fresh_kernel, dim3(1), dim3(256), 0, stream, fresh, count, found_inf);
  return launch_status();
}

}  // namespace sparsekern::cuda
