// Passes of sparse layers, with weights dense and packed, and with structures that are wrong.
#include "driver.h"
#include "sparse_grid.h"

using namespace sparsekern;
using namespace sparsekern::cuda;

namespace driver {
namespace {

struct Conv {
  int64_t images = 5, in = 12, out = 36, kernel, stride, height = 9, width = 10;
  int32_t tall, wide;
  bool packed;

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
    std::vector<int32_t> source(blocks);  // packed blocks in another order than those of the structure
    for (int64_t k = 0; k < blocks; ++k) source[k] = int32_t(blocks - 1 - k);
    const int64_t size = tall * wide, weights = packed ? blocks * size : out * in * taps;
    Floats x = normal(images * height * width * in), weight = normal(weights), y(images * h * w * out);
    Floats slope = normal(y.size()), result(weights);
    SparseImage input = image(x, height, width, in), output = image(y, h, w, out), gradient = image(slope, h, w, out);
    SparseWeight s{weight.data(),
                   tall * in * taps,
                   wide * taps,
                   kernel,
                   1,
                   packed      ? 1
                   : tall == 4 ? in * taps
                               : taps,
                   pointers.data(),
                   indices.data(),
                   packed ? source.data() : nullptr,
                   int32_t(rows),
                   int32_t(in),
                   int32_t(blocks),
                   int32_t(kernel),
                   tall,
                   wide,
                   packed};
    const AxisPass v = forward_axis(h, kernel, stride, pad, 1), u = forward_axis(w, kernel, stride, pad, 1);
    const SparseGrid grid = *make_grid(v, u, in, kSparseShared - 17408);
    SparsePacked space{};
    space.slabs = int32_t((in + grid.slab - 1) / grid.slab);
    std::vector<int32_t> offsets(blocks), bounds(rows * (space.slabs + 1)), targets(blocks, -1);
    // 16-byte accesses: a vector of floats need not be aligned so.
    std::vector<float4> values((blocks * size + 3) / 4);
    space.offsets = offsets.data();
    space.values = &values.data()->x;
    space.bounds = bounds.data();
    space.targets = targets.data();
    sparse_pack(s, grid, space, nullptr);
    sparse_product(s, grid, space, input, output, {0, 0, 1, 1}, nullptr, nullptr);
    Floats partial(2 * blocks * size);
    sparse_weight_gradient(s, grid, space, input, gradient, partial.data(), 2, result.data(), nullptr);
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

// A weight of `s` packed for tensor cores, for the product or for the gradient.
struct Bands {
  std::vector<uint4> values;
  std::vector<uint16_t> offsets;
  std::vector<int4> blocks;
  std::vector<int64_t> elements;
  std::vector<int32_t> steps;
  SparseBands bands{};

  Bands(const SparseWeight& s, const SparseGrid& grid, bool gradient) {
    bands.slabs = (s.channels + grid.slab - 1) / grid.slab;
    bands.most = (grid.slab * grid.taps + 15) / 16;
    const int64_t parts = (s.rows + 3) / 4 * int64_t{bands.slabs}, columns = parts * bands.most * 16;
    values.resize(gradient ? 0 : columns * 2);
    offsets.resize(columns);
    blocks.resize(gradient ? columns : 0);
    elements.resize(blocks.size());
    steps.resize(parts);
    bands.values = gradient ? nullptr : values.data();
    bands.offsets = offsets.data();
    bands.blocks = gradient ? &blocks.data()->x : nullptr;
    bands.elements = gradient ? elements.data() : nullptr;
    bands.steps = steps.data();
    sparse_pack_halves(s, grid, bands, nullptr);
  }
};

#ifdef __SANITIZE_THREAD__
// Rows that claim the same blocks of the weight share sums, whose value is then unspecified.
constexpr bool kDisjointRows = true;
#else
constexpr bool kDisjointRows = false;
#endif

// The passes on tensor cores: five bands in two blocks of threads, the last one short; three slabs; nine images.
struct HalfConv {
  int64_t images = 9, in = 68, out = 76, kernel, stride, height = 5, width = 9;
  bool packed;

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
    const int64_t blocks = int64_t(indices.size()), weights = packed ? blocks * 4 : out * in * taps;
    std::vector<uint16_t> x = numbers(images * height * width * in), weight = numbers(weights);
    std::vector<uint16_t> bias = numbers(out), y(images * h * w * out);
    const SparseWeight s{weight.data(),
                         4 * in * taps,
                         taps,
                         kernel,
                         1,
                         packed ? 1 : in * taps,
                         pointers.data(),
                         indices.data(),
                         nullptr,
                         int32_t(rows),
                         int32_t(in),
                         int32_t(blocks),
                         int32_t(kernel),
                         4,
                         1,
                         packed};
    const AxisPass v = forward_axis(h, kernel, stride, pad, 1), u = forward_axis(w, kernel, stride, pad, 1);
    const SparseGrid grid = *make_grid(v, u, in, kSparseShared);
    const SparseImage input = image(x, height, width, in);
    sparse_product_halves(dtype, s, grid, Bands(s, grid, false).bands, input, image(y, h, w, out), bias.data(),
                          nullptr);
    if (wrong && kDisjointRows) return {};
    std::vector<uint16_t> slope = numbers(y.size()), result(weights);
    const SparseGrid smaller = *make_grid(v, u, in, kSparseMoreShared - kGradientReserved);
    Floats partial(2 * blocks * 4);
    sparse_weight_gradient_halves(dtype, s, smaller, Bands(s, smaller, true).bands, input, image(slope, h, w, out),
                                  partial.data(), 2, result.data(), nullptr);
    Bytes found;
    append(found, y);
    append(found, result);
    return wrong ? Bytes() : found;
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

}  // namespace

std::vector<Run> layers() {
  std::vector<Run> found;
  for (int64_t kernel : {1, 3}) {
    for (int64_t stride : {1, 2}) {
      for (bool packed : {false, true}) {
        const std::string more = packed ? " of packed blocks" : "";
        for (auto [tall, wide] : {std::pair{4, 1}, {1, 4}, {1, 1}}) {
          Conv conv{};
          conv.kernel = kernel;
          conv.stride = stride;
          conv.tall = tall;
          conv.wide = wide;
          conv.packed = packed;
          const std::string name = std::to_string(tall) + "x" + std::to_string(wide) + " convolution" + more;
          found.push_back({name, [=] { return conv.run(false); }});
          found.push_back({"  of a wrong structure", [=] { return conv.run(true); }});
        }
        HalfConv halves{};
        halves.kernel = kernel;
        halves.stride = stride;
        halves.packed = packed;
        const Dtype dtype = packed ? Dtype::kBFloat16 : Dtype::kFloat16;
        found.push_back({"16-bit convolution" + more, [=] { return halves.run(dtype, false); }});
        found.push_back({"  of a wrong structure", [=] { return halves.run(dtype, true); }});
      }
    }
  }
  return found;
}
}  // namespace driver
