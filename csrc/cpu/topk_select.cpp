// Selection for topk_mask on CPU: exact, and independent of the number of threads. Where sampling does not serve, the
// threshold is found digit by digit, by radix histograms.
#include "topk_select.h"

#include <atomic>
#include <mutex>
#include <numeric>

#include "dispatch.h"
#include "topk_bracket.h"

namespace sparsekern {
namespace {

constexpr uint64_t kNoKey = ~uint64_t{0};

// The group bits of all keys >= least; returns how many.
int64_t write(const TopkSpan& span, uint64_t least, bool& nan) {
  std::atomic<int64_t> chosen{0};
  std::atomic<bool> seen{false};
  span.parallel([&](const TopkTensor& t, int64_t, int64_t begin, int64_t end) {
    TopkFound found;
    kernels().topk_choose(t, least, 0, begin, end, t.chosen, &found);
    chosen += found.above;
    if (found.nan) seen = true;
  });
  nan = seen;
  return chosen;
}

std::vector<int64_t> histogram(const TopkSpan& span, const TopkLevel& level, bool& nan) {
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

// Digit by digit. The first level fits the first-level cache; it holds the sign or nothing, and all of the exponent.
// `exact`: the key is that of a group, not one between it and the next lower.
TopkThreshold radix_threshold(const TopkSpan& span, int64_t keep, bool exact, bool& nan) {
  TopkThreshold found{0, keep, 0};
  for (int left = span.tensors[0].wide ? 64 : 32, bits = 12; left > 0; bits = 10) {
    // 64 = 12 + 12 + 4 * 10 and 32 = 12 + 2 * 10.
    if (left % 10) bits = 12;
    left -= bits;
    const std::vector<int64_t> counts = histogram(span, {found.key, left, bits}, nan);
    if (nan) break;
    int64_t bin = (int64_t{1} << bits) - 1;
    while (counts[bin] < found.needed) found.needed -= counts[bin--];
    found.key = found.key << bits | static_cast<uint64_t>(bin);
    found.ties = counts[bin];
    if (!exact && found.needed == found.ties && found.key > 0) {
      // The whole bin is chosen, whatever is in it.
      found.key <<= left;
      break;
    }
  }
  return found;
}

int64_t radix_select(const TopkSpan& span, const TopkLayout* layouts, int64_t keep, TopkHint* hint) {
  bool nan = false;
  const TopkThreshold threshold = radix_threshold(span, keep, hint, nan);
  if (nan) {
    write(span, kNoKey, nan);
    return kTopkNan;
  }
  if (hint && threshold.key > 0 && !span.tensors[0].wide) topk_follow(*hint, threshold.key);
  // Only candidates have keys above 0.
  if (threshold.key == 0 || threshold.needed == threshold.ties) {
    write(span, std::max(threshold.key, uint64_t{1}), nan);
    return threshold.key == 0 ? kTopkTooFew : 0;
  }
  return *topk_choose_at(span, layouts, threshold.key, keep);
}

}  // namespace

std::optional<int64_t> topk_choose_at(const TopkSpan& span, const TopkLayout* layouts, uint64_t key, int64_t keep) {
  std::vector<int64_t> ties(span.tasks());
  std::atomic<int64_t> above{0}, equal{0};
  std::atomic<bool> nan{false};
  const auto choose = kernels().topk_choose;
  span.parallel([&](const TopkTensor& t, int64_t task, int64_t begin, int64_t end) {
    TopkFound found;
    choose(t, key + 1, 0, begin, end, t.chosen, &found);
    above += found.above;
    equal += ties[task] = found.within;
    if (found.nan) nan = true;
  });
  if (nan) return kTopkNan;
  if (above > keep || above + equal < keep) return std::nullopt;
  const std::optional<TopkSplit> split = topk_share(span, layouts, keep - above, ties);
  span.parallel([&](const TopkTensor& t, int64_t task, int64_t begin, int64_t end) {
    TopkFound found;
    if (ties[task] > 0) choose(t, key + 1, ties[task], begin, end, t.chosen, &found);
  });
  if (split) topk_choose_ties(span, layouts, *split, key);
  return 0;
}

std::optional<TopkSplit> topk_share(const TopkSpan& span, const TopkLayout* layouts, int64_t needed,
                                    std::vector<int64_t>& ties) {
  std::optional<TopkSplit> split;
  for (size_t i = 0; i < span.sizes.size(); ++i) {
    int64_t here = 0;
    for (int64_t task = span.first_task[i]; task < span.first_task[i + 1]; ++task) here += ties[task];
    if (here > needed && needed > 0 && !layouts[i].row_major) {
      split = TopkSplit{i, needed};
      needed = 0;
    }
    for (int64_t task = span.first_task[i]; task < span.first_task[i + 1]; ++task) {
      needed -= ties[task] = std::min(ties[task], needed);
    }
  }
  return split;
}

void topk_choose_ties(const TopkSpan& span, const TopkLayout* layouts, const TopkSplit& split, uint64_t key) {
  const TopkTensor& t = span.tensors[split.tensor];
  std::vector<uint8_t> reached((span.sizes[split.tensor] + 7) / 8);
  TopkSpan(&t, {span.sizes[split.tensor]}).parallel([&](const TopkTensor&, int64_t, int64_t begin, int64_t end) {
    TopkFound found;
    kernels().topk_choose(t, key, 0, begin, end, reached.data(), &found);
  });
  const auto& [sizes, strides, row_major] = layouts[split.tensor];
  const size_t last = sizes.size() - 1;
  std::vector<int64_t> index(sizes.size(), 0);
  int64_t base = 0;
  for (int64_t needed = split.needed;;) {
    for (int64_t i = 0, at = base; i < sizes[last]; ++i, at += strides[last]) {
      const uint8_t bit = static_cast<uint8_t>(1u << (at & 7));
      if (!(reached[at >> 3] & ~t.chosen[at >> 3] & bit)) continue;
      t.chosen[at >> 3] |= bit;
      if (--needed == 0) return;
    }
    for (size_t dim = last; dim-- > 0;) {
      base += strides[dim];
      if (++index[dim] < sizes[dim]) break;
      base -= sizes[dim] * strides[dim];
      index[dim] = 0;
    }
  }
}

TopkBounds topk_bounds(const TopkSpan& span, int64_t keep, bool& nan) {
  const TopkThreshold last = radix_threshold(span, keep, true, nan);
  const bool all = keep == std::accumulate(span.sizes.begin(), span.sizes.end(), int64_t{0});  // nothing is left
  if (nan || all || last.needed < last.ties) return {last.key, last.key};
  return {last.key, radix_threshold(span, keep + 1, true, nan).key};
}

int64_t topk_select(const std::vector<const TopkSpan*>& spans, const TopkLayout* layouts,
                    const std::vector<int64_t>& keep, TopkHint* hints) {
  int64_t total = 0, status = 0;
  for (int64_t size : spans[0]->sizes) total += size;
  std::vector<const TopkSpan*> chosen;
  std::vector<int64_t> wanted;
  std::vector<TopkHint*> kept;
  for (size_t i = 0; i < spans.size(); ++i) {
    if (total == 0) {
      status |= keep[i] > 0 ? kTopkTooFew : 0;
    } else if (keep[i] == 0 || keep[i] >= total) {
      bool nan = false;
      const int64_t count = write(*spans[i], keep[i] ? 1 : kNoKey, nan);
      status |= (nan ? kTopkNan : 0) + (count < keep[i] ? kTopkTooFew : 0);
    } else {
      chosen.push_back(spans[i]);
      wanted.push_back(keep[i]);
      kept.push_back(hints ? hints + i : nullptr);
    }
  }
  if (chosen.empty()) return status;
  const std::vector<std::optional<int64_t>> found = topk_sample_select(chosen, layouts, wanted, total, kept);
  for (size_t i = 0; i < chosen.size(); ++i)
    status |= found[i] ? *found[i] : radix_select(*chosen[i], layouts, wanted[i], kept[i]);
  return status;
}

}  // namespace sparsekern
