// A list of score tensors as the parameter of a launch in which each block works on one chunk.
#pragma once
#include "device.cuh"
#include "kernels.h"

namespace sparsekern::cuda {
namespace {

constexpr int kTopkTensors = 170;

struct TopkBatch {
  ScoreTensor tensors[kTopkTensors];
  int32_t count;
  uint32_t first_chunk;
};
static_assert(sizeof(TopkBatch) <= 32000, "kernel parameters end at 32764 bytes");

// The number of this block's chunk in the whole list.
__device__ __forceinline__ uint32_t chunk_of(const TopkBatch& batch) { return batch.first_chunk + blockIdx.x; }

__device__ __forceinline__ const ScoreTensor& chunk_tensor(const TopkBatch& batch) {
  int low = 0, high = batch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.tensors[middle].first_chunk <= chunk_of(batch) ? low : high) = middle;
  }
  return batch.tensors[low];
}

inline uint32_t chunks_of(const ScoreTensor& t) { return (t.groups + kTopkChunk - 1) / kTopkChunk; }

// launch(batch, grid) for all tensors, none of them empty; stops at an error.
template <class F>
void each_batch(const ScoreTensor* tensors, int64_t count, int& error, const F& launch) {
  TopkBatch batch;
  for (int64_t i = 0; i < count && !error;) {
    uint32_t blocks = 0;
    batch.first_chunk = tensors[i].first_chunk;
    for (batch.count = 0; i < count && batch.count < kTopkTensors; ++i) {
      blocks += chunks_of(tensors[i]);
      batch.tensors[batch.count++] = tensors[i];
    }
    launch(batch, dim3(blocks));
    error = launch_status();
  }
}

}  // namespace
}  // namespace sparsekern::cuda
