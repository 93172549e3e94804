// Host side of topk_mask, topk_nested and topk_bounds on CPU: checks, lays out, selects. The contracts are their files
// in sparsekern/ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "topk_select.h"

namespace sparsekern {
namespace {

using ScalarType = torch::headeronly::ScalarType;

struct Scores {
  std::vector<Tensor> dense;
  std::vector<TopkTensor> tensors;
  std::vector<TopkLayout> layouts;
  std::vector<int64_t> groups, weights;
  std::vector<std::vector<uint8_t>> chosen, allowed;  // group bits, for blocks only
};

void add_scores(Scores& all, const Tensor& given, const Tensor& mask, const std::optional<Tensor>& candidates,
                const Pattern& pattern, bool magnitude) {
  const bool block = pattern.axis >= 0 && pattern.ratio.m == 0;
  const auto [s, order] = dense_scores(given);
  const int64_t weights = s.numel();
  TopkTensor t{s.const_data_ptr(),
               mask.mutable_data_ptr<uint8_t>(),
               mask.mutable_data_ptr<uint8_t>(),
               candidates ? candidates->const_data_ptr<uint8_t>() : nullptr,
               1,
               1,
               dtype_of("topk_mask", s),
               block,
               magnitude,
               false,
               1};
  int64_t groups = weights;
  TopkLayout layout{{}, {}, true};
  if (weights > 0) {
    layout = layout_of(s, order, block ? pattern.axis : -1);
    if (pattern.axis >= 0) {
      t.axis = s.size(pattern.axis);
      t.inner = t.axis > 1 ? s.stride(pattern.axis) : weights;
    }
    if (block) groups = weights / t.axis * ((t.axis + 3) / 4);
  }
  all.dense.push_back(s);
  all.tensors.push_back(t);
  all.layouts.push_back(layout);
  all.groups.push_back(groups);
  all.weights.push_back(weights);
}

// Group bits of block patterns are kept apart from the mask's.
void add_group_bits(Scores& all) {
  all.chosen.resize(all.tensors.size());
  all.allowed.resize(all.tensors.size());
  for (size_t i = 0; i < all.tensors.size(); ++i) {
    TopkTensor& t = all.tensors[i];
    all.chosen[i].resize((all.groups[i] + 7) / 8 + 8);  // topk_spread reads whole words
    t.chosen = all.chosen[i].data();
    if (!t.allowed) continue;
    all.allowed[i].resize((all.groups[i] + 7) / 8);
    uint8_t* const out = all.allowed[i].data();
    TopkSpan(&t, {all.groups[i]}).parallel([&](const TopkTensor&, int64_t, int64_t begin, int64_t end) {
      kernels().topk_gather_bits(t, t.allowed, begin, end, out);
    });
    t.allowed = out;
  }
}

// The best groups of each tensor.
int64_t select_each(const Scores& all, const std::vector<int64_t>& keep) {
  std::atomic<int64_t> status{0};
  const auto one = [&](size_t i) {
    const TopkSpan span(&all.tensors[i], {all.groups[i]});
    status |= topk_select({&span}, &all.layouts[i], {keep[i]});
  };
  // Very large tensors one by one, each on all threads; then the others side by side, the largest first.
  const int64_t total = std::accumulate(all.groups.begin(), all.groups.end(), int64_t{0});
  std::vector<size_t> rest;
  for (size_t i = 0; i < all.tensors.size(); ++i) {
    if (all.groups[i] > std::max(total / 8, 4 * kTopkGrain)) {
      one(i);
    } else {
      rest.push_back(i);
    }
  }
  std::sort(rest.begin(), rest.end(), [&](size_t a, size_t b) { return all.groups[a] > all.groups[b]; });
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, static_cast<int64_t>(rest.size()), 1, [&](int64_t, int64_t) {
    // Whoever is free takes the next, whatever the range says.
    for (size_t i = next++; i < rest.size(); i = next++) one(rest[i]);
  });
  return status;
}

// The best groups of the whole list, once for each count; `all[i]` has the masks for it.
int64_t select_global(const std::vector<Scores>& all, const std::vector<int64_t>& keep, TopkHint* hints = nullptr) {
  std::vector<TopkSpan> spans;
  std::vector<const TopkSpan*> each;
  for (const Scores& scores : all) spans.emplace_back(scores.tensors.data(), scores.groups);
  for (const TopkSpan& span : spans) each.push_back(&span);
  return topk_select(each, all[0].layouts.data(), keep, hints);
}

// Group bits to those of weights.
void spread(const Scores& all) {
  TopkSpan(all.tensors.data(), all.weights).parallel([&](const TopkTensor& t, int64_t, int64_t begin, int64_t end) {
    kernels().topk_spread(t, begin, end);
  });
}

// The masks must be zero.
int64_t select_ratio(const Scores& all, TopkRatio ratio) {
  std::atomic<bool> nan{false};
  for (size_t i = 0; i < all.tensors.size(); ++i) {
    const TopkTensor& t = all.tensors[i];
    if (all.weights[i] == 0) continue;
    const TopkRatio capped{std::min(ratio.n, t.axis), std::min(ratio.m, t.axis)};
    const int64_t slice = t.axis * t.inner, outer = all.weights[i] / slice;
    // Eight slices end at a byte.
    const int64_t grain = std::max(int64_t{8}, kTopkGrain / slice / 8 * 8);
    torch::stable::parallel_for(0, (outer + grain - 1) / grain, 1, [&](int64_t from, int64_t to) {
      std::vector<uint64_t> tile(64 * capped.m);
      bool found = false;
      kernels().topk_n_of_m(t, capped, from * grain, std::min(to * grain, outer), tile.data(), &found);
      if (found) nan = true;
    });
  }
  return nan ? kTopkNan : 0;
}

// The scores with new masks, which are appended to `masks`.
Scores with_masks(const std::vector<Tensor>& scores, const std::vector<std::optional<Tensor>>& candidates,
                  const Pattern& pattern, bool magnitude, std::vector<Tensor>& masks) {
  Scores all;
  bool wide = false;
  for (size_t i = 0; i < scores.size(); ++i) {
    const std::vector<int64_t> size{(static_cast<int64_t>(scores[i].numel()) + 7) / 8};
    masks.push_back(pattern.ratio.m ? torch::stable::new_zeros(scores[i], size, ScalarType::Byte)
                                    : torch::stable::new_empty(scores[i], size, ScalarType::Byte));
    add_scores(all, scores[i], masks.back(), candidates.empty() ? std::nullopt : candidates[i], pattern, magnitude);
    wide = wide || (!all.tensors[i].block && all.tensors[i].dtype == Dtype::kFloat64);
  }
  for (TopkTensor& t : all.tensors) t.wide = wide;
  if (pattern.axis >= 0 && pattern.ratio.m == 0) add_group_bits(all);
  return all;
}

Tensor status_of(const Tensor& like, int64_t found) {
  Tensor status = torch::stable::new_empty(like, {}, ScalarType::Int);
  *status.mutable_data_ptr<int32_t>() = static_cast<int32_t>(found);
  return status;
}

std::tuple<std::vector<Tensor>, Tensor> topk_mask_cpu(std::vector<Tensor> scores, std::vector<int64_t> keep,
                                                      bool global_budget, std::string pattern, bool magnitude,
                                                      std::vector<std::optional<Tensor>> candidates) {
  const Pattern parsed = parse_pattern(pattern);
  check_topk(scores, keep, global_budget, parsed, candidates, [](const Tensor& t) { return t.is_cpu(); });
  std::vector<Tensor> masks;
  std::vector<Scores> all(1);
  all[0] = with_masks(scores, candidates, parsed, magnitude, masks);
  const int64_t found = parsed.ratio.m  ? select_ratio(all[0], parsed.ratio)
                        : global_budget ? select_global(all, keep)
                                        : select_each(all[0], keep);
  if (!all[0].chosen.empty()) spread(all[0]);
  return {masks, status_of(scores[0], found)};
}

// A copy of the hint, which is to follow the thresholds; zeros without one.
Tensor next_hint(const Tensor& like, const std::optional<Tensor>& hint, size_t count) {
  const int64_t size = static_cast<int64_t>(2 * count);
  Tensor next = torch::stable::new_zeros(like, {static_cast<int64_t>(count), 2}, ScalarType::Long);
  if (!hint) return next;
  STD_TORCH_CHECK(hint->is_cpu() && hint->scalar_type() == ScalarType::Long && hint->is_contiguous() &&
                      hint->dim() == 2 && hint->numel() == size,
                  "topk_nested: hint must be contiguous int64 of shape (", count, ", 2) on the CPU");
  std::copy_n(hint->const_data_ptr<int64_t>(), size, next.mutable_data_ptr<int64_t>());
  return next;
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> topk_nested_cpu(std::vector<Tensor> scores, std::vector<int64_t> keep,
                                                                std::string pattern, bool magnitude,
                                                                std::optional<Tensor> hint) {
  const Pattern parsed = parse_pattern(pattern);
  STD_TORCH_CHECK(!scores.empty() && !keep.empty(), "topk_nested: scores and keep must hold at least one entry");
  STD_TORCH_CHECK(!parsed.ratio.m, "topk_nested: pattern='", pattern, "' has no count");
  for (int64_t k : keep) {
    check_topk(scores, {k}, true, parsed, {}, [](const Tensor& t) { return t.is_cpu(); });
  }
  std::vector<Tensor> masks, given = scores;
  std::vector<Scores> all;
  for (size_t i = 0; i < keep.size(); ++i) {
    all.push_back(with_masks(given, {}, parsed, magnitude, masks));
    given = all[0].dense;  // copied once
  }
  Tensor next = next_hint(scores[0], hint, keep.size());
  // Its rows are pairs of numbers as a TopkHint is.
  auto* const hints = hint ? reinterpret_cast<TopkHint*>(next.mutable_data_ptr<int64_t>()) : nullptr;
  const int64_t found = select_global(all, keep, hints);
  for (const Scores& each : all) {
    if (!each.chosen.empty()) spread(each);
  }
  return {masks, status_of(scores[0], found), next};
}

double magnitude_of(uint64_t key, bool wide) {
  if (!wide) return std::bit_cast<float>(static_cast<uint32_t>(key - 1));
  return std::bit_cast<double>(key - 1);
}

Tensor topk_bounds_cpu(std::vector<Tensor> scores, int64_t keep, std::vector<double> factors) {
  Scores all;
  int64_t total = 0;
  bool wide = false, nan = false;
  std::vector<Tensor> masks;
  STD_TORCH_CHECK(!scores.empty(), "topk_bounds: scores must hold at least one tensor");
  for (const Tensor& s : scores) {
    STD_TORCH_CHECK(s.is_cpu(), "topk_bounds: scores must be on the CPU");
    masks.push_back(torch::stable::new_empty(s, {(static_cast<int64_t>(s.numel()) + 7) / 8}, ScalarType::Byte));
    add_scores(all, s, masks.back(), std::nullopt, parse_pattern("unstructured"), true);
    wide = wide || all.tensors.back().dtype == Dtype::kFloat64;
    total += s.numel();
  }
  STD_TORCH_CHECK(0 <= keep && keep <= total, "topk_bounds: keep must be from 0 to the number of scores");
  STD_TORCH_CHECK(factors.empty() || factors.size() == scores.size(), "topk_bounds: factors must match scores");
  for (size_t i = 0; i < scores.size(); ++i) {
    all.tensors[i].wide = wide;
    if (!factors.empty()) all.tensors[i].factor = factors[i];
  }
  const TopkSpan span(all.tensors.data(), all.groups);
  double chosen = std::numeric_limits<double>::infinity(), left = -chosen;
  if (0 < keep && keep < total) {
    std::optional<TopkBounds> found = topk_sample_bounds(span, keep, total);
    if (!found) found = topk_bounds(span, keep, nan);
    chosen = magnitude_of(found->chosen, wide);
    left = magnitude_of(found->left, wide);
  } else if (total > 0) {
    const TopkBounds found = topk_bounds(span, keep ? total : 1, nan);
    (keep ? chosen : left) = magnitude_of(found.chosen, wide);
  }
  Tensor result = torch::stable::new_empty(scores[0], {2}, ScalarType::Double);
  result.mutable_data_ptr<double>()[0] = nan ? std::numeric_limits<double>::quiet_NaN() : chosen;
  result.mutable_data_ptr<double>()[1] = nan ? std::numeric_limits<double>::quiet_NaN() : left;
  return result;
}

}  // namespace
}  // namespace sparsekern

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("topk_mask", TORCH_BOX(&sparsekern::topk_mask_cpu));
  m.impl("topk_nested", TORCH_BOX(&sparsekern::topk_nested_cpu));
  m.impl("topk_bounds", TORCH_BOX(&sparsekern::topk_bounds_cpu));
}
