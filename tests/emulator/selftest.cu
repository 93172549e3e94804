// Kernels for the emulator's own tests: each is right, or wrong in one way when `bug` is set.
#include "device.cuh"

namespace {

using namespace sparsekern;

// The sum of a block by shuffles; `bug` leaves out the barrier before the partial sums are read.
__global__ void block_sum(const float* values, int n, float* result, bool bug) {
  __shared__ float parts[32];
  if (threadIdx.x < 32) parts[threadIdx.x] = NAN;
  __syncthreads();
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += values[i];
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  if (!bug) __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : 0;
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
  if (threadIdx.x == 0) *result = sum;
}

__global__ void lane_mask(int* result, bool bug) {
  if (threadIdx.x < 16) result[threadIdx.x] = __shfl_sync(bug ? ~0u : 0xFFFFu, int(threadIdx.x) * 3, 5);
}

__global__ void divergent_barrier(int* result, bool bug) {
  if (threadIdx.x < 16 && bug) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  result[threadIdx.x] = 1;
}

// `bug` writes one element beyond `n`.
__global__ void out_of_bounds(float* values, int n, bool bug) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (bug ? i <= n : i < n) values[i] = 1;
}

// `bug` loses counts to a race between blocks and threads.
__global__ void count_all(uint32_t* counter, bool bug) {
  if (bug) {
    const uint32_t seen = *counter;
    __syncwarp();
    *counter = seen + 1;
  } else {
    atomicAdd(counter, 1u);
  }
}

// Counts in shared memory; `bug` adds without atomics. Threads of the emulator take turns at barriers only, so that the
// counts are right all the same: the race detector must tell.
__global__ void histogram(const uint32_t* values, uint32_t* counts, bool bug) {
  __shared__ uint32_t bins[4];
  if (threadIdx.x < 4) bins[threadIdx.x] = 0;
  __syncthreads();
  uint32_t* const bin = bins + values[threadIdx.x] % 4;
  if (bug) {
    ++*bin;
  } else {
    atomicAdd(bin, 1u);
  }
  __syncthreads();
  if (threadIdx.x < 4) counts[threadIdx.x] = bins[threadIdx.x];
}

__global__ void missing_wait(const uint32_t* values, uint32_t* result, bool bug) {
  SPARSEKERN_SHARED(uint32_t, staged);
  copy_async_16(staged + threadIdx.x * 4, values + threadIdx.x * 4, threadIdx.x != 3);
  copy_async_commit();
  if (!bug) copy_async_wait<0>();
  __syncthreads();
  for (int i = threadIdx.x; i < 128; i += 32) result[i] = staged[i];
  if (!bug) return;
  __syncthreads();
  copy_async_wait<0>();
}

// Marks `keep` equal values: the lowest, or with `bug` whichever come first.
__global__ void choose_ties(uint32_t* taken, uint32_t* chosen, uint32_t keep, bool bug) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  chosen[i] = bug ? atomicAdd(taken, 1u) < keep : i < keep;
}

// c = a * b for 16 x 16 and 16 x 8 by ldmatrix and mma, where `b` is given as 8 rows of 16.
template <class T>
__global__ void tile_product(const uint16_t* a, const uint16_t* b, float* c) {
  SPARSEKERN_SHARED(uint16_t, staged);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) staged[i] = a[i];
  for (int i = lane; i < 256; i += 32) staged[256 + i] = i < 128 ? b[i] : 0;
  __syncwarp();
  uint32_t x[4], y[4];
  ldmatrix_x4<false>(x, staged + ((lane & 7) + (lane >> 3 & 1) * 8) * 16 + (lane >> 4) * 8);
  ldmatrix_x4<false>(y, staged + 256 + (lane & 7) * 16 + (lane >> 3 & 1) * 8);
  const uint32_t pair[2] = {y[0], y[1]};
  float d[4] = {};
  mma(d, x, pair, T());
  for (int i = 0; i < 4; ++i) c[((lane >> 2) + (i >> 1) * 8) * 8 + (lane & 3) * 2 + (i & 1)] = d[i];
}

