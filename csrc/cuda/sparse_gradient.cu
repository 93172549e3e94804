// The gradient of a sparse weight at its mask in float32, on CUDA cores. The contract is
// sparsekern/ops/sparse_conv2d.py.
#include "sparse_tile.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kThreads = 256, kOutputs = 32;

// A lane owns one block of the weight and its sums; pixels come one after the other. A block of threads takes the
// blocks of kOutputs outputs in one slab, over every `splits`-th tile.
template <int kTall, int kWide>
__global__ void __launch_bounds__(kThreads, 2)
    weight_gradient(const SparseWeight w, const __grid_constant__ SparseGrid grid, const SparsePacked packed,
                    const SparseImage input, const SparseImage gradient, float* partial, int32_t splits,
                    int32_t tiles) {
  constexpr int kRows = kOutputs / kTall;
  SPARSEKERN_SHARED(Unit, slab);
  __shared__ int starts[kRows + 1];
  Unit* const gradients = slab + grid.slab * grid.channel_step;
  const int first_row = blockIdx.y * kRows, s = blockIdx.x;
  if (threadIdx.x == 0) {
    starts[0] = 0;
    for (int r = 0; r < kRows; ++r) {
      const int32_t* const bound = packed.bounds + int64_t{first_row + r} * (packed.slabs + 1) + s;
      starts[r + 1] = starts[r] + (first_row + r < w.rows ? bound[1] - bound[0] : 0);
    }
  }
  __syncthreads();
  for (int from = 0; from < starts[kRows]; from += kThreads) {
    const int number = from + static_cast<int>(threadIdx.x);
    const bool works = number < starts[kRows];
    int row = 0;
    while (works && number >= starts[row + 1]) ++row;
    const int k = works ? packed.bounds[int64_t{first_row + row} * (packed.slabs + 1) + s] + number - starts[row] : 0;
    const Unit* const units = slab + (works ? packed.offsets[k] : 0);
    float sums[kTall][kWide] = {};
    for (int t = blockIdx.z; t < tiles; t += splits) {
      const Tile tile = tile_of(grid, t);
      __syncthreads();
      load_slab(grid, input, tile, s * grid.slab, slab);
      load_gradients<kThreads, kOutputs>(grid, gradient, tile, first_row * kTall, gradients);
      __syncthreads();
      const int rows = grid.rows - tile.row < grid.tile_rows ? grid.rows - tile.row : grid.tile_rows;
      const int columns =
          grid.columns - tile.column < grid.tile_columns ? grid.columns - tile.column : grid.tile_columns;
      for (int y = 0; y < rows && works; ++y) {
        const Unit* const line = units + y * grid.stride_y * grid.pitch;
        const Unit* const outputs = gradients + row * kTall * kPixelPitch + y * grid.tile_columns;
#pragma unroll 2
        for (int x = 0; x < columns; ++x) {
          Unit d[kTall];
#pragma unroll
          for (int r = 0; r < kTall; ++r) d[r] = outputs[r * kPixelPitch + x];
#pragma unroll
          for (int c = 0; c < kWide; ++c) {
            const Unit u = line[c * grid.channel_step + x];
#pragma unroll
            for (int r = 0; r < kTall; ++r) {
#pragma unroll
              for (int i = 0; i < kSparseImages; ++i) sums[r][c] = fmaf(d[r].image[i], u.image[i], sums[r][c]);
            }
          }
        }
      }
    }
    if (!works) continue;
    float* const to = partial + (int64_t{blockIdx.z} * w.blocks + k) * (kTall * kWide);
#pragma unroll
    for (int i = 0; i < kTall * kWide; ++i) to[i] = sums[i / kWide][i % kWide];
  }
}

// In the order of the splits, so that the result is always the same.
__global__ void __launch_bounds__(256)
    add_partials(const SparseWeight w, const SparsePacked packed, const float* partial, int32_t splits, float* result) {
  const int size = w.tall * w.wide;
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x, count = int64_t{w.blocks} * size;
  const int target = i < count ? packed.targets[i / size] : -1;
  if (target < 0) return;
  float sum = 0;
  for (int s = 0; s < splits; ++s) sum += partial[s * count + i];
  result[target + i % size * w.inner_step] = sum;
}

template <int kTall, int kWide>
int launch_gradient(const SparseWeight& w, const SparseGrid& grid, const SparsePacked& packed, const SparseImage& input,
                    const SparseImage& gradient, float* partial, int32_t splits, float* result, void* stream) {
  const int32_t tiles = ((grid.rows + grid.tile_rows - 1) / grid.tile_rows) *
                        ((grid.columns + grid.tile_columns - 1) / grid.tile_columns) *
                        ((gradient.images + kSparseImages - 1) / kSparseImages);
  const uint32_t shared = (grid.slab * grid.channel_step + kOutputs * kPixelPitch) * sizeof(Unit);
  const dim3 blocks(packed.slabs, (w.rows * kTall + kOutputs - 1) / kOutputs, splits);
  SPARSEKERN_LAUNCH((weight_gradient<kTall, kWide>), blocks, dim3(kThreads), shared, stream, w, grid, packed, input,
                    gradient, partial, splits, tiles);
  if (const int error = launch_status()) return error;
  const int64_t count = int64_t{w.blocks} * kTall * kWide;
  SPARSEKERN_LAUNCH(add_partials, dim3((count + 255) / 256), dim3(256), 0, stream, w, packed, partial, splits, result);
  return launch_status();
}

}  // namespace

int sparse_weight_gradient(const SparseWeight& w, const SparseGrid& grid, const SparsePacked& packed,
                           const SparseImage& input, const SparseImage& gradient, float* partial, int32_t splits,
                           float* result, void* stream) {
  const auto launch = w.tall == 4 ? launch_gradient<4, 1> : w.wide == 4 ? launch_gradient<1, 4> : launch_gradient<1, 1>;
  return launch(w, grid, packed, input, gradient, partial, splits, result, stream);
}

}  // namespace sparsekern::cuda
