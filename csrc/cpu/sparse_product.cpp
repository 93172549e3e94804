#include "sparse_product.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "sparse_rows.h"

namespace sparsekern {
namespace {

// Half of a usual second-level cache: the other half streams the weights.
constexpr int64_t kTileFloats = (512 << 10) / 4;
// Output channels between scratch and image: with the 96 pixels of a tall tile, 24 KiB.
constexpr int64_t kScratchRows = 64;

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Channels are neighbours and pixels are not.
bool channels_last(const Strides& s) { return s.channel == 1 && s.column != 1; }

// The packed tile: as many numbers as fit the cache, cut evenly; a kernel call takes `part` of them.
struct Tiling {
  int64_t tile, width, per_span, count, part;

  Tiling(const Grid& grid, int64_t channels, int64_t lanes, int64_t most) {
    const int64_t vectors = ceil_divide(grid.length, lanes);
    const int64_t room = kTileFloats / (channels * grid.planes()) - grid.reach;
    // Without a reach nothing is packed twice, and the smallest tile is the best one.
    const int64_t fitting = grid.reach ? std::max(most, room / lanes) : most;
    per_span = ceil_divide(vectors, fitting);
    tile = ceil_divide(vectors, per_span) * lanes;
    per_span = ceil_divide(grid.length, tile);
    width = ceil_divide(tile + grid.reach, lanes) * lanes;
    // An odd number of cache lines spreads the rows of a tile over all sets.
    if (tile > most * lanes && width / 16 % 2 == 0) width += std::max<int64_t>(lanes, 16);
    count = per_span * grid.spans;
    part = ceil_divide(tile / lanes, ceil_divide(tile / lanes, most)) * lanes;
  }
};

// Whether tiles are ranges of the image itself: one tap that reads each pixel where it lies. Measured on the pointwise
// layers of ResNet-50, packing them gains nothing at 90% sparsity and costs up to 3x at 98%.
bool in_place(const Grid& grid, const Strides& s) {
  return grid.planes() == 1 && grid.reach == 0 && grid.length == s.channel && s.column == 1 &&
         grid.columns.stride == 1 && grid.rows.stride == 1;
}

class Product {
 public:
  Product(const Grid& grid, const Tiling& tiling, const Image<const float>& input, const SparseRows& rows,
          int64_t channels, const Image<float>& output)
      : grid_(grid), tiling_(tiling), input_(input), rows_(rows), channels_(channels), output_(output) {}

  int64_t packed_floats() const { return channels_ * grid_.planes() * tiling_.width; }

  // Channels [begin, end) of every plane.
  void pack(int64_t tile, int64_t begin, int64_t end, float* packed) const {
    thread_local std::vector<SparseRun> runs;
    thread_local std::vector<const float*> pixels;
    const Strides& s = input_.strides;
    const int64_t from = tile % tiling_.per_span * tiling_.tile, width = tiling_.width;
    for (int64_t plane = 0; plane < grid_.planes(); ++plane) {
      grid_.inputs(runs, tile / tiling_.per_span, from, tiling_.tile + grid_.reach, plane, s);
      float* const to = packed + (plane * channels_ + begin) * width;
      const float* const image = input_.data + begin * s.channel;
      if (!channels_last(s)) {
        kernels().sparse_pack(image, s.channel, s.column * grid_.columns.stride, runs.data(), int64_t(runs.size()),
                              end - begin, to, width);
        continue;
      }
      pixels.assign(width, nullptr);
      for (const SparseRun& run : runs) {
        for (int64_t i = 0; i < run.count; ++i) {
          pixels[run.packed + i] = image + run.image + i * s.column * grid_.columns.stride;
        }
      }
      kernels().sparse_pack_last(pixels.data(), width, end - begin, to, width);
    }
  }

  // The tile in the image itself.
  const float* place(int64_t tile) const {
    return input_.data + tile / tiling_.per_span * input_.strides.batch + tile % tiling_.per_span * tiling_.tile;
  }

  // Block rows [begin, end) of the output.
  void multiply(int64_t tile, int64_t begin, int64_t end, const float* packed) const {
    thread_local std::vector<SparseRun> runs;
    const int64_t from = tile % tiling_.per_span * tiling_.tile;
    const int64_t until = std::min(from + tiling_.tile, grid_.length);
    for (int64_t at = from; at < until; at += tiling_.part) {
      const int64_t count = std::min(tiling_.part, until - at);
      grid_.outputs(runs, tile / tiling_.per_span, at, count, output_.strides);
      if (runs.empty()) continue;
      const bool direct = output_.strides.column == 1 && runs.size() == 1 && runs[0].count == count;
      if (direct) {
        float* const out = output_.data + begin * rows_.tall * output_.strides.channel + runs[0].image;
        kernels().sparse_rows(rows_, begin, end, packed + (at - from), count, out, output_.strides.channel);
      } else {
        through_scratch(runs, begin, end, packed + (at - from), count);
      }
    }
  }

