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

// Packs `channels` rows of `width` floats; `step` pixels lie between the pixels of a run. T is float or BFloat16.
template <class T>
void pack_runs(const Image<const T>& input, int64_t step, const std::vector<SparseRun>& runs, int64_t channels,
               float* packed, int64_t width);

// The inverse: `count` numbers of each row of `width` floats go where the runs say, gaps between them nowhere;
// `stream`: past the caches, as far as whole cache lines of floats do.
template <class T>
void unpack_runs(const float* packed, int64_t width, int64_t count, const std::vector<SparseRun>& runs,
                 int64_t channels, int64_t step, const Image<T>& output, bool stream = false);

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
