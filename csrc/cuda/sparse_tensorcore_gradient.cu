// The gradient of a sparse weight at its mask in float16 and bfloat16 on tensor cores, for 4x1 blocks, with sums in
// float32. The contract is sparsekern/ops/sparse_conv2d.py.
//
// Of a band and a slab (kernels.h) it is the product of two matrices whose inner dimension are the pixels of all
// images: 16 rows of output gradients times the columns that the band needs. mma.sync takes 16 rows, 16 columns in two
// halves, and two pixels of eight images at a time, all in the units of sparse_tile.cuh. What the product has besides
// the blocks of the mask is dropped.
#include "numbers.cuh"
#include "sparse_tile.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kThreads = 256, kBands = 4, kStep = 16, kOutputs = 16 * kBands;
constexpr int kPairs = kSparsePixels / 4;  // of pixels, for each of the two warps of a band
constexpr int kSteps = 8;                  // whose sums a warp holds
using Sums = float[2 * kSteps][4];
static_assert(kGradientReserved == (kOutputs * kPixelPitch + 1) * sizeof(HalfUnit));
static_assert(kBands * 32 * sizeof(Sums) <= kOutputs * kPixelPitch * sizeof(HalfUnit));

// Adds a tile's products to the sums of `steps` steps: `gradients` are those of the band, at[j] is a lane's column of
// step j in the slab. Pixels beyond the grid may be those of an input with Inf in it: `zero` takes their place.
template <class T>
__device__ __forceinline__ void add_products(const SparseGrid& g, const Tile& tile, const HalfUnit* gradients,
                                             const HalfUnit* slab, const HalfUnit* zero, const int (&at)[kSteps],
                                             int steps, Sums& sums) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 % 2 * (2 * kPairs), shift = __ffs(g.tile_columns) - 1;
  const HalfUnit* const rows = gradients + (lane % 16) * kPixelPitch + first + lane / 16;
#pragma unroll 1
  for (int p = 0; p < 2 * kPairs; p += 2) {
    const int pixel = first + p + lane / 8 % 2, y = pixel >> shift, x = pixel & (g.tile_columns - 1);
    const bool inside = tile.row + y < g.rows && tile.column + x < g.columns;
    if (!__any_sync(~0u, inside)) continue;
    const HalfUnit* const from = inside ? slab + y * g.stride_y * g.pitch + x : zero;
    const int mask = inside ? ~0 : 0;
    uint32_t a[4];
    ldmatrix_x4<false>(a, rows + p);
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      if (j >= steps) continue;
      uint32_t b[4];
      ldmatrix_x4<false>(b, from + (at[j] & mask));
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
      mma(sums[2 * j], a, low, T());
      mma(sums[2 * j + 1], a, high, T());
    }
  }
}

// The second warp of a band leaves its sums in shared memory, the first adds them to its own.
__device__ __forceinline__ void add_warps(float* shared, Sums& sums) {
  float* const own = shared + threadIdx.x / 64 * (32 * sizeof(Sums) / sizeof(float)) + threadIdx.x % 32;
  const bool second = threadIdx.x / 32 % 2;
  __syncthreads();
  if (second) {
#pragma unroll
    for (int i = 0; i < 8 * kSteps; ++i) own[i * 32] = sums[i / 4][i % 4];
  }
  __syncthreads();
  if (second) return;
#pragma unroll
  for (int i = 0; i < 8 * kSteps; ++i) sums[i / 4][i % 4] += own[i * 32];
}

// Stores the sums of what is in a block of the weight; `blocks` are those of the first column, of every row of the
// band.
__device__ __forceinline__ void store(const int32_t* blocks, int steps, const Sums& sums, float* partial) {
  const int lane = threadIdx.x % 32, row = lane / 4;
#pragma unroll
  for (int j = 0; j < 2 * kSteps; ++j) {
    if (j >= 2 * steps) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int block = __ldg(blocks + (j * 8 + lane % 4 * 2 + i % 2) * 4 + row / 4 + i / 2 * 2);
      if (block >= 0) partial[int64_t{block} * 4 + row % 4] = sums[j][i];
    }
  }
}

