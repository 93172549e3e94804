// Selection for topk_mask on CPU in one pass over the scores. A sample brackets the threshold; the pass writes the bits
// of all that lies above the bracket and collects what lies inside, a few per cent, where the rest is settled. Where so
// many scores share one value that too much would be collected, that value bounds the bracket and is only counted.
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <deque>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>

#include "dispatch.h"
#include "topk_select.h"

namespace sparsekern {
namespace {

constexpr int64_t kMostSamples = int64_t{1} << 15;
// Below this many groups the passes of the radix selection stay in cache, and the sample would not pay.
constexpr int64_t kSampleFrom = int64_t{1} << 17;
// Collected groups take 6 bytes each: at most a sixteenth of the size of float32 scores.
constexpr int64_t kCollectedShare = 24;

// Keys in [lo, hi] are collected. `below` and `over`, where not 0, are keys next to those that are only counted.
struct Bracket {
  uint32_t lo, hi, below, over;
};

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

// What one thread collected from tasks [from, to). There is room for the most; pages never written are no memory.
struct Piece {
  int64_t from, to, count;
  std::unique_ptr<uint32_t[]> keys;
  std::unique_ptr<uint16_t[]> places;
};

struct Scan {
  std::vector<Piece> pieces;
  std::vector<int64_t> within;  // by task
  std::atomic<int64_t> above{0}, collected{0};
  std::atomic<bool> nan{false};
};

// One of several choices among the same scores: `span` has the masks that it writes.
struct Choice {
  const TopkSpan& span;
  int64_t keep;
  std::optional<Bracket> bracket;
  Scan found;
};

// All choices that have a bracket, task by task: what the first reads, the others find in the cache.
void scan(std::vector<Choice*> choices, int64_t room) {
  std::erase_if(choices, [](const Choice* c) { return !c->bracket; });
  if (choices.empty()) return;
  const TopkSpan& span = choices[0]->span;
  for (Choice* c : choices) c->found.within.assign(span.tasks(), 0);
  std::mutex merging;
  const auto kernel = kernels().topk_scan;
  torch::stable::parallel_for(0, span.tasks(), 1, [&](int64_t from, int64_t to) {
    const int64_t most = std::min(room, (to - from) * kTopkGrain) + kTopkGrain;
    std::vector<Piece> pieces;
    for (size_t i = 0; i < choices.size(); ++i) {
      pieces.push_back({from, to, 0, std::make_unique_for_overwrite<uint32_t[]>(most),
                        std::make_unique_for_overwrite<uint16_t[]>(most)});
    }
    span.each(from, to, [&](const TopkTensor& t, int64_t task, int64_t begin, int64_t end) {
      for (size_t i = 0; i < choices.size(); ++i) {
        const auto& [own, keep, bracket, ignored] = *choices[i];
        Scan& result = choices[i]->found;
        if (result.collected > room) continue;
        Piece& piece = pieces[i];
        TopkFound found;
        kernel(own.tensors[&t - span.tensors], bracket->lo, bracket->hi, begin, end, &piece.keys[piece.count],
               &piece.places[piece.count], &found);
        result.above += found.above;
        result.collected += result.within[task] = found.within;
        if (found.nan) result.nan = true;
        piece.count += found.within;
      }
    });
    const std::lock_guard<std::mutex> lock(merging);
    for (size_t i = 0; i < choices.size(); ++i) choices[i]->found.pieces.push_back(std::move(pieces[i]));
  });
}

// The n-th highest of all collected keys.
TopkThreshold collected_threshold(const std::vector<Piece>& pieces, const Bracket& bracket, int64_t n) {
  const int shift = std::max(0, static_cast<int>(std::bit_width(bracket.hi - bracket.lo)) - 12);
  std::vector<int64_t> counts(1 << 12);
  for (const Piece& piece : pieces) {
    for (int64_t i = 0; i < piece.count; ++i) ++counts[(piece.keys[i] - bracket.lo) >> shift];
  }
  uint32_t bin = (1 << 12) - 1;
  while (counts[bin] < n) n -= counts[bin--];
  std::vector<uint32_t> keys;
  for (const Piece& piece : pieces) {
    std::copy_if(&piece.keys[0], &piece.keys[piece.count], std::back_inserter(keys),
                 [&](uint32_t key) { return (key - bracket.lo) >> shift == bin; });
  }
  std::nth_element(keys.begin(), keys.begin() + n - 1, keys.end(), std::greater<>());
  const uint32_t key = keys[n - 1];
  for (uint32_t other : keys) n -= other > key;
  return {key, n, std::count(keys.begin(), keys.end(), key)};
}

// body(tensor, task, begin, keys, places) for what each task collected.
template <class F>
void each_collected(const TopkSpan& span, const Scan& scan, const F& body) {
  torch::stable::parallel_for(0, scan.pieces.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Piece& piece = scan.pieces[i];
      size_t at = 0;
      span.each(piece.from, piece.to, [&](const TopkTensor& t, int64_t task, int64_t begin, int64_t) {
        body(t, task, begin, &piece.keys[at], &piece.places[at]);
        at += scan.within[task];
      });
    }
  });
}

