// Between images and the packed tiles of a grid.
#pragma once
#include <cstdint>
#include <vector>

#include "sparse_buffer.h"
#include "sparse_grid.h"

namespace sparsekern {

template <class T>
struct Image {
  T* data;
  Strides strides;
};

// An image whose pixels are `down` rows and some columns apart: its rows and columns.
struct SpreadShape {
  int64_t rows, columns, down;
};

// Packs `channels` rows of `width` floats; `step` pixels lie between the pixels of a run. T is float or BFloat16.
template <class T>
void pack_runs(const Image<const T>& input, int64_t step, const std::vector<SparseRun>& runs, int64_t channels,
               float* packed, int64_t width);

// The inverse: `count` numbers of each row of `width` floats go where the runs say, gaps between them nowhere;
// `stream`: past the caches, as far as whole cache lines of floats do.
template <class T>
void unpack_runs(const float* packed, int64_t width, int64_t count, const std::vector<SparseRun>& runs,
                 int64_t channels, int64_t step, const Image<T>& output, bool stream = false);

// As unpack_runs into images without gaps, and zeros behind each pixel up to the next one, or to the end of its image:
// the first pixel of an image is its first element, and the tiles of it together write all.
void spread_runs(const float* packed, int64_t width, const std::vector<SparseRun>& runs, int64_t channels, int64_t step,
                 const Image<float>& output, const SpreadShape& shape, bool stream);

// Channels of an image in the order of the numbers of a grid, `width` floats apart.
struct NumberedRows {
  const float* data;
  int64_t width;
};

// `count` numbers of channels [begin, begin + channels), whose pixels are `runs`: where they lie if they are neighbours
// there, else packed into `buffer`, `width` floats apart, zeros where a number has no pixel.
NumberedRows numbered_rows(const std::vector<SparseRun>& runs, int64_t count, const Image<const float>& image,
                           int64_t begin, int64_t channels, int64_t width, Buffer<float>& buffer);

}  // namespace sparsekern
