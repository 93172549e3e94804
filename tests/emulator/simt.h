// Runs CUDA C++ kernels on the CPU: csrc/cuda/device.cuh includes this file where nvcc does not compile it.
//
// What it finds: deadlocks and divergent barriers, wrong lane masks, missing barriers (by the order of threads, or as
// races), missing waits of cp.async, misaligned vector copies, and with -fsanitize=address accesses out of bounds.
// What it does not: weak memory order, timing, bank conflicts, the order of a tensor core's sums, __activemask.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __align__
#undef __restrict__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
// One block at a time runs on an OS thread, so this is private to the block.
#define __shared__ static thread_local

#include "machine.h"
#include "ptx.h"
#include "warp.h"

#define SPARSEKERN_LAUNCH(kernel, grid, block, shared, stream, ...) \
  simt::launch((grid), (block), (shared), [&] { kernel(__VA_ARGS__); })
#define SPARSEKERN_SHARED(type, name) type* const name = reinterpret_cast<type*>(simt::machine().shared)
