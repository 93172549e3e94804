// Operands of topk_mask on any device: what a pattern means, where the groups of a tensor lie, checks. Header only: two
// libraries use it. The contract is sparsekern/ops/topk_mask.py.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dtype_of.h"

namespace sparsekern {

// `axis` is the block axis, or -1 for single weights; a ratio has m > 0.
struct Pattern {
  int64_t axis;
  TopkRatio ratio;
};

inline Pattern parse_pattern(const std::string& name) {
  if (name == "unstructured") return {-1, {0, 0}};
  if (name == "4x1") return {0, {0, 0}};
  if (name == "1x4" || name == "block4") return {1, {0, 0}};
  TopkRatio ratio{0, 0};
  const size_t colon = name.find(':');
  const auto number = [&](size_t from, size_t to) {
    int64_t value = 0;
    for (size_t i = from; i < to; ++i) {
      const bool digit = name[i] >= '0' && name[i] <= '9';
      STD_TORCH_CHECK(digit, "topk_mask: pattern='", name, "' is unknown");
      // No axis is that long, so nothing changes beyond.
      value = std::min(value * 10 + (name[i] - '0'), int64_t{1} << 50);
    }
    return value;
  };
  if (colon != std::string::npos) ratio = {number(0, colon), number(colon + 1, name.size())};
  STD_TORCH_CHECK(1 <= ratio.n && ratio.n <= ratio.m, "topk_mask: pattern='", name, "' is unknown");
  return {1, ratio};
}

// Dims longer than 1, outermost in memory first; empty if the tensor has gaps or overlaps.
inline std::optional<std::vector<int64_t>> dense_order(const Tensor& t) {
  std::vector<int64_t> order;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) > 1) order.push_back(d);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return t.stride(a) > t.stride(b); });
  int64_t expected = 1;
  for (size_t i = order.size(); i-- > 0; expected *= t.size(order[i])) {
    if (t.stride(order[i]) != expected) return std::nullopt;
  }
  return order;
}

// The scores, copied if they have gaps or overlaps, in the layout that the mask counts in; and their order.
inline std::pair<Tensor, std::vector<int64_t>> dense_scores(const Tensor& given) {
  if (auto order = dense_order(given)) return {given, *order};
  if (given.numel() == 0) return {given, {}};
  Tensor copy = torch::stable::empty_like(given);
  torch::stable::copy_(copy, given);
  return {copy, dense_order(copy).value()};
}

// Where the groups of one tensor lie: sizes and strides of the block tensor in logical order of its dims.
struct TopkLayout {
  std::vector<int64_t> sizes, strides;
  bool row_major;
};

constexpr int64_t kTopkNan = 1, kTopkTooFew = 2;

// Where the blocks of one dense tensor lie.
inline TopkLayout layout_of(const Tensor& s, const std::vector<int64_t>& order, int64_t axis) {
  TopkLayout layout{{}, std::vector<int64_t>(s.dim(), 0), true};
  for (int64_t d = 0; d < s.dim(); ++d) layout.sizes.push_back(d == axis ? (s.size(d) + 3) / 4 : s.size(d));
  int64_t stride = 1, inner = s.dim();
  for (size_t i = order.size(); i-- > 0;) {
    const int64_t d = order[i];
    layout.strides[d] = stride;
    stride *= layout.sizes[d];
    if (layout.sizes[d] == 1) continue;
    layout.row_major = layout.row_major && d < inner;
    inner = d;
  }
  return layout;
}

// `on_device` tells whether a tensor is where the kernels work.
template <class F>
void check_topk(const std::vector<Tensor>& scores, const std::vector<int64_t>& keep, bool global_budget,
                const Pattern& pattern, const std::vector<std::optional<Tensor>>& candidates, const F& on_device) {
  const size_t count = scores.size();
  STD_TORCH_CHECK(keep.size() == (pattern.ratio.m ? 0
                                  : global_budget ? 1
                                                  : count),
                  "topk_mask: keep must have one entry for a global budget, else one per tensor, and none for n:m");
  STD_TORCH_CHECK(candidates.empty() || candidates.size() == count,
                  "topk_mask: candidates must be empty or have one entry per tensor");
  for (int64_t k : keep) STD_TORCH_CHECK(k >= 0, "topk_mask: keep is ", k, ", expected 0 or more");
  for (size_t i = 0; i < count; ++i) {
    const Tensor& s = scores[i];
    STD_TORCH_CHECK(on_device(s), "topk_mask: scores[", i, "] must be on the device of scores[0]");
    STD_TORCH_CHECK(pattern.axis < 0 || s.dim() >= 2, "topk_mask: scores[", i, "] must have two dims or more");
    if (candidates.empty() || !candidates[i]) continue;
    const Tensor& c = *candidates[i];
    STD_TORCH_CHECK(on_device(c) && c.scalar_type() == torch::headeronly::ScalarType::Byte && c.is_contiguous() &&
                        c.numel() == (s.numel() + 7) / 8,
                    "topk_mask: candidates[", i, "] must be contiguous uint8 with one bit per weight");
  }
}

}  // namespace sparsekern
