// Selections by magnitude, single weights, blocks and n:m.
#include "driver.h"

using namespace sparsekern;
using namespace sparsekern::cuda;

namespace driver {
namespace {

// Scores of few values, so that ties are split; two blocks of threads and a tail. Without blocks, half of the weights
// are candidates.
template <class S>
Bytes topk(Dtype dtype, uint32_t width) {
  const uint32_t axis = width == 4 ? 1030 : 1, inner = width == 4 ? 33 : 9001;
  const uint32_t weights = axis * inner, groups = (axis + width - 1) / width * inner;
  const bool wide = dtype == Dtype::kFloat64 && width == 1;
  const int passes = topk_passes(wide);
  Floats score = normal(weights);
  for (float& s : score) s = float(int(s * 4));
  const std::vector<S> scores(score.begin(), score.end());
  std::vector<uint8_t> mask((weights + 7) / 8), candidates(mask.size(), 0x5A);
  std::vector<uint32_t> keys(groups), bits((groups + 31) / 32), histograms(passes * kTopkBins), tickets(passes);
  std::vector<TopkState> states(1);
  const uint32_t chunks = (groups + kTopkChunk - 1) / kTopkChunk;
  std::vector<uint32_t> counts(chunks * kTopkWarps);
  int32_t status = 0;
  ScoreTensor t{};
  t.score = scores.data();
  t.dtype = dtype;
  t.candidates = width == 1 ? candidates.data() : nullptr;
  t.mask = mask.data();
  t.keys = keys.data();
  t.bits = bits.data();
  t.weights = weights;
  t.groups = groups;
  t.inner = inner;
  t.keep = groups / 3;
  t.axis = axis;
  t.width = width;
  t.segment_chunks = chunks;
  const TopkSpace space{histograms.data(), tickets.data(), states.data(), counts.data(), &status, 1};
  topk_mask(&t, 1, space, wide, true, nullptr);
  Bytes result = mask;
  t.axis = weights / 9;
  t.inner = 9;
  if (width == 1) {
    t.groups = t.weights = t.axis * t.inner;
    topk_n_of_m(&t, 1, &status, 2, 4, true, nullptr);
    append(result, mask);
  }
  result.push_back(static_cast<unsigned char>(status));
  return result;
}

}  // namespace

std::vector<Run> selections() {
  return {{"topk_mask", [] { return topk<float>(Dtype::kFloat32, 1); }},
          {"topk_mask of blocks", [] { return topk<float>(Dtype::kFloat32, 4); }},
          {"topk_mask in float64", [] { return topk<double>(Dtype::kFloat64, 1); }},
          {"topk_mask of blocks in float64", [] { return topk<double>(Dtype::kFloat64, 4); }}};
}

}  // namespace driver
