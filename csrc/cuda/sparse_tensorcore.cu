// Sparse convolution in float16 and bfloat16 on tensor cores, for 4x1 blocks. The contract is
// sparsekern/ops/sparse_conv2d.py.
//
// A band of 16 rows times the columns that it needs is dense but for some zeros: mma.sync takes 16 of those columns at
// a time, and ldmatrix gathers them from shared memory, where each is 16 bytes of eight images (sparse_tile.cuh).
#include "numbers.cuh"
#include "sparse_tile.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kBandRows = 4, kStep = 16;  // rows of blocks of a band, columns of a step
constexpr int kPackThreads = 32 * kBandRows;

// Which block of the weight is in a column of each of the rows of a band, -1 for none.
struct alignas(16) Column {
  int32_t block[kBandRows];
};

// A block of threads packs one band and slab; a warp enters the blocks of one row. Indices are those of a caller who
// may have changed them: one out of range is dropped, so that nothing leaves its memory.
__device__ __forceinline__ void enter_blocks(const SparseWeight& w, const SparseGrid& grid, int columns,
                                             Column* table) {
  const int warp = threadIdx.x / 32, row = blockIdx.y * kBandRows + warp;
  for (int c = threadIdx.x; c < columns; c += kPackThreads) table[c] = {{-1, -1, -1, -1}};
  __syncthreads();
  if (row < w.rows) {
    const int begin = clamped(w.pointers[row], 0, w.blocks), end = clamped(w.pointers[row + 1], begin, w.blocks);
    for (int k = begin + threadIdx.x % 32; k < end; k += 32) {
      const int index = w.indices[k];
      if (index < 0 || index >= w.channels * grid.taps) continue;
      const int column = index - static_cast<int>(blockIdx.x) * columns;
      // The last one, should a row name a column twice.
      if (column >= 0 && column < columns) atomicMax(&table[column].block[warp], k);
    }
  }
  __syncthreads();
}

// The columns that any row is in, in order, by one warp; returns their number.
__device__ __forceinline__ int list_columns(const Column* table, int columns, uint32_t* list) {
  const int lane = threadIdx.x;
  int found = 0;
  for (int first = 0; first < columns; first += 32) {
    const int c = first + lane;
    bool any = false;
    for (int r = 0; r < kBandRows; ++r) any |= c < columns && table[c].block[r] >= 0;
    const uint32_t all = __ballot_sync(~0u, any);
    if (any) list[found + __popc(all & ((1u << lane) - 1))] = c;
    found += __popc(all);
  }
  return found;
}

// Where a column of this slab is in the first row of the weight.
__device__ __forceinline__ int64_t element_of(const SparseWeight& w, const SparseGrid& grid, int column) {
  const int channel = blockIdx.x * grid.slab + column / grid.taps, tap = column % grid.taps;
  return channel * w.channel_step + tap / w.kernel_columns * w.tap_row_step +
         tap % w.kernel_columns * w.tap_column_step;
}

// The weight in one row of a band and one column, 0 where no block is; weights off the mask are not read.
__device__ __forceinline__ uint32_t weight_at(const SparseWeight& w, const SparseGrid& grid, const Column* table,
                                              uint32_t column, int row) {
  const int block = table[column].block[row / 4];
  if (block < 0) return 0;
  const int64_t row_of_blocks = int64_t{blockIdx.y} * kBandRows + row / 4;
  const int64_t at =
      w.packed ? int64_t{block} * 4 : row_of_blocks * w.row_step + element_of(w, grid, static_cast<int>(column));
  return static_cast<const uint16_t*>(w.data)[at + row % 4 * w.inner_step];
}

