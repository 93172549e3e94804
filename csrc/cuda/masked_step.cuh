// What the optimizer steps share: a list of tensors in one launch, 16-byte accesses, one mask bit per element.
//
// The list travels in the kernel's parameters (32 KiB since CUDA 12.1), so nothing is copied ahead and a captured graph
// keeps it. A block takes one chunk of one tensor; a thread issues all its loads before it computes.
#pragma once
#include "device.cuh"
#include "kernels.h"
#include "numbers.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kStepThreads = 256, kStepVectors = 2, kStepTensors = 490;

template <class S>
constexpr int kStepLanes = 16 / sizeof(S);
template <class S>
constexpr int kStepChunk = kStepThreads * kStepVectors * kStepLanes<S>;

struct StepBatch {
  StepTensor tensors[kStepTensors];
  int32_t count;
};
static_assert(sizeof(StepBatch) <= 32000, "kernel parameters end at 32764 bytes");

__device__ __forceinline__ double read(const DeviceScalar& s) {
  return s.wide ? *static_cast<const double*>(s.at) : *static_cast<const float*>(s.at);
}

template <class S>
struct alignas(16) Pack {
  S lane[kStepLanes<S>];
};

// One element through `update`, which computes in its own type. `freeze_pruned`: what is pruned stays in memory.
template <class S, int kStates, class Update>
__device__ __forceinline__ void step_element(const Update& update, S& param, S grad, S (&state)[kStates], bool keep,
                                             bool inner) {
  using C = typename ComputeOf<S>::type;
  C p = keep ? widen(param) : C(0), s[kStates];
  const C g = keep ? widen(grad) : C(0);
  for (int k = 0; k < kStates; ++k) s[k] = widen(state[k]);
  update(p, g, s, keep, inner);
  if (keep || !update.freeze_pruned) narrow(keep ? p : C(0), param);
  for (int k = 0; k < kStates; ++k) narrow(s[k], state[k]);
}

// Elements [begin, end), at most a chunk, one by one: short and misaligned tensors, and the last chunk of any.
template <class S, int kStates, int kStored, class Update>
__device__ void step_elements(const StepTensor& t, int64_t begin, int64_t end, const Update& update) {
  S* const param = static_cast<S*>(t.param);
  for (int64_t i = begin + threadIdx.x; i < end; i += kStepThreads) {
    const bool keep = !t.mask || t.mask[i >> 3] >> (i & 7) & 1;
    if (t.known_zero && !keep) continue;
    const bool inner = Update::kInner && t.inner && t.inner[i >> 3] >> (i & 7) & 1;
    S state[kStates];
    for (int k = 0; k < kStored; ++k) state[k] = static_cast<const S*>(t.state[k])[i];
    for (int k = kStored; k < kStates; ++k) narrow(0, state[k]);
    step_element(update, param[i], static_cast<const S*>(t.grad)[i], state, keep, inner);
    for (int k = 0; k < kStored; ++k) static_cast<S*>(t.state[k])[i] = state[k];
  }
}