// result[lane][8]: what each collective gives in a warp whose lanes hold i * 7 % 32.
__global__ void collectives(uint32_t* result) {
  const uint32_t lane = threadIdx.x, value = lane * 7 % 32;
  uint32_t* const out = result + lane * 8;
  out[0] = __shfl_up_sync(~0u, value, 3);
  out[1] = __shfl_down_sync(~0u, value, 5, 16);
  out[2] = __shfl_xor_sync(~0u, value, 9);
  out[3] = __ballot_sync(~0u, value % 3 == 0);
  out[4] = __match_any_sync(~0u, value % 4);
  out[5] = __reduce_add_sync(~0u, value);
  __syncthreads_count(1);
  __syncthreads();
  out[6] = __syncthreads_count(value % 5 == 0);
  out[7] = __shfl_sync(~0u, value, 2, 8);
}

thread_local std::string message;

template <class F>
const char* guarded(const F& run) {
  try {
    run();
    return nullptr;
  } catch (const std::exception& e) {
    message = e.what();
    return message.c_str();
  }
}

}  // namespace

extern "C" {

void set_schedule(int value) { simt::schedule() = value; }

const char* run_block_sum(const float* values, int n, float* result, bool bug) {
  return guarded([&] { SPARSEKERN_LAUNCH(block_sum, dim3(1), dim3(128), 0, nullptr, values, n, result, bug); });
}
const char* run_lane_mask(int* result, bool bug) {
  return guarded([&] { SPARSEKERN_LAUNCH(lane_mask, dim3(1), dim3(32), 0, nullptr, result, bug); });
}
const char* run_divergent_barrier(int* result, bool bug) {
  return guarded([&] { SPARSEKERN_LAUNCH(divergent_barrier, dim3(1), dim3(64), 0, nullptr, result, bug); });
}
const char* run_out_of_bounds(float* values, int n, bool bug) {
  return guarded([&] { SPARSEKERN_LAUNCH(out_of_bounds, dim3(3), dim3(64), 0, nullptr, values, n, bug); });
}
const char* run_count_all(uint32_t* counter, bool bug) {
  return guarded([&] { SPARSEKERN_LAUNCH(count_all, dim3(4), dim3(64), 0, nullptr, counter, bug); });
}
const char* run_histogram(const uint32_t* values, uint32_t* counts, bool bug) {
  return guarded([&] { SPARSEKERN_LAUNCH(histogram, dim3(1), dim3(64), 0, nullptr, values, counts, bug); });
}
const char* run_missing_wait(const uint32_t* values, uint32_t* result, bool bug) {
  return guarded([&] { SPARSEKERN_LAUNCH(missing_wait, dim3(1), dim3(32), 512, nullptr, values, result, bug); });
}
const char* run_choose_ties(uint32_t* taken, uint32_t* chosen, uint32_t keep, bool bug) {
  return guarded([&] { SPARSEKERN_LAUNCH(choose_ties, dim3(2), dim3(64), 0, nullptr, taken, chosen, keep, bug); });
}
const char* run_tile_product(const uint16_t* a, const uint16_t* b, float* c, bool brain) {
  return guarded([&] {
    if (brain) {
      SPARSEKERN_LAUNCH(tile_product<__nv_bfloat16>, dim3(1), dim3(32), 1024, nullptr, a, b, c);
    } else {
      SPARSEKERN_LAUNCH(tile_product<__half>, dim3(1), dim3(32), 1024, nullptr, a, b, c);
    }
  });
}
const char* run_collectives(uint32_t* result) {
  return guarded([&] { SPARSEKERN_LAUNCH(collectives, dim3(1), dim3(32), 0, nullptr, result); });
}

}  // extern "C"