__global__ void __launch_bounds__(kPackThreads)
    pack_halves(const SparseWeight w, const __grid_constant__ SparseGrid grid, const SparseBands bands) {
  SPARSEKERN_SHARED(Column, table);
  __shared__ int count;
  const int columns = grid.slab * grid.taps;
  uint32_t* const list = reinterpret_cast<uint32_t*>(table + columns);
  enter_blocks(w, grid, columns, table);
  if (threadIdx.x < 32) {
    const int found = list_columns(table, columns, list);
    if (threadIdx.x == 0) count = found;
  }
  __syncthreads();
  const int found = count, steps = (found + kStep - 1) / kStep;
  const int64_t part = int64_t{blockIdx.y} * bands.slabs + blockIdx.x, first = part * bands.most;
  if (threadIdx.x == 0) bands.steps[part] = steps;
  // A column that fills up the last step has offset 0, which is a tap of the kernel, and weights of zero.
  for (int i = threadIdx.x; i < steps * kStep; i += kPackThreads) {
    const int column = i < found ? static_cast<int>(list[i]) : 0;
    bands.offsets[first * kStep + i] =
        static_cast<uint16_t>(column / grid.taps * grid.channel_step + grid.tap_offset[column % grid.taps]);
    if (!bands.blocks) continue;
    reinterpret_cast<Column*>(bands.blocks)[first * kStep + i] = i < found ? table[column] : Column{{-1, -1, -1, -1}};
    bands.elements[first * kStep + i] = element_of(w, grid, column);
  }
  if (!bands.values) return;
  for (int i = threadIdx.x; i < steps * 32; i += kPackThreads) {
    const int lane = i % 32;
    uint32_t part_of_lane[4];  // as mma.m16n8k16 wants its first operand
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + r % 2 * 8, k = i / 32 * kStep + lane % 4 * 2 + r / 2 * 8;
      const uint32_t low = k < found ? weight_at(w, grid, table, list[k], row) : 0;
      const uint32_t high = k + 1 < found ? weight_at(w, grid, table, list[k + 1], row) : 0;
      part_of_lane[r] = low | high << 16;
    }
    static_cast<uint4*>(bands.values)[first * 32 + i] = {part_of_lane[0], part_of_lane[1], part_of_lane[2],
                                                         part_of_lane[3]};
  }
}

constexpr int kPixels = kSparsePixels / 2;  // of a warp: two share a band and a tile

// Sums of one slab: `units` are those of the tile, each at[j] a lane's place among them for pixels 2j and 2j + 1.
template <class T>
__device__ __forceinline__ void multiply(const SparseBands& bands, int64_t part, const HalfUnit* units,
                                         const int (&at)[kPixels / 2], float (&sums)[kPixels][4]) {
  const int lane = threadIdx.x % 32, steps = __ldg(bands.steps + part);
  const uint4* values = static_cast<const uint4*>(bands.values) + part * bands.most * 32 + lane;
  const uint16_t* offsets = bands.offsets + part * bands.most * kStep + lane % kStep;
  if (steps == 0) return;
  uint4 value = __ldg(values);
  int offset = __ldg(offsets);
#pragma unroll 1
  for (int s = 0; s < steps; ++s) {
    const uint32_t a[4] = {value.x, value.y, value.z, value.w};
    const HalfUnit* const column = units + offset;
    if (s + 1 < steps) {  // under way while this step is computed
      value = __ldg(values + (s + 1) * 32);
      offset = __ldg(offsets + (s + 1) * kStep);
    }
#pragma unroll
    for (int j = 0; j < kPixels / 2; ++j) {
      uint32_t x[4];
      ldmatrix_x4<true>(x, column + at[j]);
      const uint32_t first[2] = {x[0], x[1]}, second[2] = {x[2], x[3]};
      mma(sums[2 * j], a, first, T());
      mma(sums[2 * j + 1], a, second, T());
    }
  }
}

__device__ __forceinline__ uint32_t bits_of(__half x) { return __half_as_ushort(x); }
__device__ __forceinline__ uint32_t bits_of(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }

