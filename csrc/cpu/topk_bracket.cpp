// Brackets of thresholds for topk_mask on CPU: the sample and the hint. topk_sample.cpp uses them.
#include "topk_bracket.h"

#include <array>
#include <cmath>
#include <cstdlib>
#include <functional>

#include "dispatch.h"

namespace sparsekern {
namespace {

constexpr int64_t kMostSamples = int64_t{1} << 15;
// Below this many groups the passes of the radix selection stay in cache, and the sample would not pay.
constexpr int64_t kSampleFrom = int64_t{1} << 17;

// So many that the threshold lies between ten standard deviations of its rank, which take a 32nd of the groups; more of
// a long list, where collecting costs more than the sample.
int64_t sample_size(double share, int64_t total) {
  const int64_t precise = static_cast<int64_t>(320.0 * 320.0 * share * (1 - share));
  return std::min(std::max({precise, total / 1024, int64_t{1024}}), std::min(kMostSamples, total / 16));
}

// The keys of so many groups.
std::vector<uint32_t> sample(const TopkSpan& span, int64_t samples, int64_t total) {
  std::vector<int64_t> first{0};
  for (int64_t size : span.sizes) first.push_back(first.back() + size);
  std::vector<uint32_t> keys(samples);
  torch::stable::parallel_for(0, samples, 1024, [&](int64_t from, int64_t to) {
    // One group of each of the equal stretches, at a place that no period of the scores can follow.
    const double stretch = static_cast<double>(total) / static_cast<double>(samples);
    size_t tensor = 0;
    std::array<int64_t, 64> places;
    size_t held = 0;
    for (int64_t i = from; i < to; ++i) {
      uint64_t noise = static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15u;
      noise = (noise ^ noise >> 31) * 0xbf58476d1ce4e5b9u;
      const double place = static_cast<double>(noise >> 40) * 0x1p-24;
      const int64_t at = std::min(static_cast<int64_t>((static_cast<double>(i) + place) * stretch), total - 1);
      if (held == places.size() || at >= first[tensor + 1]) {
        kernels().topk_gather(span.tensors[tensor], places.data(), held, &keys[i - held]);
        held = 0;
      }
      while (at >= first[tensor + 1]) ++tensor;
      places[held++] = at - first[tensor];
    }
    kernels().topk_gather(span.tensors[tensor], places.data(), held, &keys[to - held]);
  });
  return keys;
}

// Keys between which the threshold lies but for one case in a million; none if too much would lie there with it.
// Changes the order of the sample.
std::optional<Bracket> sample_bracket(std::vector<uint32_t>& keys, double share) {
  const int64_t samples = static_cast<int64_t>(keys.size());
  const double count = static_cast<double>(samples);
  const double margin = 5 * std::sqrt(share * (1 - share) * count) + 2;
  const int64_t best = static_cast<int64_t>(share * count - margin);
  const int64_t worst = static_cast<int64_t>(share * count + margin);
  // From the lower rank to the higher, which then lies in the part sorted out before it.
  const auto nth = [&](int64_t n, int64_t end) {
    std::nth_element(keys.begin(), keys.begin() + n, keys.begin() + end, std::greater<>());
    return keys[n];
  };
  Bracket bracket{1, 0xfffffffeu, 0, 0};
  if (worst < samples) bracket.lo = std::max(nth(worst, samples), 1u);
  if (best > 0) bracket.hi = nth(best, std::min(worst, samples));
  const int64_t room = samples / kCollectedShare;
  int64_t within = 0, lowest = 0, highest = 0;
  for (uint32_t key : keys) {
    within += (key >= bracket.lo) & (key <= bracket.hi);
    lowest += key == bracket.lo;
    highest += key == bracket.hi;
  }
  if (within > room && lowest > room / 2) {
    within -= lowest;
    bracket.below = bracket.lo++;
  }
  if (within > room && highest > room / 2) {
    within -= highest;
    bracket.over = bracket.hi--;
  }
  if (within > room) return std::nullopt;
  return bracket;
}

}  // namespace

std::vector<std::optional<Bracket>> topk_sampled(const TopkSpan& span, const std::vector<int64_t>& keep,
                                                 int64_t total) {
  std::vector<std::optional<Bracket>> found(keep.size());
  if (total < kSampleFrom || span.tensors[0].wide) return found;
  const auto share = [&](int64_t count) { return static_cast<double>(count) / static_cast<double>(total); };
  int64_t samples = 0;
  for (int64_t count : keep) samples = std::max(samples, sample_size(share(count), total));
  std::vector<uint32_t> keys = sample(span, samples, total);
  for (size_t i = 0; i < keep.size(); ++i) found[i] = sample_bracket(keys, share(keep[i]));
  return found;
}

std::optional<Bracket> topk_hinted(const TopkSpan& span, const TopkHint* hint) {
  constexpr int64_t kLast = 0xfffffffe;
  if (!hint || span.tensors[0].wide || hint->key < 1 || hint->key > kLast || hint->reach < 1) return std::nullopt;
  const int64_t reach = std::min(hint->reach, kLast);
  return Bracket{static_cast<uint32_t>(std::max(hint->key - reach, int64_t{1})),
                 static_cast<uint32_t>(std::min(hint->key + reach, kLast)), 0, 0};
}

void topk_follow(TopkHint& hint, int64_t key, double density, int64_t total) {
  // Four times as far as this threshold lies from the last, and not much nearer than last time; nowhere if a sample
  // would bracket it in fewer groups.
  constexpr int64_t kFirst = 1 << 13, kLeast = 16, kMost = int64_t{1} << 31;
  int64_t reach = kFirst;
  if (0 < hint.key && hint.key <= 2 * kMost) {
    reach = std::max({4 * std::abs(key - hint.key), std::min(hint.reach, kMost) / 4 * 3, kLeast});
  }
  if (2 * static_cast<double>(reach) * density > static_cast<double>(total) / 64) reach = 0;
  hint = {key, reach};
}

}  // namespace sparsekern
