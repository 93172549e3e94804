// What every kernel file includes: CUDA under nvcc, else the emulator of tests/emulator. A kernel is plain CUDA C++
// with three rules: SPARSEKERN_LAUNCH launches, SPARSEKERN_SHARED names dynamic shared memory, PTX is reached from here
// only.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SPARSEKERN_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<(grid), (block), (shared), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define SPARSEKERN_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char sparsekern_shared[]; \
  type* const name = reinterpret_cast<type*>(sparsekern_shared)

namespace sparsekern {

// The error of the launches of this thread so far, 0 for none.
inline int launch_status() { return cudaGetLastError(); }

// Publishes what this thread has seen written, counts, and sees what earlier callers have published. The whole block
// must have met at a barrier before, and must meet at one after it.
__device__ __forceinline__ uint32_t take_ticket(uint32_t* counter) {
  __threadfence();
  const uint32_t ticket = atomicAdd(counter, 1u);
  __threadfence();
  return ticket;
}

}  // namespace sparsekern
#else
#include "simt.h"

namespace sparsekern {

inline int launch_status() { return 0; }  // the emulator throws

inline uint32_t take_ticket(uint32_t* counter) {
  return std::atomic_ref<uint32_t>(*counter).fetch_add(1, std::memory_order_acq_rel);
}

}  // namespace sparsekern
#endif
