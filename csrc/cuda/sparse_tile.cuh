// Tiles of images in shared memory, shared by the passes of the sparse layers.
//
// A unit of 16 bytes has one pixel and channel of four images, or of eight in 16-bit numbers, of which only the bits
// matter here: a tap at any pixel is then an aligned 16-byte access, one per lane, neighbours in x for neighbouring
// lanes, and free of bank conflicts. Tiles are read densely from memory, in runs of channels, and once for all rows of
// a block.
#pragma once
#include "device.cuh"
#include "kernels.h"

namespace sparsekern::cuda {
namespace {

template <class T>
struct alignas(16) UnitOf {
  T image[16 / sizeof(T)];
};
using Unit = UnitOf<float>;
using HalfUnit = UnitOf<uint16_t>;
static_assert(sizeof(Unit::image) == kSparseImages * sizeof(float) && sizeof(HalfUnit::image) == kSparseHalfImages * 2);

__device__ __forceinline__ int clamped(int value, int low, int high) {
  return value < low ? low : value > high ? high : value;
}

__device__ __forceinline__ bool has_pixel(const SparseImage& m, int image, int row, int column) {
  return image < m.images && row >= 0 && row < m.height && column >= 0 && column < m.width &&
         (int64_t{image} * m.height + row) * m.width + column < m.limit;
}

// The place of this block: its tile in the grid, and its first image.
struct Tile {
  int row, column, image;
};

__device__ __forceinline__ int tiles_across(const SparseGrid& g) {
  return (g.columns + g.tile_columns - 1) / g.tile_columns;
}
__device__ __forceinline__ int tiles_down(const SparseGrid& g) { return (g.rows + g.tile_rows - 1) / g.tile_rows; }

template <int kImages = kSparseImages>
__device__ __forceinline__ Tile tile_of(const SparseGrid& g, uint32_t number) {
  const uint32_t across = tiles_across(g), down = tiles_down(g), rest = number / across;
  return {static_cast<int>(rest % down) * g.tile_rows, static_cast<int>(number % across) * g.tile_columns,
          static_cast<int>(rest / down) * kImages};
}

// One channel of one pixel of as many images as a unit has.
template <class T>
__device__ __forceinline__ UnitOf<T> load_unit(const SparseImage& m, int image, int row, int column, int channel) {
  UnitOf<T> u;
  const T* const at = static_cast<const T*>(m.data) + row * m.row_stride + column * m.column_stride + channel;
#pragma unroll
  for (int i = 0; i < static_cast<int>(16 / sizeof(T)); ++i) {
    const bool there = channel < m.channels && has_pixel(m, image + i, row, column);
    u.image[i] = there ? at[(image + i) * m.image_stride] : T(0);
  }
  return u;
}

// Units between the outputs of a tile of gradients; odd: no bank conflicts on storing and on reading channels.
constexpr int kPixelPitch = kSparsePixels + 1;

// The gradients of a tile, outputs [first, first + kOutputs). Lanes take neighbouring ones.
template <int kThreads, int kOutputs, class T>
__device__ __forceinline__ void load_gradients(const SparseGrid& g, const SparseImage& gradient, const Tile& tile,
                                               int first, UnitOf<T>* to) {
  const int output = threadIdx.x % kOutputs;
  for (int p = threadIdx.x / kOutputs; p < kSparsePixels; p += kThreads / kOutputs) {
    const int row = tile.row + p / g.tile_columns, column = tile.column + p % g.tile_columns;
    to[output * kPixelPitch + p] = load_unit<T>(gradient, tile.image, row, column, first + output);
  }
}

// The input pixels of a tile, channels [first, first + slab). Lanes take neighbouring channels.
template <class T>
__device__ __forceinline__ void load_slab(const SparseGrid& g, const SparseImage& input, const Tile& tile, int first,
                                          UnitOf<T>* slab) {
  const int channel = threadIdx.x % g.slab, step = blockDim.x / g.slab;
  for (int p = threadIdx.x / g.slab; p < g.halo_rows * g.halo_columns; p += step) {
    const int y = p / g.halo_columns, x = p - y * g.halo_columns;
    slab[channel * g.channel_step + y * g.pitch + x % g.stride_x * g.split_columns + x / g.stride_x] = load_unit<T>(
        input, tile.image, tile.row * g.stride_y - g.top + y, tile.column * g.stride_x - g.left + x, first + channel);
  }
}

}  // namespace
}  // namespace sparsekern::cuda