// A pixel of eight images and 16 channels from `channel` on. Neighbouring channels lie four lanes apart: such lanes
// swap a number each, so that one of them stores two channels of one image, the other of the next.
template <class T>
__device__ __forceinline__ void store(const SparseImage& m, int image, int row, int column, int channel,
                                      const float (&sums)[4], const T* bias) {
  const int lane = threadIdx.x % 32;
  const bool odd = lane & 4;
  image += lane % 4 * 2 + odd;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float own = odd ? sums[half * 2 + 1] : sums[half * 2];
    const float other = __shfl_xor_sync(~0u, odd ? sums[half * 2] : sums[half * 2 + 1], 4);
    const int to = channel + half * 8 + lane / 8 * 2;
    if (to >= m.channels || !has_pixel(m, image, row, column)) continue;
    T low, high;
    narrow((odd ? other : own) + (bias ? widen(bias[to]) : 0), low);
    narrow((odd ? own : other) + (bias ? widen(bias[to + 1]) : 0), high);
    uint16_t* const pair =
        static_cast<uint16_t*>(m.data) + image * m.image_stride + row * m.row_stride + column * m.column_stride + to;
    *reinterpret_cast<uint32_t*>(pair) = bits_of(low) | bits_of(high) << 16;
  }
}

// A block of threads takes one tile and a band for every two warps.
template <class T>
__global__ void __launch_bounds__(256, 2)
    product_halves(int count, const __grid_constant__ SparseGrid grid, const SparseBands bands, const SparseImage input,
                   const SparseImage output, const T* bias) {
  SPARSEKERN_SHARED(HalfUnit, units);
  const Tile tile = tile_of<kSparseHalfImages>(grid, blockIdx.x);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_pixel = warp % 2 * kPixels;
  const int band = blockIdx.y * (blockDim.x / 64) + warp / 2;
  int at[kPixels / 2];
#pragma unroll
  for (int j = 0; j < kPixels / 2; ++j) {
    const int pixel = first_pixel + 2 * j + lane / 16;
    at[j] = pixel / grid.tile_columns * grid.stride_y * grid.pitch + pixel % grid.tile_columns;
  }
  float sums[kPixels][4] = {};
  for (int s = 0; s < bands.slabs; ++s) {
    __syncthreads();
    load_slab(grid, input, tile, s * grid.slab, units);
    __syncthreads();
    if (band < count) multiply<T>(bands, int64_t{band} * bands.slabs + s, units, at, sums);
  }
  if (band >= count) return;
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    const int pixel = first_pixel + p, row = tile.row + pixel / grid.tile_columns;
    const int column = tile.column + pixel % grid.tile_columns;
    if (row < grid.rows && column < grid.columns) store(output, tile.image, row, column, band * 16, sums[p], bias);
  }
}

template <class T>
int launch(const SparseWeight& w, const SparseGrid& grid, const SparseBands& bands, const SparseImage& input,
           const SparseImage& output, const void* bias, void* stream) {
  const int count = (w.rows + kBandRows - 1) / kBandRows, each = count < 4 ? count : 4;
  const uint32_t tiles = ((grid.rows + grid.tile_rows - 1) / grid.tile_rows) *
                         ((grid.columns + grid.tile_columns - 1) / grid.tile_columns) *
                         ((output.images + kSparseHalfImages - 1) / kSparseHalfImages);
  SPARSEKERN_LAUNCH(product_halves<T>, dim3(tiles, (count + each - 1) / each), dim3(64 * each),
                    grid.slab * grid.channel_step * sizeof(HalfUnit), stream, count, grid, bands, input, output,
                    static_cast<const T*>(bias));
  return launch_status();
}

}  // namespace

int sparse_pack_halves(const SparseWeight& weight, const SparseGrid& grid, const SparseBands& bands, void* stream) {
  const uint32_t shared = grid.slab * grid.taps * (sizeof(Column) + sizeof(uint32_t));
  SPARSEKERN_LAUNCH(pack_halves, dim3(bands.slabs, (weight.rows + kBandRows - 1) / kBandRows), dim3(kPackThreads),
                    shared, stream, weight, grid, bands);
  return launch_status();
}

int sparse_product_halves(Dtype dtype, const SparseWeight& weight, const SparseGrid& grid, const SparseBands& bands,
                          const SparseImage& input, const SparseImage& output, const void* bias, void* stream) {
  const auto run = dtype == Dtype::kFloat16 ? launch<__half> : launch<__nv_bfloat16>;
  return run(weight, grid, bands, input, output, bias, stream);
}

}  // namespace sparsekern::cuda
