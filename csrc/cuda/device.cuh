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
  sparsekern::allow_shared(kernel, shared);                         \
  kernel<<<(grid), (block), (shared), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define SPARSEKERN_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char sparsekern_shared[]; \
  type* const name = reinterpret_cast<type*>(sparsekern_shared)

namespace sparsekern {

// More than 48 KiB of dynamic shared memory must be asked for; a refusal is an error of the launch.
template <class... Arguments>
inline void allow_shared(void (*kernel)(Arguments...), uint32_t bytes) {
  if (bytes > 48 << 10) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

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

// d += a * b on tensor cores, of which GPUs before sm_80 have none for these types: a 16 x 16 `a` and a 16 x 8 `b` of
// 16-bit numbers, held as the PTX manual says for mma.m16n8k16.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define SPARSEKERN_MMA(type) __trap()
#else
#define SPARSEKERN_MMA(type)                                          \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "  \
               "{%0, %1, %2, %3};"                                    \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  SPARSEKERN_MMA("f16");
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  SPARSEKERN_MMA("bf16");
}
#undef SPARSEKERN_MMA

// Four 8 x 8 matrices of 16-bit numbers from shared memory; `row` is one of their 32 rows, 16 bytes, in order of lanes.
template <bool kTranspose>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
  }
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
