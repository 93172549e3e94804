// Host side of topk_mask on CUDA: checks, lays out, reserves memory, launches. Reads nothing from the device.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../topk_operands.h"
#include "host.h"
#include "kernels.h"

namespace sparsekern::cuda {
namespace {

using ScalarType = torch::headeronly::ScalarType;

struct Scores {
  std::vector<Tensor> dense;  // what the pointers point into
  std::vector<ScoreTensor> tensors;
  std::vector<int64_t> groups;  // of each tensor, the empty ones too
  bool wide = false;
};

// The order of groups: merged dims of the block tensor, outermost first, unless it is that of storage.
void set_order(ScoreTensor& t, const TopkLayout& layout) {
  t.dims = 0;
  if (layout.row_major) return;
  for (size_t d = 0; d < layout.sizes.size(); ++d) {
    const int64_t size = layout.sizes[d], stride = layout.strides[d];
    if (size == 1) continue;
    if (t.dims && t.strides[t.dims - 1] == stride * size) {
      t.sizes[t.dims - 1] *= size;
      t.strides[t.dims - 1] = stride;
      continue;
    }
    STD_TORCH_CHECK(t.dims < 8,
                    "topk_mask: scores with more than 8 dims in an order of their own need contiguous memory on CUDA");
    t.sizes[t.dims] = static_cast<uint32_t>(size);
    t.strides[t.dims++] = static_cast<uint32_t>(stride);
  }
}

void add_scores(Scores& all, const Tensor& given, const Tensor& mask, const std::optional<Tensor>& candidates,
                const Pattern& pattern) {
  const bool block = pattern.axis >= 0 && pattern.ratio.m == 0;
  const auto [s, order] = dense_scores(given);
  all.groups.push_back(0);
  if (s.numel() == 0) return;
  STD_TORCH_CHECK(s.numel() < INT32_MAX / 2, "topk_mask: a tensor of scores may have 2^30 weights on CUDA, not more");
  ScoreTensor t{};
  t.score = s.const_data_ptr();
  t.mask = mask.mutable_data_ptr<uint8_t>();
  t.candidates = candidates ? candidates->const_data_ptr<uint8_t>() : nullptr;
  t.weights = t.groups = static_cast<uint32_t>(s.numel());
  t.axis = pattern.axis < 0 ? 1 : static_cast<uint32_t>(s.size(pattern.axis));
  t.inner = t.axis > 1 ? static_cast<uint32_t>(s.stride(pattern.axis)) : t.weights;
  t.width = block ? 4 : 1;
  if (block) t.groups = t.weights / t.axis * ((t.axis + 3) / 4);
  t.dtype = dtype_of("topk_mask", s);
  set_order(t, layout_of(s, order, block ? pattern.axis : -1));
  all.wide = all.wide || (!block && t.dtype == Dtype::kFloat64);
  all.groups.back() = t.groups;
  all.tensors.push_back(t);
  all.dense.push_back(s);
}

// Segments and chunks; returns the number of chunks.
uint32_t number_chunks(Scores& all, const std::vector<int64_t>& keep, bool global_budget) {
  uint32_t chunks = 0;
  size_t next = 0;
  for (size_t i = 0; i < all.groups.size(); ++i) {
    if (all.groups[i] == 0) continue;
    ScoreTensor& t = all.tensors[next++];
    t.segment = global_budget ? 0 : static_cast<int32_t>(i);
    t.keep = keep.empty() ? 0 : keep[t.segment];
    t.first_chunk = chunks;
    t.segment_first = global_budget ? 0 : chunks;
    const int64_t own = (t.groups + kTopkChunk - 1) / kTopkChunk;
    STD_TORCH_CHECK(own + chunks < INT32_MAX, "topk_mask: scores are too many for one launch");
    chunks += static_cast<uint32_t>(own);
    t.segment_chunks = static_cast<uint32_t>(own);
  }
  for (ScoreTensor& t : all.tensors) t.segment_chunks = global_budget ? chunks : t.segment_chunks;
  return chunks;
}

void select(Scores& all, const std::vector<int64_t>& keep, bool global_budget, bool block, bool magnitude,
            const Tensor& like, int32_t* status, void* stream) {
  const int64_t chunks = number_chunks(all, keep, global_budget), segments = static_cast<int64_t>(keep.size());
  const int64_t slots = topk_passes(all.wide) * segments;
  int64_t bits = 0, keys = 0;
  for (const ScoreTensor& t : all.tensors) {
    bits += (t.groups + 31) / 32;
    keys += block ? t.groups : 0;
  }
  // All zero: states, histograms, tickets, bits. Unset: keys, counts.
  const int64_t words = slots * (kTopkBins + 1) + bits;
  Tensor zeros = torch::stable::new_zeros(like, {segments * int64_t{sizeof(TopkState)} / 4 + words}, ScalarType::Int);
  Tensor unset = torch::stable::new_empty(like, {keys + chunks * kTopkWarps}, ScalarType::Int);
  TopkSpace space{};
  space.states = static_cast<TopkState*>(zeros.mutable_data_ptr());
  space.histograms = reinterpret_cast<uint32_t*>(space.states + segments);
  space.tickets = space.histograms + slots * kTopkBins;
  uint32_t* next_bits = space.tickets + slots;
  uint32_t* next_keys = static_cast<uint32_t*>(unset.mutable_data_ptr());
  for (ScoreTensor& t : all.tensors) {
    t.bits = next_bits;
    t.keys = next_keys;
    next_bits += (t.groups + 31) / 32;
    next_keys += block ? t.groups : 0;
  }
  space.counts = next_keys;
  space.status = status;
  space.segments = static_cast<int32_t>(segments);
  check_launch("topk_mask", topk_mask(all.tensors.data(), static_cast<int64_t>(all.tensors.size()), space, all.wide,
                                      magnitude, stream));
}

std::tuple<std::vector<Tensor>, Tensor> topk_mask_cuda(std::vector<Tensor> scores, std::vector<int64_t> keep,
                                                       bool global_budget, std::string pattern, bool magnitude,
                                                       std::vector<std::optional<Tensor>> candidates) {
  const Pattern parsed = parse_pattern(pattern);
  check_topk(scores, keep, global_budget, parsed, candidates, on_device);
  const OnDeviceOf device(scores[0]);
  std::vector<Tensor> masks;
  Scores all;
  for (size_t i = 0; i < scores.size(); ++i) {
    const std::vector<int64_t> size{(static_cast<int64_t>(scores[i].numel()) + 7) / 8};
    masks.push_back(torch::stable::new_empty(scores[i], size, ScalarType::Byte));
    add_scores(all, scores[i], masks[i], candidates.empty() ? std::nullopt : candidates[i], parsed);
  }
  Tensor status = torch::stable::new_zeros(scores[0], {}, ScalarType::Int);
  int32_t* const flag = status.mutable_data_ptr<int32_t>();
  // Of what has no groups nothing runs, so nothing would tell that some are missing.
  bool missing = global_budget && keep[0] > 0 && all.tensors.empty();
  for (size_t i = 0; i < keep.size() && !global_budget; ++i) missing = missing || (keep[i] > 0 && all.groups[i] == 0);
  if (missing) torch::stable::fill_(status, 2);
  if (parsed.ratio.m) {
    number_chunks(all, {}, true);
    const auto limit = [](int64_t n) { return static_cast<uint32_t>(std::min(n, int64_t{INT32_MAX})); };
    check_launch("topk_mask", topk_n_of_m(all.tensors.data(), static_cast<int64_t>(all.tensors.size()), flag,
                                          limit(parsed.ratio.n), limit(parsed.ratio.m), magnitude, device.stream));
  } else if (!all.tensors.empty()) {
    select(all, keep, global_budget, parsed.axis >= 0, magnitude, scores[0], flag, device.stream);
  }
  return {masks, status};
}

}  // namespace
}  // namespace sparsekern::cuda

SPARSEKERN_CUDA_LIBRARY(m) { m.impl("topk_mask", TORCH_BOX(&sparsekern::cuda::topk_mask_cuda)); }
