// Runs every kernel of csrc/cuda in three orders of threads and compares the results bit for bit; the sanitizers watch.
// Sizes give several blocks of threads and a tail; structures that are wrong must not lead a kernel out of its memory.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "machine.h"
#include "numbers.cuh"
#include "sparse_grid.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes)
#endif

using namespace sparsekern;
using namespace sparsekern::cuda;

namespace {

using Bytes = std::vector<unsigned char>;
using Floats = std::vector<float>;

std::mt19937 generator;

Floats normal(size_t n) {
  std::normal_distribution<float> distribution;
  Floats values(n);
  for (float& v : values) v = distribution(generator);
  return values;
}

template <class T>
void append(Bytes& all, const std::vector<T>& values) {
  const auto* const first = reinterpret_cast<const unsigned char*>(values.data());
  all.insert(all.end(), first, first + values.size() * sizeof(T));
}

template <class S>
std::vector<S> stored(const Floats& values) {
  std::vector<S> result(values.size());
  for (size_t i = 0; i < values.size(); ++i) narrow(values[i], result[i]);
  return result;
}

// Eight elements of which the mask keeps none: AddressSanitizer reports who reads or writes them.
template <class S>
void forbid(std::vector<S>& values, const std::vector<uint8_t>& mask, bool forbidden) {
  for (size_t i = 0; i < values.size(); i += 8) {
    if (mask[i / 8]) continue;
    [[maybe_unused]] const size_t bytes = std::min<size_t>(8, values.size() - i) * sizeof(S);
    if (forbidden) {
      ASAN_POISON_MEMORY_REGION(&values[i], bytes);
    } else {
      ASAN_UNPOISON_MEMORY_REGION(&values[i], bytes);
    }
  }
}

// A chunk by vectors, one with a tail, and a short tensor; `zero`: what is pruned is known to be zero.
template <class S>
Bytes steps(Dtype dtype, bool adam, bool zero) {
  Bytes result;
  for (size_t n : {9000, 37}) {
    auto param = stored<S>(normal(n)), grad = stored<S>(normal(n)), first = stored<S>(normal(n));
    auto second = stored<S>(Floats(n, 0.5f));
    Floats counts{3};
    std::vector<uint8_t> mask((n + 7) / 8, 0x5A), fresh{1};
    for (size_t i = 1; i < mask.size(); i += 3) mask[i] = 0;
    std::vector<double> rates(2);
    StepTensor t{param.data(), grad.data(), {first.data(), second.data()}, mask.data(), int64_t(n), 0, 0, 0, 0};
    t.known_zero = zero;
    std::vector<S>* const all[] = {&param, &grad, &first, &second};
    for (auto* const values : all) forbid(*values, mask, zero);
    if (adam) {
      const AdamwStep step{0.1, 0.9, 0.99, 1e-8, 0.01, false};
      adamw_rates(counts.data(), 1, step, rates.data(), {nullptr, false}, nullptr);
      masked_adamw(dtype, &t, 1, step, rates.data(), {nullptr, false}, {nullptr, false}, nullptr);
    } else {
      const SgdStep step{-0.1, 0.9, 1, 0.01, false, false, false};
      masked_sgd(dtype, &t, 1, step, fresh.data(), {nullptr, false}, {nullptr, false}, nullptr);
      clear_fresh(fresh.data(), 1, {nullptr, false}, nullptr);
    }
    for (auto* const values : all) forbid(*values, mask, false);
    append(result, param);
    append(result, first);
    append(result, second);
    append(result, fresh);
  }
  return result;
}

Bytes steps_of_every_type(bool adam, bool zero) {
  Bytes result;
  for (const Bytes& found :
       {steps<float>(Dtype::kFloat32, adam, zero), steps<double>(Dtype::kFloat64, adam, zero),
        steps<__half>(Dtype::kFloat16, adam, zero), steps<__nv_bfloat16>(Dtype::kBFloat16, adam, zero)}) {
    append(result, found);
  }
  return result;
}

// Scores of few values, so that ties are split; two blocks of threads and a tail.
Bytes topk(uint32_t width) {
  const uint32_t axis = width == 4 ? 1030 : 1, inner = width == 4 ? 33 : 9001;
  const uint32_t weights = axis * inner, groups = (axis + width - 1) / width * inner;
  Floats score = normal(weights);
  for (float& s : score) s = float(int(s * 4));
  std::vector<uint8_t> mask((weights + 7) / 8);
  std::vector<uint32_t> keys(groups), bits((groups + 31) / 32), histograms(3 * kTopkBins), tickets(3);
  std::vector<TopkState> states(1);
  const uint32_t chunks = (groups + kTopkChunk - 1) / kTopkChunk;
  std::vector<uint32_t> counts(chunks * kTopkWarps);
  int32_t status = 0;
  ScoreTensor t{};
  t.score = score.data();
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
  topk_mask(&t, 1, space, false, true, nullptr);
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

struct Conv {
  int64_t images = 5, in = 12, out = 36, kernel, stride, height = 9, width = 10;
  int32_t tall, wide;

  Bytes run(bool wrong) const {
    const int64_t pad = kernel / 2, h = (height + 2 * pad - kernel) / stride + 1,
                  w = (width + 2 * pad - kernel) / stride + 1;
    const int64_t taps = kernel * kernel, rows = out / tall, columns = in / wide * taps;
    std::vector<int32_t> pointers{0}, indices;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        if (generator() % 3 == 0) indices.push_back(wrong ? int32_t(generator()) : int32_t(c));
      }
      pointers.push_back(wrong ? int32_t(generator()) : int32_t(indices.size()));
    }
    const int64_t blocks = int64_t(indices.size());
    Floats x = normal(images * height * width * in), weight = normal(out * in * taps), y(images * h * w * out);
    Floats slope = normal(y.size()), result(weight.size());
    SparseImage input = image(x, height, width, in), output = image(y, h, w, out), gradient = image(slope, h, w, out);
    SparseWeight s{weight.data(),
                   tall * in * taps,
                   wide * taps,
                   kernel,
                   1,
                   tall == 4 ? in * taps : taps,
                   pointers.data(),
                   indices.data(),
                   nullptr,
                   int32_t(rows),
                   int32_t(in),
                   int32_t(blocks),
                   int32_t(kernel),
                   tall,
                   wide,
                   false};
    const AxisPass v = forward_axis(h, kernel, stride, pad, 1), u = forward_axis(w, kernel, stride, pad, 1);
    const SparseGrid grid = *make_grid(v, u, in, kSparseShared - 17408);
    SparsePacked packed{};
    packed.slabs = int32_t((in + grid.slab - 1) / grid.slab);
    std::vector<int32_t> offsets(blocks), bounds(rows * (packed.slabs + 1)), targets(blocks, -1);
    // 16-byte accesses: a vector of floats need not be aligned so.
    std::vector<float4> values((blocks * tall * wide + 3) / 4);
    packed.offsets = offsets.data();
    packed.values = &values.data()->x;
    packed.bounds = bounds.data();
    packed.targets = targets.data();
    sparse_pack(s, grid, packed, nullptr);
    sparse_product(s, grid, packed, input, output, {0, 0, 1, 1}, nullptr, nullptr);
    Floats partial(2 * blocks * tall * wide);
    sparse_weight_gradient(s, grid, packed, input, gradient, partial.data(), 2, result.data(), nullptr);
    Bytes found;
    if (!wrong) {
      append(found, y);
      append(found, result);
    }
    return found;
  }

