// Selection for topk_mask on CPU: consecutive score tensors, cut into tasks that share no mask byte.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "../topk_operands.h"
#include "simd/kernels.h"

namespace sparsekern {

// Groups (or weights) per task: 128 KiB of float32 scores. A multiple of 64, as the kernels ask, and at most 2^16.
constexpr int64_t kTopkGrain = int64_t{1} << 15;

struct TopkSpan {
  const TopkTensor* tensors;
  std::vector<int64_t> sizes, first_task;

  TopkSpan(const TopkTensor* t, std::vector<int64_t> units) : tensors(t), sizes(std::move(units)) {
    first_task.push_back(0);
    for (int64_t size : sizes) first_task.push_back(first_task.back() + (size + kTopkGrain - 1) / kTopkGrain);
  }
  int64_t tasks() const { return first_task.back(); }

  // body(tensor, task, begin, end) for tasks [from, to).
  template <class F>
  void each(int64_t from, int64_t to, const F& body) const {
    size_t i = std::upper_bound(first_task.begin(), first_task.end(), from) - first_task.begin() - 1;
    for (int64_t task = from; task < to; ++task) {
      while (task >= first_task[i + 1]) ++i;
      const int64_t begin = (task - first_task[i]) * kTopkGrain;
      body(tensors[i], task, begin, std::min(begin + kTopkGrain, sizes[i]));
    }
  }
  template <class F>
  void parallel(const F& body) const {
    torch::stable::parallel_for(0, tasks(), 1, [&](int64_t from, int64_t to) { each(from, to, body); });
  }
};

// `needed` of the `ties` groups at `key` are chosen, and all above.
struct TopkThreshold {
  uint64_t key;
  int64_t needed, ties;
};

// The keys on both sides of a choice: the lowest chosen, the highest left.
struct TopkBounds {
  uint64_t chosen, left;
};

// The tensor whose ties are chosen in part, if its logical order is not that of its storage.
struct TopkSplit {
  size_t tensor;
  int64_t needed;
};

// Cuts the ties of each task down to those chosen, first come first served; those of a split tensor to none.
std::optional<TopkSplit> topk_share(const TopkSpan& span, const TopkLayout* layouts, int64_t needed,
                                    std::vector<int64_t>& ties);

// Chooses the ties of the split tensor in logical order, by walking a bitmap of them along the strides. Seldom needed.
void topk_choose_ties(const TopkSpan& span, const TopkLayout* layouts, const TopkSplit& split, uint64_t key);

// What a caller keeps for a choice among scores that move little from call to call: the threshold's key, 0 before the
// first call, and how far from it the next one is looked for first, 0 for nowhere.
struct TopkHint {
  int64_t key, reach;
};

// Writes the group bits of the `keep` best groups where the threshold is `key`; none, and no valid bits, if it is not.
std::optional<int64_t> topk_choose_at(const TopkSpan& span, const TopkLayout* layouts, uint64_t key, int64_t keep);

// topk_select for spans of the same scores, each with masks and a count of its own, 0 < keep < total, by one pass; none
// where neither hints nor sampling serve. `hints`, null or one for each, follow the thresholds found.
std::vector<std::optional<int64_t>> topk_sample_select(const std::vector<const TopkSpan*>& spans,
                                                       const TopkLayout* layouts, const std::vector<int64_t>& keep,
                                                       int64_t total, const std::vector<TopkHint*>& hints);

// Both bounds of 0 < keep < total in one pass, which writes to `chosen` of the tensors; none where sampling does not
// serve.
std::optional<TopkBounds> topk_sample_bounds(const TopkSpan& span, int64_t keep, int64_t total);

// Likewise for any scores; `nan`: there is one, and no bounds.
TopkBounds topk_bounds(const TopkSpan& span, int64_t keep, bool& nan);

// Writes the group bits of the `keep[i]` best groups of all of `spans[i]`, which have the same scores, each its masks;
// returns the status of the operator. `hints`: null, or one for each.
int64_t topk_select(const std::vector<const TopkSpan*>& spans, const TopkLayout* layouts,
                    const std::vector<int64_t>& keep, TopkHint* hints = nullptr);

}  // namespace sparsekern
