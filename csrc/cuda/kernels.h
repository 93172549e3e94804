// Interface between the host code (g++, torch) and the kernels (nvcc, no torch): plain structs and functions.
// A function launches on `stream`, waits for nothing, and returns 0 or the error of CUDA.
#pragma once
#include <stdint.h>

#include "../cpu/simd/kernels.h"

namespace sparsekern::cuda {

// One number on the device, float64 if `wide`, else float32; absent where `at` is null.
struct DeviceScalar {
  const void* at;
  bool wide;
};

// One parameter of an optimizer step. `state` holds momentum, or both moments; `mask` is null for a dense parameter;
// `index` is its entry in the operand with one entry per parameter. `known_zero`: see sparsekern/ops/masked_sgd.py.
struct StepTensor {
  void* param;
  const void* grad;
  void* state[2];
  const uint8_t* mask;
  const uint8_t* inner;  // null where the weight decay is the same everywhere
  int64_t size;
  uint32_t first_block;  // of the launch, set by it
  uint32_t index : 30;
  uint32_t known_zero : 1;
  uint32_t aligned : 1;  // to 16 bytes, all of them; set by the launch
};

// In double; each kernel rounds them once to its compute type.
struct SgdStep {
  double negative_lr, mu, one_minus_dampening, weight_decay, inner_decay, outer_decay;
  bool nesterov, maximize, keep_pruned_momentum, freeze_pruned;
};

// One launch per 490 tensors of one type, and one that clears `fresh`, which has `count` entries.
int masked_sgd(Dtype dtype, StepTensor* tensors, int64_t count, const SgdStep& step, const uint8_t* fresh,
               DeviceScalar grad_scale, DeviceScalar found_inf, void* stream);
int clear_fresh(uint8_t* fresh, int64_t count, DeviceScalar found_inf, void* stream);

struct AdamwStep {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
};

// `rates` has room for two float64 per parameter, which this fills from the counts of steps, each now one higher.
int adamw_rates(float* steps, int64_t count, const AdamwStep& step, void* rates, DeviceScalar found_inf, void* stream);
int masked_adamw(Dtype dtype, StepTensor* tensors, int64_t count, const AdamwStep& step, const void* rates,
                 DeviceScalar grad_scale, DeviceScalar found_inf, void* stream);

// One score tensor of topk_mask in storage order: (outer, axis, inner), cut along `axis` into groups of `width`, 4
// or 1. `keys` has room for a key per group where `width` is 4, `bits` is one bit per group, zero at first. `sizes` and
// `strides` lead from the logical order of groups to that of storage; none where they are the same.
struct ScoreTensor {
  const void* score;
  uint8_t* mask;
  const uint8_t* candidates;
  void* keys;
  uint32_t* bits;
  uint32_t weights, groups, inner;
  int64_t keep;  // of the segment
  uint32_t axis, width, dims, sizes[8], strides[8];
  int32_t segment;
  // Chunks of kTopkChunk groups: of all tensors before this one, before its segment, and of its segment.
  uint32_t first_chunk, segment_first, segment_chunks;
  Dtype dtype;
};

constexpr uint32_t kTopkChunk = 8192;
constexpr int kTopkBins = 2048, kTopkWarps = 8;

// A segment is what shares a budget. All zero at first, except for `counts`, which has kTopkWarps entries per chunk.
struct TopkState {
  uint64_t key;          // of the threshold, as far as it is known
  int64_t needed, ties;  // still to be chosen among the groups that share those bits, and their number
};
struct TopkSpace {
  uint32_t* histograms;  // kTopkBins for each pass and segment
  uint32_t* tickets;     // one for each pass and segment
  TopkState* states;
  uint32_t* counts;
  int32_t* status;
  int32_t segments;
};

// 64-bit keys where a score is float64 and not of a block.
constexpr int topk_passes(bool wide) { return wide ? 6 : 3; }

int topk_mask(const ScoreTensor* tensors, int64_t count, const TopkSpace& space, bool wide, bool magnitude,
              void* stream);
// n:m along `axis`; `groups`, `keep` and what concerns segments are not used.
int topk_n_of_m(const ScoreTensor* tensors, int64_t count, int32_t* status, uint32_t n, uint32_t m, bool magnitude,
                void* stream);

// What a pass of a sparse layer reads or writes: `images` of `height` x `width` pixels, channels neighbours in memory.
// Pixels from number `limit` on are not there: several rows of a matrix travel as the pixels of four (of 16-bit
// numbers, eight) long images.
struct SparseImage {
  void* data;
  int64_t image_stride, row_stride, column_stride;
  int32_t images, height, width, channels;
  int64_t limit;
};

constexpr int kSparseTaps = 64, kSparsePixels = 32, kSparseImages = 4, kSparseHalfImages = 8;
// Bytes of shared memory: what every GPU gives without being asked, and what two blocks on an sm_80 may have.
constexpr uint32_t kSparseShared = 48 << 10, kSparseMoreShared = 80 << 10;

// One output pixel (y, x) of the grid reads input pixels (y * stride + dy - top, x * stride + dx - left), dy and dx of
// its taps. A tile of kSparsePixels pixels of kSparseImages images needs `halo_rows` x `halo_columns` input pixels; in
// shared memory, pixels that the stride tells apart lie apart, and a channel takes `channel_step` units of
// kSparseImages floats or kSparseHalfImages 16-bit numbers.
struct SparseGrid {
  int32_t rows, columns, stride_y, stride_x, top, left;
  int32_t tile_rows, tile_columns;
  int32_t halo_rows, halo_columns, split_columns, pitch, channel_step, slab;  // slab: channels in shared memory
  int32_t taps, tap_offset[kSparseTaps];                                      // -1: not in this pass
};

// A sparse weight as sparsekern/ops/sparse_structure.py has it, or its transpose, whose rows are input channels.
struct SparseWeight {
  const void* data;
  int64_t row_step, channel_step, tap_row_step, tap_column_step;  // in elements, of one row and channel of blocks
  int64_t inner_step;                                             // between the four of a block; 1 row for "packed"
  const int32_t* pointers;
  const int32_t* indices;
  const int32_t* source;  // of each block in packed order, null for itself
  int32_t rows, channels, blocks, kernel_columns, tall, wide;
  bool packed;
};

// Filled by sparse_pack for one pass: for each block that takes part its offset in a slab and its values; the blocks of
// row r and slab s are [bounds[r * (slabs + 1) + s], bounds[r * (slabs + 1) + s + 1]).
struct SparsePacked {
  int32_t* offsets;
  float* values;
  int32_t* bounds;
  int32_t* targets;  // element of each block in the gradient; null without need
  int32_t slabs;
};

int sparse_pack(const SparseWeight& weight, const SparseGrid& grid, const SparsePacked& packed, void* stream);
// Output pixel (y, x) of the grid goes to pixel (first_row + y * step_y, first_column + x * step_x) of `output`.
struct SparsePlace {
  int32_t first_row, first_column, step_y, step_x;
};
int sparse_product(const SparseWeight& weight, const SparseGrid& grid, const SparsePacked& packed,
                   const SparseImage& input, const SparseImage& output, const SparsePlace& place, const float* bias,
                   void* stream);
// `partial` has room for splits * weight.blocks blocks.
int sparse_weight_gradient(const SparseWeight& weight, const SparseGrid& grid, const SparsePacked& packed,
                           const SparseImage& input, const SparseImage& gradient, float* partial, int32_t splits,
                           float* result, void* stream);

// A weight of 4x1 blocks as operands of tensor cores, filled by sparse_pack_halves. Four rows of blocks are 16 rows of
// the product, a "band". Of a band and a slab it holds the columns (a channel at a tap) that any block of the band is
// in, 16 to a step, with zeros where a row has no block there; a band has room for `most` steps in each slab. For a
// product `blocks` and `elements` are null, for the gradient of the weight `values`.
struct SparseBands {
  uint16_t* offsets;  // of each column in a slab
  void* values;       // of each step 32 times 16 bytes, one for each lane
  int32_t* blocks;    // of each column four: the block of the weight in each row of the band, -1 for none
  int64_t* elements;  // of each column: where it is in the first row of a weight that is not packed
  int32_t* steps;     // of band b and slab s at b * slabs + s
  int32_t slabs, most;
};

int sparse_pack_halves(const SparseWeight& weight, const SparseGrid& grid, const SparseBands& bands, void* stream);
// float16 or bfloat16 everywhere, sums in float32.
int sparse_product_halves(Dtype dtype, const SparseWeight& weight, const SparseGrid& grid, const SparseBands& bands,
                          const SparseImage& input, const SparseImage& output, const void* bias, void* stream);
// The grid must leave kGradientReserved bytes of kSparseMoreShared; `partial` has room for splits * weight.blocks
// blocks of float32, `result` is of `dtype`.
constexpr uint32_t kGradientReserved = 33808;
int sparse_weight_gradient_halves(Dtype dtype, const SparseWeight& weight, const SparseGrid& grid,
                                  const SparseBands& bands, const SparseImage& input, const SparseImage& gradient,
                                  float* partial, int32_t splits, void* result, void* stream);

}  // namespace sparsekern::cuda
