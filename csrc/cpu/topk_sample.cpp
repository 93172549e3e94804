// Selection for topk_mask on CPU in one pass over the scores. A hint or a sample brackets the threshold; the pass
// writes the bits of all that lies above the bracket and collects what lies inside, a few per cent, where the rest is
// settled. Where so many scores share one value that too much would be collected, that value bounds the bracket and is
// only counted.
#include <atomic>
#include <bit>
#include <deque>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>

#include "dispatch.h"
#include "topk_bracket.h"

namespace sparsekern {
namespace {

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
  TopkHint* hint;
  std::optional<Bracket> bracket;
  std::unique_ptr<Scan> found;

  int64_t needed() const { return keep - found->above; }
  // Whether the threshold lies in the bracket, or at its upper end, or there is none because of a NaN.
  bool settled() const { return bracket && (found->nan || (0 <= needed() && needed() <= found->collected)); }
  // Groups collected for each key that the bracket holds.
  double density() const {
    return static_cast<double>(found->collected) / (static_cast<double>(bracket->hi) - bracket->lo + 1);
  }
};

// All choices that have a bracket, task by task: what the first reads, the others find in the cache.
void scan(std::vector<Choice*> choices, int64_t room) {
  std::erase_if(choices, [](const Choice* c) { return !c->bracket; });
  if (choices.empty()) return;
  const TopkSpan& span = choices[0]->span;
  for (Choice* c : choices) {
    c->found = std::make_unique<Scan>();
    c->found->within.assign(span.tasks(), 0);
  }
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
        const TopkTensor& own = choices[i]->span.tensors[&t - span.tensors];
        const Bracket& bracket = *choices[i]->bracket;
        Scan& result = *choices[i]->found;
        if (result.collected > room) continue;
        Piece& piece = pieces[i];
        TopkFound found;
        kernel(own, bracket.lo, bracket.hi, begin, end, &piece.keys[piece.count], &piece.places[piece.count], &found);
        result.above += found.above;
        result.collected += result.within[task] = found.within;
        if (found.nan) result.nan = true;
        piece.count += found.within;
      }
    });
    const std::lock_guard<std::mutex> lock(merging);
    for (size_t i = 0; i < choices.size(); ++i) choices[i]->found->pieces.push_back(std::move(pieces[i]));
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

// As scan(); a bracket that holds more than `room` is dropped.
void scan_within(const std::vector<Choice*>& choices, int64_t room) {
  scan(choices, room);
  for (Choice* c : choices) {
    if (c->bracket && c->found->collected > room) c->bracket = std::nullopt;
  }
}

// What the pass finds in brackets by a sample.
void sample_and_scan(const std::vector<Choice*>& choices, int64_t total) {
  std::vector<int64_t> keep;
  for (const Choice* c : choices) keep.push_back(c->keep);
  const std::vector<std::optional<Bracket>> brackets = topk_sampled(choices[0]->span, keep, total);
  for (size_t i = 0; i < choices.size(); ++i) choices[i]->bracket = brackets[i];
  scan_within(choices, total / kCollectedShare);
}

std::optional<int64_t> finish(const Choice& choice, const TopkLayout* layouts, int64_t total) {
  const TopkSpan& span = choice.span;
  const std::optional<Bracket>& bracket = choice.bracket;
  if (!bracket) return std::nullopt;
  const int64_t needed = choice.needed();
  if (choice.settled()) {
    if (choice.found->nan) return kTopkNan;
    uint32_t key = bracket->hi;
    if (needed > 0) {
      const TopkThreshold found = collected_threshold(choice.found->pieces, *bracket, needed);
      settle(span, layouts, *choice.found, found);
      key = static_cast<uint32_t>(found.key);
    }
    if (choice.hint) topk_follow(*choice.hint, key, choice.density(), total);
    return 0;
  }
  const uint32_t edge = needed < 0 ? bracket->over : bracket->below;
  return edge ? topk_choose_at(span, layouts, edge, choice.keep) : std::nullopt;
}

}  // namespace

std::vector<std::optional<int64_t>> topk_sample_select(const std::vector<const TopkSpan*>& spans,
                                                       const TopkLayout* layouts, const std::vector<int64_t>& keep,
                                                       int64_t total, const std::vector<TopkHint*>& hints) {
  std::deque<Choice> choices;
  std::vector<Choice*> each;
  for (size_t i = 0; i < spans.size(); ++i) {
    Choice& c = choices.emplace_back(*spans[i], keep[i], hints[i]);
    c.bracket = topk_hinted(c.span, c.hint);
    each.push_back(&c);
  }
  scan_within(each, total / kCollectedShare);
  std::erase_if(each, [](const Choice* c) { return c->settled(); });
  for (Choice* c : each) {
    if (c->hint) c->hint->reach = 0;  // it led nowhere
  }
  if (!each.empty()) sample_and_scan(each, total);
  std::vector<std::optional<int64_t>> status(spans.size());
  // One after the other a single choice would leave threads idle.
  torch::stable::parallel_for(0, static_cast<int64_t>(spans.size()), 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) status[i] = finish(choices[i], layouts, total);
  });
  return status;
}

std::optional<TopkBounds> topk_sample_bounds(const TopkSpan& span, int64_t keep, int64_t total) {
  Choice choice{span, keep, nullptr};
  sample_and_scan({&choice}, total);
  if (!choice.bracket) return std::nullopt;
  const Scan& found = *choice.found;
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