// A block of threads takes kBands bands in one slab, over every `splits`-th tile; two warps share a band, each with
// half of the pixels.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_halves(const SparseWeight w, const __grid_constant__ SparseGrid grid, const SparseBands bands,
                    const SparseImage input, const SparseImage gradient, float* partial, int32_t splits,
                    int32_t tiles) {
  SPARSEKERN_SHARED(HalfUnit, gradients);
  HalfUnit* const zero = gradients + kOutputs * kPixelPitch;
  HalfUnit* const slab = zero + 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, s = blockIdx.x;
  const int first_band = blockIdx.y * kBands, count = (w.rows + 3) / 4;
  int most = 0, own = 0;  // steps
  for (int b = 0; b < kBands && first_band + b < count; ++b) {
    const int steps = bands.steps[int64_t{first_band + b} * bands.slabs + s];
    most = steps > most ? steps : most;
    own = b == warp / 2 ? steps : own;
  }
  if (threadIdx.x < kSparseHalfImages) zero->image[threadIdx.x] = 0;
  const int64_t first_column = (int64_t{first_band + warp / 2} * bands.slabs + s) * bands.most * kStep;
  for (int from = 0; from < most; from += kSteps) {
    const int steps = clamped(own - from, 0, kSteps);
    const int64_t columns = first_column + from * kStep;
    int at[kSteps];
    Sums sums = {};
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      at[j] = j < steps ? __ldg(bands.offsets + columns + j * kStep + lane / 16 * 8 + lane % 8) : 0;
    }
    for (int t = blockIdx.z; t < tiles; t += splits) {
      const Tile tile = tile_of<kSparseHalfImages>(grid, t);
      __syncthreads();
      load_slab(grid, input, tile, s * grid.slab, slab);
      load_gradients<kThreads, kOutputs>(grid, gradient, tile, first_band * 16, gradients);
      __syncthreads();
      add_products<T>(grid, tile, gradients + warp / 2 * 16 * kPixelPitch, slab, zero, at, steps, sums);
    }
    add_warps(reinterpret_cast<float*>(gradients), sums);
    if (warp % 2 == 0) store(bands.blocks + columns * 4, steps, sums, partial + int64_t{blockIdx.z} * w.blocks * 4);
  }
}

// One band and slab; in the order of the splits, so that the result is always the same.
template <class T>
__global__ void __launch_bounds__(256)
    add_halves(const SparseWeight w, const SparseBands bands, const float* partial, int32_t splits, T* result) {
  const int64_t part = int64_t{blockIdx.y} * bands.slabs + blockIdx.x, first = part * bands.most * kStep;
  const int columns = bands.steps[part] * kStep, r = threadIdx.x % 4;  // of a block
  for (int i = threadIdx.x / 4; i < columns * 4; i += 256 / 4) {
    const int row = i / columns;  // of the band; neighbouring columns of a row are neighbours in `partial`
    const int64_t column = first + i % columns;
    const int block = bands.blocks[column * 4 + row];
    if (block < 0) continue;
    float sum = 0;
    for (int s = 0; s < splits; ++s) sum += partial[(int64_t{s} * w.blocks + block) * 4 + r];
    const int64_t element = bands.elements[column] + (int64_t{blockIdx.y} * 4 + row) * w.row_step;
    narrow(sum, result[(w.packed ? int64_t{block} * 4 : element) + r * w.inner_step]);
  }
}

template <class T>
int launch(const SparseWeight& w, const SparseGrid& grid, const SparseBands& bands, const SparseImage& input,
           const SparseImage& gradient, float* partial, int32_t splits, void* result, void* stream) {
  const int32_t tiles = ((grid.rows + grid.tile_rows - 1) / grid.tile_rows) *
                        ((grid.columns + grid.tile_columns - 1) / grid.tile_columns) *
                        ((gradient.images + kSparseHalfImages - 1) / kSparseHalfImages);
  const uint32_t shared = kGradientReserved + grid.slab * grid.channel_step * sizeof(HalfUnit);
  const int count = (w.rows + 3) / 4;
  SPARSEKERN_LAUNCH(gradient_halves<T>, dim3(bands.slabs, (count + kBands - 1) / kBands, splits), dim3(kThreads),
                    shared, stream, w, grid, bands, input, gradient, partial, splits, tiles);
  if (const int error = launch_status()) return error;
  SPARSEKERN_LAUNCH(add_halves<T>, dim3(bands.slabs, count), dim3(256), 0, stream, w, bands, partial, splits,
                    static_cast<T*>(result));
  return launch_status();
}

}  // namespace

int sparse_weight_gradient_halves(Dtype dtype, const SparseWeight& weight, const SparseGrid& grid,
                                  const SparseBands& bands, const SparseImage& input, const SparseImage& gradient,
                                  float* partial, int32_t splits, void* result, void* stream) {
  const auto run = dtype == Dtype::kFloat16 ? launch<__half> : launch<__nv_bfloat16>;
  return run(weight, grid, bands, input, gradient, partial, splits, result, stream);
}

}  // namespace sparsekern::cuda