 private:
  void through_scratch(const std::vector<SparseRun>& runs, int64_t begin, int64_t end, const float* packed,
                       int64_t count) const {
    thread_local Buffer<float> buffer;
    thread_local std::vector<float*> pixels;
    const Strides& s = output_.strides;
    const int64_t width = tiling_.part, rows = kScratchRows / rows_.tall;
    float* const scratch = buffer.get(kScratchRows * width);
    if (channels_last(s)) {
      pixels.assign(width, nullptr);
      for (const SparseRun& run : runs) {
        float* const first = output_.data + run.image + begin * rows_.tall;
        for (int64_t i = 0; i < run.count; ++i) pixels[run.packed + i] = first + i * s.column;
      }
    }
    for (int64_t row = begin; row < end; row += rows) {
      const int64_t last = std::min(row + rows, end), channels = (last - row) * rows_.tall;
      kernels().sparse_rows(rows_, row, last, packed, count, scratch, width);
      if (channels_last(s)) {
        kernels().sparse_unpack_last(scratch, width, pixels.data(), width, channels);
        for (float*& pixel : pixels) pixel += pixel ? channels : 0;
      } else {
        kernels().sparse_unpack(scratch, width, runs.data(), int64_t(runs.size()), channels,
                                output_.data + row * rows_.tall * s.channel, s.channel, s.column);
      }
    }
  }

  const Grid& grid_;
  const Tiling& tiling_;
  const Image<const float>& input_;
  const SparseRows& rows_;
  const int64_t channels_;
  const Image<float>& output_;
};

// The first block row of part i of n: parts have about equal work, a row counting as two blocks more than it has.
int64_t part_begin(const int32_t* pointers, int64_t rows, int64_t i, int64_t n) {
  const int64_t wanted = (pointers[rows] + 2 * rows) * i / n;
  int64_t low = 0, high = rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    (pointers[middle] + 2 * middle < wanted ? low = middle + 1 : high = middle);
  }
  return low;
}

// Tiles that need no packing.
void run_places(const Product& product, int64_t tiles, const SparseRows& s, int64_t rows, int64_t threads) {
  const int64_t parts = threads > 1 ? ceil_divide(4 * threads, tiles) : 1;
  torch::stable::parallel_for(0, tiles * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % parts;
      product.multiply(i / parts, part_begin(s.pointers, rows, part, parts),
                       part_begin(s.pointers, rows, part + 1, parts), product.place(i / parts));
    }
  });
}

// Many tiles: a task packs one and multiplies it.
void run_tiles(const Product& product, int64_t tiles, int64_t channels, int64_t rows) {
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    thread_local Buffer<float> buffer;
    float* const packed = buffer.get(product.packed_floats());
    for (int64_t tile = begin; tile < end; ++tile) {
      product.pack(tile, 0, channels, packed);
      product.multiply(tile, 0, rows, packed);
    }
  });
}

// Few tiles for the threads: all are packed first, then output rows are shared out too.
void run_parts(const Product& product, int64_t tiles, int64_t channels, const SparseRows& s, int64_t rows,
               int64_t threads) {
  thread_local Buffer<float> buffer;
  float* const packed = buffer.get(tiles * product.packed_floats());
  const auto at = [&](int64_t tile) { return packed + tile * product.packed_floats(); };
  const int64_t wanted = 4 * threads, parts = ceil_divide(wanted, tiles);
  const int64_t slices = std::min(ceil_divide(channels, 16), parts);
  torch::stable::parallel_for(0, tiles * slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slice = i % slices;
      product.pack(i / slices, channels * slice / slices, channels * (slice + 1) / slices, at(i / slices));
    }
  });
  torch::stable::parallel_for(0, tiles * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % parts;
      product.multiply(i / parts, part_begin(s.pointers, rows, part, parts),
                       part_begin(s.pointers, rows, part + 1, parts), at(i / parts));
    }
  });
}

}  // namespace

bool sparse_product(const Grid& grid, const Image<const float>& input, const SparseWeight& weight, const float* bias,
                    const Image<float>& output) {
  thread_local Buffer<int32_t> offsets;
  thread_local Buffer<float> values;
  SparseLimits limits;
  kernels().sparse_limits(&limits);
  const int64_t channels = weight.channels * weight.groups, rows = weight.block_rows();
  const Tiling tiling(grid, channels, limits.lanes, weight.tall == 4 ? limits.tall : limits.flat);
  const bool place = in_place(grid, input.strides);
  const int64_t width = place ? input.strides.channel : tiling.width;
  STD_TORCH_CHECK(channels * grid.planes() * width < INT32_MAX, "sparsekern: ", channels,
                  " channels do not fit one tile of 32-bit offsets");
  int32_t* const at = offsets.get(weight.blocks);
  float* const held = values.get(weight.blocks * weight.tall * weight.wide);
  if (!gather(weight, column_table(grid, weight, width), width, at, held)) return false;
  const SparseRows s{weight.pointers, at, held, bias, width, weight.tall, weight.wide, !place};
  const Product product(grid, tiling, input, s, channels, output);
  const int64_t threads = torch::stable::get_num_threads();
  if (place) {
    run_places(product, tiling.count, s, rows, threads);
  } else if (threads > 1 && tiling.count < 4 * threads) {
    run_parts(product, tiling.count, channels, s, rows, threads);
  } else {
    run_tiles(product, tiling.count, channels, rows);
  }
  return true;
}

}  // namespace sparsekern
