// Interface between the host code (g++, torch) and the kernels (nvcc, no torch): plain structs and functions.
// A function launches on `stream`, waits for nothing, and returns 0 or the error of CUDA.
#pragma once
#include <stdint.h>

#include "../cpu/simd/kernels.h"

namespace sparsekern::cuda {

// One number on the device, float64 if `wide`, else float32; absent where `at` is null.
struct DeviceScalar {
  const void* at;
  bool wide;
};

// One parameter of an optimizer step. `state` holds momentum, or both moments; `mask` is null for a dense parameter;
// `index` is its entry in the operand with one entry per parameter. `known_zero`: see sparsekern/ops/masked_sgd.py.
struct StepTensor {
  void* param;
  const void* grad;
  void* state[2];
  const uint8_t* mask;
  int64_t size;
  uint32_t first_block;  // of the launch, set by it
  uint32_t index : 30;
  uint32_t known_zero : 1;
  uint32_t aligned : 1;  // to 16 bytes, all of them; set by the launch
};

// In double; each kernel rounds them once to its compute type.
struct SgdStep {
  double negative_lr, mu, one_minus_dampening, weight_decay;
  bool nesterov, maximize, keep_pruned_momentum;
};

// One launch per 500 tensors of one type, and one that clears `fresh`, which has `count` entries.
int masked_sgd(Dtype dtype, StepTensor* tensors, int64_t count, const SgdStep& step, const uint8_t* fresh,
               DeviceScalar grad_scale, DeviceScalar found_inf, void* stream);
int clear_fresh(uint8_t* fresh, int64_t count, DeviceScalar found_inf, void* stream);

}  // namespace sparsekern::cuda