  SparseImage image(Floats& data, int64_t h, int64_t w, int64_t c) const {
    return {data.data(), h * w * c, w * c, c, int32_t(images), int32_t(h), int32_t(w), int32_t(c), images * h * w};
  }
};

// The product on tensor cores: five bands in two blocks of threads, the last one short; three slabs; nine images.
struct HalfConv {
  int64_t images = 9, in = 68, out = 76, kernel, stride, height = 5, width = 9;

  Bytes run(Dtype dtype, bool wrong) const {
    const int64_t pad = kernel / 2, h = (height + 2 * pad - kernel) / stride + 1,
                  w = (width + 2 * pad - kernel) / stride + 1;
    const int64_t taps = kernel * kernel, rows = out / 4;
    std::vector<int32_t> pointers{0}, indices;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < in * taps; ++c) {
        if (generator() % 5 == 0) {
          indices.push_back(int32_t(wrong ? int64_t(generator() % (3 * in * taps)) - in * taps : c));
        }
      }
      pointers.push_back(wrong && r % 4 == 0 ? int32_t(generator()) : int32_t(indices.size()));
    }
    std::vector<uint16_t> x = numbers(images * height * width * in), weight = numbers(out * in * taps);
    std::vector<uint16_t> bias = numbers(out), y(images * h * w * out);
    const SparseWeight s{weight.data(),
                         4 * in * taps,
                         taps,
                         kernel,
                         1,
                         in * taps,
                         pointers.data(),
                         indices.data(),
                         nullptr,
                         int32_t(rows),
                         int32_t(in),
                         int32_t(indices.size()),
                         int32_t(kernel),
                         4,
                         1,
                         false};
    const AxisPass v = forward_axis(h, kernel, stride, pad, 1), u = forward_axis(w, kernel, stride, pad, 1);
    const SparseGrid grid = *make_grid(v, u, in, kSparseShared);
    SparseBands bands{};
    bands.slabs = int32_t((in + grid.slab - 1) / grid.slab);
    bands.most = (grid.slab * grid.taps + 15) / 16;
    const int64_t parts = (rows + 3) / 4 * bands.slabs;
    std::vector<uint4> values(parts * bands.most * 32);
    std::vector<uint16_t> offsets(parts * bands.most * 16);
    std::vector<int32_t> steps(parts);
    bands.values = values.data();
    bands.offsets = offsets.data();
    bands.steps = steps.data();
    sparse_pack_halves(s, grid, bands, nullptr);
    sparse_product_halves(dtype, s, grid, bands, image(x, height, width, in), image(y, h, w, out), bias.data(),
                          nullptr);
    Bytes found;
    if (!wrong) append(found, y);
    return found;
  }

  // Bits of numbers between 1 and 2 in both types: no sum is NaN.
  static std::vector<uint16_t> numbers(size_t n) {
    std::vector<uint16_t> bits(n);
    for (uint16_t& b : bits) b = uint16_t(0x3C00 | generator() % 1024);
    return bits;
  }

  SparseImage image(std::vector<uint16_t>& data, int64_t h, int64_t w, int64_t c) const {
    return {data.data(), h * w * c, w * c, c, int32_t(images), int32_t(h), int32_t(w), int32_t(c), images * h * w};
  }
};

