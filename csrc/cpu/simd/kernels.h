// Interface between the host code and the kernels of one instruction set: plain structs and a table of pointers.
#pragma once
#include <stdint.h>

namespace sparsekern {

// Bits of a bfloat16.
struct BFloat16 {
  uint16_t bits;
};

enum class Dtype : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// One parameter of masked_sgd_. `mask` is null for a dense parameter, `momentum` is null when mu is 0, `inner` where
// the weight decay is the same everywhere. `known_zero`: pruned elements of both are zero already, so those that
// nothing live is near need not be touched.
struct SgdTensor {
  void* param;
  const void* grad;
  void* momentum;
  const uint8_t* mask;
  const uint8_t* inner;
  Dtype dtype;
  bool fresh, known_zero;
};

// Already combined in double; each kernel rounds them once to its compute type.
struct SgdOptions {
  double negative_lr, mu, one_minus_dampening, weight_decay, inner_decay, outer_decay, grad_scale;
  bool nesterov, maximize, keep_pruned_momentum, freeze_pruned, scaled;
};

// One parameter of masked_adamw_ with its two moments. The last two depend on how many steps it has taken: minus
// lr / (1 - beta1^step), and the square root of 1 - beta2^step.
struct AdamwTensor {
  void* param;
  const void* grad;
  void* first;
  void* second;
  const uint8_t* mask;
  Dtype dtype;
  bool known_zero;
  double negative_step_size, correction;
};

// `shrink` is 1 - lr * weight_decay, applied where `decays`.
struct AdamwOptions {
  double one_minus_beta1, beta2, one_minus_beta2, eps, shrink, grad_scale;
  bool decays, maximize, scaled;
};

// One entry of masked_combine_. `mask` and `within` are null for all ones, `second` where nothing is read from it,
// `times` where it multiplies nothing. `stream`: write past the caches, for float32 on a border of 64 bytes.
struct CombineTensor {
  void* output;
  const void* first;
  const void* second;
  const void* times;
  const uint8_t* mask;
  const uint8_t* within;
  Dtype dtype;
  bool stream;
};

// Coefficients of first and second, and what multiplies the terms of second.
struct CombineOptions {
  double live[2], pruned[2], scale;
  bool scaled, magnitude;
};

// One score tensor of topk_mask in storage order: (outer, axis, inner), cut along `axis` into blocks of four if
// `block`, else single weights. `chosen` has one bit per group, and is the mask itself for single weights; `allowed`
// has the candidates, one bit per group, or is null. `wide` asks for 64-bit keys, which order float64 values. Single
// weights are multiplied by `factor` before they are ranked.
struct TopkTensor {
  const void* score;
  uint8_t* mask;
  uint8_t* chosen;
  const uint8_t* allowed;
  int64_t axis, inner;
  Dtype dtype;
  bool block, magnitude, wide;
  double factor;
};

// The histogram of key bits [shift, shift + bits) among the keys whose higher bits are `prefix`.
struct TopkLevel {
  uint64_t prefix;
  int32_t shift, bits;
};

// `count` neighbours of one row of an image: element `image` on, and element `packed` of a packed row on.
struct SparseRun {
  int64_t image, packed, count;
};

// `count` neighbours of one row of an image from element `image` on, in turns from two packed rows.
struct SparsePair {
  int64_t image, even, odd, count;
};

// What becomes of a sum: times `scale` of its channel, plus the bias, plus the residual, each rounded, then cut to
// [low, high]; NaN stays. Without a `scale` the sum starts at the bias.
struct SparseEpilogue {
  const float* scale = nullptr;
  float low = -__builtin_inff(), high = __builtin_inff();
};

// The order of flat blocks for aligned loads from the first-level cache: by slice of the tile, by row and in descending
// order of what their offsets leave when divided by the lanes. Those of a row in slice i begin with number
// `begins[i * rows + row]` and end where the next ones begin. The tile and its channels begin on a vector. `begins` is
// null where blocks are in any order in their row.
struct SparseOrder {
  const int32_t* begins = nullptr;
  int64_t slices = 1, rows = 0;
};

// The rows of a sparse weight, ready for one packed layout. A block is `tall` outputs by `wide` input channels, 4 x 1,
// 1 x 4 or 1 x 1; its values are neighbours, its first activation is `offsets[k]` floats after the tile's first, and
// its channels are `channel` floats apart. `bias` may be null. `padded`: the tile has whole vectors.
struct SparseRows {
  const int32_t* pointers;
  const int32_t* offsets;
  const float* values;
  const float* bias;
  int64_t channel;
  int32_t tall, wide;
  bool padded;
  SparseOrder order = {};
  SparseEpilogue epilogue = {};
};

// `count` pixels for a call of sparse_rows. Row `begin` goes to `out`, rows lie `width` floats apart; `stream`: past
// the caches, to whole vectors on cache lines. The tile that comes next lies `ahead` floats on, 0 if none does or if it
// need not be fetched; every `every`-th row fetches what it would read there. `residual` lies as `out` does, or is
// null.
struct SparseTile {
  const float* data;
  int64_t count;
  float* out;
  int64_t width;
  bool stream;
  int64_t ahead, every;
  const float* residual;
};

// What sparse_dots fetches meanwhile: the gradients of the rows behind each one, and `rows` rows of the tile that comes
// next, as this one lies; nothing of what is null or false.
struct SparseAhead {
  bool gradients;
  const float* tile;
  int64_t rows;
};

// Lanes of a vector; how many vectors of pixels one call of sparse_rows takes for blocks that are tall, and not; how
// many channels of flat blocks must lie alike to vectors, in a row and on average, for a SparseOrder to pay; 0 if it
// never does.
struct SparseLimits {
  int64_t lanes, tall, flat, alike;
};

// (images, channels, pixels), contiguous; what belongs to no channel is one pixel after another.
struct BatchNormShape {
  int64_t images, channels, pixels;
};

// One batch_norm. `weight`, `bias` and `residual` may be null.
struct BatchNorm {
  BatchNormShape shape;
  const float* input;
  const float* weight;
  const float* bias;
  const float* residual;
  float* output;
  float* mean;
  float* variance;
  double eps;
  bool relu;
};

// Its gradients, each null where nobody asks for it. `output` is that of a ReLU, null without one.
struct BatchNormGradient {
  BatchNormShape shape;
  const float* grad;
  const float* input;
  const float* weight;
  const float* output;
  const float* mean;
  const float* variance;
  float* grad_input;
  float* grad_weight;
  float* grad_bias;
  float* grad_residual;
  double eps;
};

// One entry of movement_step_; `dtype`, of gradient and weight, is not float64. `mask` is null for all ones.
struct MovementTensor {
  float* score;
  void* grad;
  const void* weight;
  const uint8_t* mask;
  double penalty;
  Dtype dtype;
};

struct MovementOptions {
  double negative_lr, grad_scale;
  bool scaled;
};

// One entry of soft_threshold_. `gradient` is null where the value is asked for, not the gradient. `row`: the length of
// a channel to rescale, or 0. `stream` as in masked_combine_.
struct ShrinkTensor {
  void* output;
  const void* weight;
  const void* gradient;
  double threshold;
  int64_t row;
  Dtype dtype;
  bool stream;
};

// What a range holds: groups above the bounds asked for, groups within them, NaN.
struct TopkFound {
  int64_t above, within;
  bool nan;
};

struct TopkRatio {
  int64_t n, m;
};

struct Kernels {
#define KERNEL(name, ...) void (*name)(__VA_ARGS__);
#include "kernels.inc"
#undef KERNEL
};

extern const Kernels kernels_scalar;
#ifdef __x86_64__
extern const Kernels kernels_avx2, kernels_avx512;
#endif

}  // namespace sparsekern
