#include "sparse_product.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "sparse_buffer.h"

namespace sparsekern {
namespace {

// From 1 MiB on, what a product reads does not stay in the caches of a core: tiles are fetched one ahead. Of smaller
// images that takes 1.03 to 1.07 times as long (Sapphire Rapids, 14x14 pixels of 1024 channels).
constexpr int64_t kFetchFloats = 1 << 18;

// Output channels between scratch and image: with the 96 pixels of a tall tile, 24 KiB.
constexpr int64_t kScratchRows = 64;

// Channels that are packed together, a multiple of the lanes for images whose channels are neighbours.
constexpr int64_t kPackChannels = 16;

// Parts of the rows of a tile: of few tiles, four or more tasks per thread, and as many for each.
int64_t row_parts(int64_t tiles, int64_t threads) {
  return shares_tiles(tiles, threads) ? ceil_divide(ceil_divide(4 * threads, tiles), threads) * threads : 1;
}

template <class T>
class Product {
 public:
  Product(const Grid& grid, const Tiling& tiling, const Image<const T>& input, const SparseRows& rows,
          int64_t rows_count, int64_t channels, const Image<T>& output, const float* residual,
          const std::optional<SpreadShape>& spread)
      : grid_(grid),
        tiling_(tiling),
        input_(input),
        rows_(rows),
        channels_(channels),
        output_(output),
        residual_{residual, output.strides},
        spread_(spread) {
    const int64_t blocks = rows.pointers[rows_count] * rows.wide, images = grid.spans * grid.span_images;
    const Strides& s = output.strides;
    every_ = std::max<int64_t>(1, blocks / (2 * channels));
    fetches_ = !rows.padded && images * channels * grid.length >= kFetchFloats;
    const int64_t spreads = spread ? spread->down * s.column : 1;  // zeros written with each result
    const bool lines = s.column == 1 && s.channel % kLineFloats == 0 && s.batch % kLineFloats == 0 &&
                       reinterpret_cast<uintptr_t>(output.data) % 64 == 0;
    streams_ = images * rows_count * rows.tall * grid.length * spreads >= kStreamFloats && (spread || lines);
  }

  int64_t packed_floats() const { return channels_ * grid_.planes() * tiling_.width; }

  // Channels [begin, end) of every plane. Planes share the cache lines of an image, so few channels at a time.
  void pack(int64_t tile, int64_t begin, int64_t end, float* packed) const {
    thread_local std::vector<std::vector<SparseRun>> runs;
    const Strides& s = input_.strides;
    const int64_t from = tile % tiling_.per_span * tiling_.tile, width = tiling_.width;
    const int64_t planes = grid_.planes(), step = planes > 1 ? kPackChannels : end - begin;
    runs.resize(std::max<size_t>(runs.size(), planes));
    for (int64_t plane = 0; plane < planes; ++plane) {
      grid_.inputs(runs[plane], tile / tiling_.per_span, from, tiling_.tile + grid_.reach, plane, s);
    }
    for (int64_t first = begin; first < end; first += step) {
      const Image<const T> image{input_.data + first * s.channel, s};
      for (int64_t plane = 0; plane < planes; ++plane) {
        pack_runs(image, grid_.columns.stride, runs[plane], std::min(step, end - first),
                  packed + (plane * channels_ + first) * width, width);
      }
    }
  }

  // The tile in the image itself.
  const float* place(int64_t tile) const { return sparsekern::place(tiling_, input_, tile); }

  // Block rows [begin, end) of the output.
  void multiply(int64_t tile, int64_t begin, int64_t end, const float* packed) const {
    thread_local std::vector<SparseRun> runs;
    const int64_t from = tile % tiling_.per_span * tiling_.tile;
    const int64_t until = std::min(from + tiling_.tile, grid_.length);
    for (int64_t at = from; at < until; at += tiling_.part) {
      const int64_t count = std::min(tiling_.part, until - at);
      grid_.outputs(runs, tile / tiling_.per_span, at, count, output_.strides);
      if (runs.empty()) continue;
      if (multiplied_direct(tile, at, count, runs, begin, end, packed + (at - from))) continue;
      const float* const data = packed + (at - from);
      through_scratch(runs, begin, end, data, count, ahead(tile, at, data));
    }
  }

 private:
  // Straight into the image, where it is of floats and the numbers are neighbours there; else false.
  bool multiplied_direct(int64_t tile, int64_t at, int64_t count, const std::vector<SparseRun>& runs, int64_t begin,
                         int64_t end, const float* data) const {
    if constexpr (std::is_same_v<T, float>) {
      if (spread_ || output_.strides.column != 1 || runs.size() != 1 || runs[0].count != count) return false;
      const int64_t first = begin * rows_.tall * output_.strides.channel + runs[0].image;
      const bool stream = streams_ && runs[0].image % kLineFloats == 0 && count % kLineFloats == 0;
      kernels().sparse_rows(rows_, begin, end,
                            {data, count, output_.data + first, output_.strides.channel, stream, ahead(tile, at, data),
                             every_, residual_.data ? residual_.data + first : nullptr});
      return true;
    }
    return false;
  }

