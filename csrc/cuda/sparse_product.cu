// Sparse convolution and its input gradient in float32, on CUDA cores. The contract is sparsekern/ops/sparse_conv2d.py.
#include "sparse_tile.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kPackWarps = 4;

// A warp per row keeps the order of its blocks and drops those that are not in this pass. Indices are those of a caller
// who may have changed them: one out of range is dropped, so that nothing leaves its memory.
__global__ void __launch_bounds__(32 * kPackWarps)
    pack(const SparseWeight w, const __grid_constant__ SparseGrid grid, const SparsePacked packed) {
  const int row = blockIdx.x * kPackWarps + threadIdx.x / 32, lane = threadIdx.x % 32, size = w.tall * w.wide;
  if (row >= w.rows) return;
  const int begin = clamped(w.pointers[row], 0, w.blocks), end = clamped(w.pointers[row + 1], begin, w.blocks);
  int32_t* const bounds = packed.bounds + int64_t{row} * (packed.slabs + 1);
  const float* const data = static_cast<const float*>(w.data);
  int next = begin, slab_before = -1;
  for (int first = begin; first < end; first += 32) {
    const int k = first + lane, given = k < end ? w.indices[k] : -1;
    const bool inside = given >= 0 && given < w.channels / w.wide * grid.taps;
    const int index = inside ? given : 0, channel = index / grid.taps, tap = index - channel * grid.taps;
    const bool there = inside && grid.tap_offset[tap] >= 0;
    const uint32_t all = __ballot_sync(~0u, there), below = all & ((1u << lane) - 1);
    const int slab = channel * w.wide / grid.slab, at = next + __popc(below);
    const int neighbour = __shfl_sync(~0u, slab, below ? 31 - __clz(below) : 0);
    if (there) {
      for (int s = (below ? neighbour : slab_before) + 1; s <= slab; ++s) bounds[s] = at;
      packed.offsets[at] = (channel * w.wide - slab * grid.slab) * grid.channel_step + grid.tap_offset[tap];
      const int64_t element = row * w.row_step + channel * w.channel_step + tap / w.kernel_columns * w.tap_row_step +
                              tap % w.kernel_columns * w.tap_column_step;
      const int64_t own = w.packed ? int64_t{w.source ? w.source[k] : k} * size : element;
      for (int i = 0; i < size; ++i) packed.values[int64_t{at} * size + i] = data ? data[own + i * w.inner_step] : 0;
      if (packed.targets) packed.targets[at] = static_cast<int32_t>(own);
    }
    const int last = __shfl_sync(~0u, slab, all ? 31 - __clz(all) : 0);
    slab_before = all && last > slab_before ? last : slab_before;
    next += __popc(all);
  }
  for (int s = slab_before + 1 + lane; s <= packed.slabs; s += 32) bounds[s] = next;
}

template <int kTall>
constexpr int kRowsPerWarp = kTall == 4 ? 4 : 8;

// One block of the weight on one pixel of four images.
template <int kTall, int kWide>
__device__ __forceinline__ void multiply(const float* values, const Unit* units, int channel_step,
                                         float (&sums)[kTall][kSparseImages]) {
  float weight[kTall * kWide];
  if constexpr (kTall * kWide == 4) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(values));
    weight[0] = four.x, weight[1] = four.y, weight[2] = four.z, weight[3] = four.w;
  } else {
    weight[0] = __ldg(values);
  }
#pragma unroll
  for (int c = 0; c < kWide; ++c) {
    const Unit x = units[c * channel_step];
#pragma unroll
    for (int r = 0; r < kTall; ++r) {
#pragma unroll
      for (int i = 0; i < kSparseImages; ++i) sums[r][i] = fmaf(weight[r * kWide + c], x.image[i], sums[r][i]);
    }
  }
}

