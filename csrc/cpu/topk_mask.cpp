// Host side of topk_mask on CPU: an exact radix selection whose result does not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "dispatch.h"

namespace sparsekern {
namespace {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

constexpr int64_t kStatusNan = 1, kStatusTooFew = 2;
// Groups (or weights) per task; a multiple of 8, so that no two tasks share a mask byte.
constexpr int64_t kGrain = int64_t{1} << 15;
// The first level fits the first-level cache. Magnitudes lose their sign, which leaves exponent and 4 fraction bits.
constexpr TopkLevel kLevels[] = {{0, 20, 12}, {0, 10, 10}, {0, 0, 10}};
constexpr int kMaxBits = 12;

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "topk_mask: scores must be float32, bfloat16 or float16");
  }
}

// Consecutive tensors, cut into tasks of kGrain units.
struct Span {
  const TopkTensor* tensors;
  std::vector<int64_t> sizes, first_task;

  explicit Span(const TopkTensor* t, std::vector<int64_t> units) : tensors(t), sizes(std::move(units)) {
    first_task.push_back(0);
    for (int64_t size : sizes) first_task.push_back(first_task.back() + (size + kGrain - 1) / kGrain);
  }
  int64_t tasks() const { return first_task.back(); }

  // body(tensor, task, begin, end) for tasks [from, to).
  template <class F>
  void each(int64_t from, int64_t to, const F& body) const {
    size_t i = std::upper_bound(first_task.begin(), first_task.end(), from) - first_task.begin() - 1;
    for (int64_t task = from; task < to; ++task) {
      while (task >= first_task[i + 1]) ++i;
      const int64_t begin = (task - first_task[i]) * kGrain;
      body(tensors[i], task, begin, std::min(begin + kGrain, sizes[i]));
    }
  }
  template <class F>
  void parallel(const F& body) const {
    torch::stable::parallel_for(0, tasks(), 1, [&](int64_t from, int64_t to) { each(from, to, body); });
  }
};

std::vector<int64_t> histogram(const Span& span, const TopkLevel& level, bool& nan) {
  const int64_t size = int64_t{1} << level.bits;
  std::vector<int64_t> total(size, 0);
  std::mutex merging;
  const auto count = kernels().topk_histogram;
  torch::stable::parallel_for(0, span.tasks(), 1, [&](int64_t from, int64_t to) {
    std::vector<uint32_t> local(2 * size);
    bool found = false;
    // Flushed before a 32-bit counter can overflow.
    for (constexpr int64_t kBatch = int64_t{1} << 16; from < to; from += kBatch) {
      std::fill(local.begin(), local.end(), 0u);
      span.each(from, std::min(to, from + kBatch), [&](const TopkTensor& t, int64_t, int64_t begin, int64_t end) {
        count(t, level, begin, end, local.data(), &found);
      });
      const std::lock_guard<std::mutex> lock(merging);
      for (int64_t i = 0; i < size; ++i) total[i] += int64_t{local[i]} + local[size + i];
      nan = nan || found;
    }
  });
  return total;
}

// Writes the group bits of the `keep` best groups of all of `span`.
int64_t select(const Span& span, int64_t keep, int64_t groups) {
  if (groups == 0) return keep > 0 ? kStatusTooFew : 0;
  const int64_t wanted = std::clamp(keep, int64_t{0}, groups);
  bool nan = false;
  uint32_t threshold = 0xfffffffeu;  // above every number: keeps nothing
  int64_t needed = wanted, ties = 0;
  for (TopkLevel level : kLevels) {
    level.prefix = threshold;
    const std::vector<int64_t> counts = histogram(span, level, nan);
    if (nan) break;
    if (wanted == 0) break;
    int64_t bin = (int64_t{1} << level.bits) - 1;
    while (counts[bin] < needed) needed -= counts[bin--];
    threshold = (level.shift + level.bits == 32 ? 0u : threshold << level.bits) | static_cast<uint32_t>(bin);
    ties = counts[bin];
  }
  const int64_t status = (nan ? kStatusNan : 0) + (keep > groups ? kStatusTooFew : 0);
  if (nan) {
    threshold = 0xfffffffeu;
    needed = ties = 0;
  }
  std::vector<int64_t> allowed(span.tasks(), 0);
  const bool all = needed == ties && ties > 0;
  if (!all && needed > 0) {
    span.parallel([&](const TopkTensor& t, int64_t task, int64_t begin, int64_t end) {
      kernels().topk_ties(t, threshold, begin, end, &allowed[task]);
    });
    for (int64_t& n : allowed) needed -= n = std::min(n, needed);
  }
  const uint32_t least = threshold + (all ? 0 : 1);
  span.parallel([&](const TopkTensor& t, int64_t task, int64_t begin, int64_t end) {
    kernels().topk_choose(t, least, allowed[task], begin, end);
  });
  return status;
}

// `axis` is the block axis, or -1 for single weights. Fills `masks`, returns the status.
int64_t topk_mask_cpu(std::vector<Tensor> scores, std::vector<Tensor> masks, std::vector<int64_t> keep,
                      bool global_budget, int64_t axis, bool magnitude) {
  const size_t count = scores.size();
  STD_TORCH_CHECK(masks.size() == count && keep.size() == (global_budget ? 1 : count),
                  "topk_mask: scores, masks and keep must have one entry per tensor");
  STD_TORCH_CHECK(axis >= -1 && axis <= 1, "topk_mask: axis is ", axis, ", allowed are -1, 0 and 1");
  std::vector<TopkTensor> tensors(count);
  std::vector<int64_t> groups(count), weights(count);
  std::vector<std::vector<uint8_t>> chosen(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor &s = scores[i], &m = masks[i];
    weights[i] = s.numel();
    STD_TORCH_CHECK(s.is_contiguous(), "topk_mask: scores[", i, "] must be contiguous");
    STD_TORCH_CHECK(axis < 0 || s.dim() >= 2, "topk_mask: scores[", i, "] must have two dims or more");
    STD_TORCH_CHECK(
        m.scalar_type() == ScalarType::Byte && m.is_contiguous() && int64_t(m.numel()) == (weights[i] + 7) / 8,
        "topk_mask: masks[", i, "] must be contiguous uint8 with one bit per weight");
    TopkTensor& t = tensors[i];
    t = {s.const_data_ptr(), m.mutable_data_ptr<uint8_t>(), nullptr, 1, 1, dtype_of(s), axis >= 0, magnitude};
    t.chosen = t.mask;
    groups[i] = weights[i];
    if (axis < 0 || weights[i] == 0) continue;
    t.axis = s.size(axis);
    t.inner = weights[i] / s.size(0) / (axis ? t.axis : 1);
    groups[i] = (axis ? s.size(0) : 1) * ((t.axis + 3) / 4) * t.inner;
    chosen[i].resize((groups[i] + 7) / 8 + 1);
    t.chosen = chosen[i].data();
  }

  int64_t status = 0;
  if (global_budget) {
    int64_t total = 0;
    for (int64_t n : groups) total += n;
    status = select(Span(tensors.data(), groups), keep[0], total);
  } else {
    for (size_t i = 0; i < count; ++i) status |= select(Span(&tensors[i], {groups[i]}), keep[i], groups[i]);
  }
  if (axis >= 0) {
    Span(tensors.data(), weights).parallel([&](const TopkTensor& t, int64_t, int64_t begin, int64_t end) {
      kernels().topk_spread(t, begin, end);
    });
  }
  return status;
}

}  // namespace
}  // namespace sparsekern

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("_topk_mask_cpu", TORCH_BOX(&sparsekern::topk_mask_cpu)); }