  // How far behind `data`, number `at` of a tile in the image itself, the next call reads.
  int64_t ahead(int64_t tile, int64_t at, const float* data) const {
    if constexpr (std::is_same_v<T, float>) {
      if (!fetches_) return 0;
      const int64_t next = at + tiling_.part;
      if (next < std::min(tile % tiling_.per_span * tiling_.tile + tiling_.tile, grid_.length)) return tiling_.part;
      return tile + 1 < tiling_.count ? place(tile + 1) - data : 0;
    }
    return 0;
  }

  void through_scratch(const std::vector<SparseRun>& runs, int64_t begin, int64_t end, const float* packed,
                       int64_t count, int64_t ahead) const {
    thread_local Buffer<float> buffer, residual_buffer;
    const Strides& s = output_.strides;
    const int64_t width = tiling_.part, rows = kScratchRows / rows_.tall;
    float* const scratch = buffer.get(kScratchRows * width);
    float* const residual = residual_.data ? residual_buffer.get(kScratchRows * width) : nullptr;
    for (int64_t row = begin; row < end; row += rows) {
      const int64_t last = std::min(row + rows, end), channels = (last - row) * rows_.tall;
      const int64_t first = row * rows_.tall * s.channel;
      if (residual) pack_runs(Image<const float>{residual_.data + first, s}, 1, runs, channels, residual, width);
      kernels().sparse_rows(rows_, row, last, {packed, count, scratch, width, false, ahead, every_, residual});
      deliver(scratch, runs, channels, {output_.data + first, s});
    }
  }

  void deliver(const float* scratch, const std::vector<SparseRun>& runs, int64_t channels, const Image<T>& to) const {
    const int64_t width = tiling_.part;
    if constexpr (std::is_same_v<T, float>) {
      if (spread_) return spread_runs(scratch, width, runs, channels, to.strides.column, to, *spread_, streams_);
    }
    unpack_runs(scratch, width, width, runs, channels, 1, to);
  }

  const Grid& grid_;
  const Tiling& tiling_;
  const Image<const T>& input_;
  const SparseRows& rows_;
  const int64_t channels_;
  const Image<T>& output_;
  const Image<const float> residual_;
  const std::optional<SpreadShape> spread_;
  int64_t every_;
  bool fetches_, streams_;
};

// Tiles that need no packing.
void run_places(const Product<float>& product, int64_t tiles, const SparseRows& s, int64_t rows, int64_t threads) {
  const int64_t parts = row_parts(tiles, threads);
  torch::stable::parallel_for(0, tiles * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % parts;
      product.multiply(i / parts, part_begin(s.pointers, rows, part, parts),
                       part_begin(s.pointers, rows, part + 1, parts), product.place(i / parts));
    }
  });
}

// Many tiles: a task packs one and multiplies it.
template <class T>
void run_tiles(const Product<T>& product, int64_t tiles, int64_t channels, int64_t rows) {
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
template <class T>
void run_parts(const Product<T>& product, int64_t tiles, int64_t channels, const SparseRows& s, int64_t rows,
               int64_t threads) {
  thread_local Buffer<float> buffer;
  float* const packed = buffer.get(tiles * product.packed_floats());
  const auto at = [&](int64_t tile) { return packed + tile * product.packed_floats(); };
  const int64_t parts = row_parts(tiles, threads);
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

template <class T>
void multiply(const Grid& grid, const Plan& plan, const Image<const T>& input, int64_t channels, SparseRows s,
              int64_t rows, const Image<T>& output, const float* residual, const std::optional<SpreadShape>& spread) {
  s.channel = plan.width;
  s.padded = !plan.place;
  const Product<T> product(grid, plan.tiling, input, s, rows, channels, output, residual, spread);
  const int64_t threads = torch::stable::get_num_threads(), tiles = plan.tiling.count;
  if constexpr (std::is_same_v<T, float>) {
    if (plan.place) return run_places(product, tiles, s, rows, threads);
  }
  if (shares_tiles(tiles, threads)) {
    run_parts(product, tiles, channels, s, rows, threads);
  } else {
    run_tiles(product, tiles, channels, rows);
  }
}
template void multiply(const Grid&, const Plan&, const Image<const float>&, int64_t, SparseRows, int64_t,
                       const Image<float>&, const float*, const std::optional<SpreadShape>&);
template void multiply(const Grid&, const Plan&, const Image<const BFloat16>&, int64_t, SparseRows, int64_t,
                       const Image<BFloat16>&, const float*, const std::optional<SpreadShape>&);

}  // namespace sparsekern