// The chunk from element `begin` on. What is known to be zero is neither read nor written.
template <class S, int kStates, int kStored, class Update>
__device__ void step_chunk(const StepTensor& t, int64_t begin, const Update& update) {
  constexpr int kLanes = kStepLanes<S>;
  constexpr uint32_t kAll = (1u << kLanes) - 1;
  Pack<S> param[kStepVectors], grad[kStepVectors], state[kStates][kStepVectors];
  uint32_t bits[kStepVectors];  // those of `inner` 16 above those of the mask
  const auto at = [&](const void* base, int j) {
    return static_cast<const Pack<S>*>(base) + begin / kLanes + j * kStepThreads + threadIdx.x;
  };
#pragma unroll
  for (int j = 0; j < kStepVectors; ++j) {
    const int64_t i = begin + (j * kStepThreads + threadIdx.x) * int64_t{kLanes};
    bits[j] = t.mask ? t.mask[i >> 3] >> (i & 7) & kAll : kAll;
    if (Update::kInner && t.inner) bits[j] |= uint32_t{t.inner[i >> 3]} >> (i & 7) << 16;
  }
#pragma unroll
  for (int j = 0; j < kStepVectors; ++j) {
    if (t.known_zero && !(bits[j] & kAll)) continue;
    param[j] = *at(t.param, j);
    grad[j] = *at(t.grad, j);
#pragma unroll
    for (int k = 0; k < kStored; ++k) state[k][j] = *at(t.state[k], j);
  }
#pragma unroll
  for (int j = 0; j < kStepVectors; ++j) {
    if (t.known_zero && !(bits[j] & kAll)) continue;
#pragma unroll
    for (int l = 0; l < kLanes; ++l) {
      S s[kStates];
      for (int k = 0; k < kStored; ++k) s[k] = state[k][j].lane[l];
      for (int k = kStored; k < kStates; ++k) narrow(0, s[k]);
      step_element(update, param[j].lane[l], grad[j].lane[l], s, bits[j] >> l & 1, bits[j] >> (16 + l) & 1);
      for (int k = 0; k < kStored; ++k) state[k][j].lane[l] = s[k];
    }
    *const_cast<Pack<S>*>(at(t.param, j)) = param[j];
#pragma unroll
    for (int k = 0; k < kStored; ++k) *const_cast<Pack<S>*>(at(t.state[k], j)) = state[k][j];
  }
}

// The tensor that this block works on.
__device__ __forceinline__ const StepTensor& step_tensor(const StepBatch& batch) {
  int low = 0, high = batch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.tensors[middle].first_block <= blockIdx.x ? low : high) = middle;
  }
  return batch.tensors[low];
}

// `update.prepare(t)` reads what one tensor has of its own; kInner: it may have two weight decays. kStored of kStates
// states are in memory.
template <class S, int kStates, int kStored, class Update>
__global__ void __launch_bounds__(kStepThreads, kStates == 2 || Update::kInner ? 2 : 3)
    step_kernel(const __grid_constant__ StepBatch batch, Update update, const DeviceScalar found_inf) {
  if (found_inf.at && read(found_inf) != 0) return;
  const StepTensor& t = step_tensor(batch);
  const int64_t begin = int64_t{blockIdx.x - t.first_block} * kStepChunk<S>, end = begin + kStepChunk<S>;
  update.prepare(t);
  if (t.aligned && end <= t.size) {
    step_chunk<S, kStates, kStored>(t, begin, update);
  } else {
    step_elements<S, kStates, kStored>(t, begin, end < t.size ? end : t.size, update);
  }
}

template <class S, int kStates, int kStored, class Update>
int launch_step(StepTensor* tensors, int64_t count, const Update& update, DeviceScalar found_inf, void* stream) {
  StepBatch batch;
  for (int64_t i = 0; i < count;) {
    uint32_t blocks = 0;
    batch.count = 0;
    for (; i < count && batch.count < kStepTensors; ++i) {
      StepTensor t = tensors[i];
      if (t.size == 0) continue;
      uintptr_t joined = reinterpret_cast<uintptr_t>(t.param) | reinterpret_cast<uintptr_t>(t.grad);
      for (int k = 0; k < kStored; ++k) joined |= reinterpret_cast<uintptr_t>(t.state[k]);
      t.aligned = joined % 16 == 0;
      t.known_zero = t.known_zero && t.mask;
      t.first_block = blocks;
      blocks += (t.size + kStepChunk<S> - 1) / kStepChunk<S>;
      batch.tensors[batch.count++] = t;
    }
    if (!blocks) continue;
    SPARSEKERN_LAUNCH((step_kernel<S, kStates, kStored, Update>), dim3(blocks), dim3(kStepThreads), 0, stream, batch,
                      update, found_inf);
    if (const int error = launch_status()) return error;
  }
  return 0;
}

}  // namespace
}  // namespace sparsekern::cuda