void settle(const TopkSpan& span, const TopkLayout* layouts, const Scan& scan, const TopkThreshold& threshold) {
  std::vector<int64_t> ties(span.tasks(), 0);
  each_collected(span, scan, [&](const TopkTensor&, int64_t task, int64_t, const uint32_t* keys, const uint16_t*) {
    ties[task] = std::count(keys, keys + scan.within[task], threshold.key);
  });
  const std::optional<TopkSplit> split = topk_share(span, layouts, threshold.needed, ties);
  each_collected(span, scan,
                 [&](const TopkTensor& t, int64_t task, int64_t begin, const uint32_t* keys, const uint16_t* places) {
                   int64_t left = ties[task];
                   for (int64_t i = 0; i < scan.within[task]; ++i) {
                     // Without branches: they would be mispredicted.
                     const bool tie = (keys[i] == threshold.key) & (left > 0);
                     left -= tie;
                     const int64_t group = begin + places[i];
                     t.chosen[group >> 3] |= static_cast<uint8_t>(((keys[i] > threshold.key) | tie) << (group & 7));
                   }
                 });
  if (split) topk_choose_ties(span, layouts, *split, threshold.key);
}

// The brackets of all choices and what the pass finds; no bracket where sampling does not serve, or too much lies in
// it.
void sample_and_scan(std::vector<Choice*> choices, int64_t total) {
  const TopkSpan& span = choices[0]->span;
  if (total < kSampleFrom || span.tensors[0].wide) return;
  const auto share = [&](const Choice* c) { return static_cast<double>(c->keep) / static_cast<double>(total); };
  int64_t samples = 0;
  for (const Choice* c : choices) samples = std::max(samples, sample_size(share(c), total));
  std::vector<uint32_t> keys = sample(span, samples, total);
  for (Choice* c : choices) c->bracket = sample_bracket(keys, share(c));
  const int64_t room = total / kCollectedShare;
  scan(choices, room);
  for (Choice* c : choices) {
    if (c->found.collected > room) c->bracket = std::nullopt;
  }
}

std::optional<int64_t> finish(const Choice& choice, const TopkLayout* layouts) {
  const auto& [span, keep, bracket, found] = choice;
  if (!bracket) return std::nullopt;
  if (found.nan) return kTopkNan;
  const int64_t needed = keep - found.above;
  if (needed < 0) return bracket->over ? topk_choose_at(span, layouts, bracket->over, keep) : std::nullopt;
  if (needed > found.collected) {
    return bracket->below ? topk_choose_at(span, layouts, bracket->below, keep) : std::nullopt;
  }
  if (needed > 0) settle(span, layouts, found, collected_threshold(found.pieces, *bracket, needed));
  return 0;
}

}  // namespace

std::vector<std::optional<int64_t>> topk_sample_select(const std::vector<const TopkSpan*>& spans,
                                                       const TopkLayout* layouts, const std::vector<int64_t>& keep,
                                                       int64_t total) {
  std::deque<Choice> choices;
  std::vector<Choice*> each;
  for (size_t i = 0; i < spans.size(); ++i) {
    each.push_back(&choices.emplace_back(*spans[i], keep[i]));
  }
  sample_and_scan(each, total);
  std::vector<std::optional<int64_t>> status(spans.size());
  // One after the other a single choice would leave threads idle.
  torch::stable::parallel_for(0, static_cast<int64_t>(spans.size()), 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) status[i] = finish(choices[i], layouts);
  });
  return status;
}

std::optional<TopkBounds> topk_sample_bounds(const TopkSpan& span, int64_t keep, int64_t total) {
  Choice choice{span, keep};
  sample_and_scan({&choice}, total);
  if (!choice.bracket) return std::nullopt;
  const Scan& found = choice.found;
  const int64_t needed = keep - found.above;
  if (found.nan || needed <= 0 || needed >= found.collected) return std::nullopt;
  const TopkThreshold last = collected_threshold(found.pieces, *choice.bracket, needed);
  if (last.needed < last.ties) return TopkBounds{last.key, last.key};
  uint32_t left = 0;
  for (const Piece& piece : found.pieces) {
    for (int64_t i = 0; i < piece.count; ++i) {
      left = std::max(left, piece.keys[i] < last.key ? piece.keys[i] : 0);
    }
  }
  return TopkBounds{last.key, left};
}

}  // namespace sparsekern