bool same_in_every_order(const char* name, const std::function<Bytes()>& run) {
  Bytes first;
  for (int order : {0, 1, 7}) {
    simt::schedule() = order;
    generator.seed(1);
    Bytes found = run();
    if (order == 0) first = found;
    if (found != first) {
      printf("%s: order %d gives another result\n", name, order);
      return false;
    }
  }
  printf("%s: same in every order\n", name);
  return true;
}

}  // namespace

int main() {
  bool good = true;
  for (bool zero : {false, true}) {
    const std::string more = zero ? " beside zeros" : "";
    good &= same_in_every_order(("masked_sgd" + more).c_str(), [&] { return steps_of_every_type(false, zero); });
    good &= same_in_every_order(("masked_adamw" + more).c_str(), [&] { return steps_of_every_type(true, zero); });
  }
  good &= same_in_every_order("topk_mask", [] { return topk(1); });
  good &= same_in_every_order("topk_mask of blocks", [] { return topk(4); });
  for (int64_t kernel : {1, 3}) {
    for (int64_t stride : {1, 2}) {
      for (auto [tall, wide] : {std::pair{4, 1}, {1, 4}, {1, 1}}) {
        Conv conv{};
        conv.kernel = kernel;
        conv.stride = stride;
        conv.tall = tall;
        conv.wide = wide;
        const std::string name = std::to_string(tall) + "x" + std::to_string(wide) + " convolution";
        good &= same_in_every_order(name.c_str(), [&] { return conv.run(false); });
        good &= same_in_every_order("  of a wrong structure", [&] { return conv.run(true); });
      }
      HalfConv halves{};
      halves.kernel = kernel;
      halves.stride = stride;
      for (Dtype dtype : {Dtype::kFloat16, Dtype::kBFloat16}) {
        good &= same_in_every_order("16-bit convolution", [&] { return halves.run(dtype, false); });
        good &= same_in_every_order("  of a wrong structure", [&] { return halves.run(dtype, true); });
      }
    }
  }
  return good ? 0 : 1;
}
