// Host side of a CUDA operator: device, stream, errors. The same host code serves the emulated kernels of
// tests/emulator, which work on CPU tensors and are registered in a namespace of their own.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#ifndef SPARSEKERN_EMULATED
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

namespace sparsekern::cuda {

using torch::stable::Tensor;

#ifdef SPARSEKERN_EMULATED
#define SPARSEKERN_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(sparsekern_emulated, CPU, m)

inline bool on_device(const Tensor& t) { return t.is_cpu(); }

struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor&) {}
  void* stream = nullptr;
};
#else
#define SPARSEKERN_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(sparsekern, CUDA, m)

inline bool on_device(const Tensor& t) { return t.is_cuda(); }

// Makes the device of a tensor the current one; `stream` is torch's current stream there.
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor& t) : guard(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};
#endif

// `error` as the functions of kernels.h return it.
inline void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, op, ": CUDA error ", error, " at a launch");
}

}  // namespace sparsekern::cuda
