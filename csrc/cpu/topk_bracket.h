// Where the selection of topk_mask on CPU looks for a threshold: keys between which it most likely lies, by a sample of
// the scores or by where it lay in the last call.
#pragma once
#include <optional>
#include <vector>

#include "topk_select.h"

namespace sparsekern {

// Of so many groups one may lie in a bracket. Collected groups take 6 bytes each: at most a sixteenth of the size of
// float32 scores.
constexpr int64_t kCollectedShare = 24;

// Keys in [lo, hi] are collected. `below` and `over`, where not 0, are keys next to those that are only counted.
struct Bracket {
  uint32_t lo, hi, below, over;
};

// By a sample, for the choice of the best keep[i] of `total` groups; none at [i] if too much would lie there with the
// threshold, or where a sample does not pay.
std::vector<std::optional<Bracket>> topk_sampled(const TopkSpan& span, const std::vector<int64_t>& keep, int64_t total);

// Around the last threshold; none if there is no hint, or one that says so. Whoever wrote it, keys in it are valid.
std::optional<Bracket> topk_hinted(const TopkSpan& span, const TopkHint* hint);

// The threshold was `key`; of `total` groups, if known, its bracket held `density` for each key.
void topk_follow(TopkHint& hint, int64_t key, double density = 0, int64_t total = 0);

}  // namespace sparsekern