// A block of threads takes one tile and kRowsPerWarp rows of blocks per warp; a lane takes one pixel of four images.
template <int kTall, int kWide>
__global__ void __launch_bounds__(256, 2)
    product(const SparseWeight w, const __grid_constant__ SparseGrid grid, const SparsePacked packed,
            const SparseImage input, const SparseImage output, const SparsePlace place, const float* bias) {
  constexpr int kRows = kRowsPerWarp<kTall>;
  SPARSEKERN_SHARED(Unit, slab);
  const Tile tile = tile_of(grid, blockIdx.x);
  const int lane = threadIdx.x % 32, y = lane / grid.tile_columns, x = lane % grid.tile_columns;
  const int first_row = (blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32) * kRows;
  const Unit* const own = slab + y * grid.stride_y * grid.pitch + x;
  float sums[kRows][kTall][kSparseImages] = {};
  for (int s = 0; s < packed.slabs; ++s) {
    __syncthreads();
    load_slab(grid, input, tile, s * grid.slab, slab);
    __syncthreads();
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      if (first_row + b >= w.rows) continue;
      const int32_t* const bound = packed.bounds + int64_t{first_row + b} * (packed.slabs + 1) + s;
      const int end = __ldg(bound + 1);
      // Unrolled, so that the loads of several blocks, the same for the whole warp, are under way at a time.
#pragma unroll 4
      for (int k = __ldg(bound); k < end; ++k) {
        multiply<kTall, kWide>(packed.values + int64_t{k} * (kTall * kWide), own + __ldg(packed.offsets + k),
                               grid.channel_step, sums[b]);
      }
    }
  }
  const int row = tile.row + y, column = tile.column + x;
  if (row >= grid.rows || column >= grid.columns) return;
  const int to_row = place.first_row + row * place.step_y, to_column = place.first_column + column * place.step_x;
#pragma unroll
  for (int i = 0; i < kSparseImages; ++i) {
    if (!has_pixel(output, tile.image + i, to_row, to_column)) continue;
    float* const to = static_cast<float*>(output.data) + (tile.image + i) * output.image_stride +
                      to_row * output.row_stride + to_column * output.column_stride;
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
#pragma unroll
      for (int r = 0; r < kTall; ++r) {
        const int channel = (first_row + b) * kTall + r;
        if (channel < output.channels) to[channel] = sums[b][r][i] + (bias ? bias[channel] : 0);
      }
    }
  }
}

template <int kTall, int kWide>
int launch_product(const SparseWeight& w, const SparseGrid& grid, const SparsePacked& packed, const SparseImage& input,
                   const SparseImage& output, const SparsePlace& place, const float* bias, void* stream) {
  constexpr int kRows = kRowsPerWarp<kTall>;
  const int wanted = (w.rows + kRows - 1) / kRows, warps = wanted < 8 ? wanted : 8;
  const uint32_t tiles = ((grid.rows + grid.tile_rows - 1) / grid.tile_rows) *
                         ((grid.columns + grid.tile_columns - 1) / grid.tile_columns) *
                         ((output.images + kSparseImages - 1) / kSparseImages);
  SPARSEKERN_LAUNCH((product<kTall, kWide>), dim3(tiles, (wanted + warps - 1) / warps), dim3(32 * warps),
                    grid.slab * grid.channel_step * sizeof(Unit), stream, w, grid, packed, input, output, place, bias);
  return launch_status();
}

}  // namespace

int sparse_pack(const SparseWeight& weight, const SparseGrid& grid, const SparsePacked& packed, void* stream) {
  SPARSEKERN_LAUNCH(pack, dim3((weight.rows + kPackWarps - 1) / kPackWarps), dim3(32 * kPackWarps), 0, stream, weight,
                    grid, packed);
  return launch_status();
}

int sparse_product(const SparseWeight& w, const SparseGrid& grid, const SparsePacked& packed, const SparseImage& input,
                   const SparseImage& output, const SparsePlace& place, const float* bias, void* stream) {
  if (w.tall == 4) return launch_product<4, 1>(w, grid, packed, input, output, place, bias, stream);
  if (w.wide == 4) return launch_product<1, 4>(w, grid, packed, input, output, place, bias, stream);
  return launch_product<1, 1>(w, grid, packed, input, output, place, bias, stream);
}

}  // namespace sparsekern::cuda
