// Host side of the masked optimizer steps on CPU: checks of their operands, and the whole list split over threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "../step_operands.h"

namespace sparsekern {

// The number in grad_scale or found_inf; `op` names the operator in errors, here and below.
double step_scalar(const char* op, const Tensor& t);

// params[i] is on the CPU and fills its memory.
void check_step_param(const char* op, const std::vector<Tensor>& params, size_t i);

// Whether results that are no operand themselves are better written past the caches: too many to be found there, and on
// a cache line.
inline bool past_caches(Dtype dtype, const void* output, int64_t elements) {
  constexpr int64_t kLarge = int64_t{1} << 18;
  return dtype == Dtype::kFloat32 && elements >= kLarge && reinterpret_cast<uintptr_t>(output) % 64 == 0;
}

// Elements per task: 32 Ki, that is 640 KiB of float32 traffic, and a multiple of the 16 lanes that share mask bytes.
constexpr int64_t kStepGrain = int64_t{1} << 15;

// body(tensor, begin, end) over the elements of all tensors, in parallel over the list as a whole. Threads take what is
// next when they are done, because sparse layers take a fraction of the time of others of their size: at first up to 16
// tasks, since each fresh start waits for memory, in the end single ones.
// Ranges begin at multiples of `grains`, by tensor.
template <class F>
void step_list(const std::vector<Tensor>& params, const std::vector<int64_t>& grains, const F& body) {
  std::vector<int64_t> first_task{0};
  int64_t elements = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    elements += params[i].numel();
    first_task.push_back(first_task.back() + (params[i].numel() + grains[i] - 1) / grains[i]);
  }
  const int64_t tasks = first_task.back();
  const auto run = [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first_task.begin(), first_task.end(), begin) - first_task.begin() - 1;
    while (begin < end) {
      while (begin >= first_task[i + 1]) ++i;
      const int64_t until = std::min(end, first_task[i + 1]), size = params[i].numel();
      body(i, (begin - first_task[i]) * grains[i], std::min((until - first_task[i]) * grains[i], size));
      begin = until;
    }
  };
  // Many small tensors are not worth waking a thread for: a thread gets kStepGrain elements at least.
  const int64_t workers = std::clamp<int64_t>(elements / kStepGrain, 1, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    int64_t begin = next.load(), take = 0;
    while (begin < tasks) {
      take = std::clamp<int64_t>((tasks - begin) / (4 * workers), 1, 16);
      if (!next.compare_exchange_weak(begin, begin + take)) continue;
      run(begin, begin + take);
      begin = next.load();
    }
  });
}

template <class F>
void step_list(const std::vector<Tensor>& params, const F& body) {
  step_list(params, std::vector<int64_t>(params.size(), kStepGrain), body);
}

}  // namespace sparsekern
