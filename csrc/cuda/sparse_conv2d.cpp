// Host side of the sparse layers on CUDA: from tensors to grids, a weight and two images. Float32, or 16-bit numbers in
// the product with 4x1 blocks; one group, images whose channels are neighbours; sparsekern/ops/sparse_cuda.py brings
// operands into that form. Functions return whether the kernels take the geometry, before anything is launched.
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <vector>

#include "../dtype_of.h"
#include "host.h"
#include "sparse_grid.h"

namespace sparsekern::cuda {
namespace {

using ScalarType = torch::headeronly::ScalarType;
using Ints = std::vector<int64_t>;

SparseImage image_of(const Tensor& t, ScalarType type = ScalarType::Float) {
  const int64_t n = t.size(0), c = t.size(1), h = t.size(2), w = t.size(3);
  const int64_t expected[] = {h * w * c, 1, w * c, c};
  for (int64_t d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(t.size(d) == 1 || t.stride(d) == expected[d], "sparsekern: an image must be dense channels_last");
  }
  STD_TORCH_CHECK(t.scalar_type() == type && on_device(t), "sparsekern: an image must be of the kernel's dtype");
  STD_TORCH_CHECK(n < INT32_MAX && h * w < INT32_MAX && c < INT32_MAX, "sparsekern: an image is too large");
  return {const_cast<void*>(t.const_data_ptr()),
          expected[0],
          expected[2],
          c,
          int32_t(n),
          int32_t(h),
          int32_t(w),
          int32_t(c),
          n * h * w};
}

// The pixels of all images as those of a few long ones: nothing is left over at the ends of images.
SparseImage as_long_images(const SparseImage& m, int32_t count = kSparseImages) {
  const int64_t length = (m.limit + count - 1) / count;
  return {m.data, length * m.column_stride, 0, m.column_stride, count, 1, int32_t(length), m.channels, m.limit};
}

// A weight (out, in, kh, kw) or its packed blocks; `transposed` structures have rows of input channels.
struct Layer {
  SparseWeight weight{};
  Tensor values, offsets;
  SparsePacked packed{};

  Layer(const std::optional<Tensor>& data, const std::vector<Tensor>& structure, const std::string& layout,
        const Ints& shape, const Ints& strides, bool transposed) {
    STD_TORCH_CHECK(structure.size() >= 2 && shape.size() == 4 && strides.size() == 4, "sparsekern: bad structure");
    const int32_t tall = layout == "4x1" ? 4 : 1, wide = layout == "1x4" ? 4 : 1;
    SparseWeight& w = weight;
    w.data = data ? data->const_data_ptr() : nullptr;
    w.packed = strides[0] == 0;
    w.row_step = tall * strides[0];
    w.channel_step = wide * strides[1];
    w.rows = static_cast<int32_t>(shape[0] / tall);
    w.channels = static_cast<int32_t>(shape[1]);
    w.tall = tall;
    w.wide = wide;
    if (transposed) {
      std::swap(w.row_step, w.channel_step);
      std::swap(w.tall, w.wide);
      w.rows = static_cast<int32_t>(shape[1] / wide);
      w.channels = static_cast<int32_t>(shape[0]);
    }
    w.tap_row_step = strides[2];
    w.tap_column_step = strides[3];
    w.inner_step = w.packed ? 1 : strides[tall == 4 ? 0 : 1];
    w.kernel_columns = static_cast<int32_t>(shape[3]);
    w.blocks = static_cast<int32_t>(structure[1].numel());
    for (const Tensor& t : structure) {
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous() && on_device(t),
                      "sparsekern: structure must be contiguous int32 on the device");
    }
    STD_TORCH_CHECK(structure[0].numel() == w.rows + 1, "sparsekern: structure must have a pointer per row");
    w.pointers = structure[0].const_data_ptr<int32_t>();
    w.indices = structure[1].const_data_ptr<int32_t>();
    w.source = structure.size() > 2 ? structure[2].const_data_ptr<int32_t>() : nullptr;
  }

  void pack(const SparseGrid& grid, const Tensor& like, bool targets, void* stream) {
    packed.slabs = (weight.channels + grid.slab - 1) / grid.slab;
    const int64_t blocks = weight.blocks, bounds = weight.rows * int64_t{packed.slabs + 1};
    values = torch::stable::new_empty(like, {blocks * weight.tall * weight.wide}, ScalarType::Float);
    offsets = torch::stable::new_empty(like, {(targets ? 2 : 1) * blocks + bounds}, ScalarType::Int);
    if (targets) torch::stable::fill_(offsets, -1);  // a block that no row names has no target
    packed.values = values.mutable_data_ptr<float>();
    packed.offsets = offsets.mutable_data_ptr<int32_t>();
    packed.bounds = packed.offsets + blocks;
    packed.targets = targets ? packed.bounds + bounds : nullptr;
    check_launch("sparse_conv2d", sparse_pack(weight, grid, packed, stream));
  }
};

// `geometry` is stride, padding, dilation, each vertical and horizontal.
bool is_pointwise(const Ints& shape, const Ints& geometry) {
  return shape[2] * shape[3] == 1 && geometry[0] == 1 && geometry[1] == 1 && geometry[2] == 0 && geometry[3] == 0;
}

void check_geometry(const Ints& shape, const Ints& geometry, const SparseImage& input, const SparseImage& output) {
  STD_TORCH_CHECK(shape.size() == 4 && geometry.size() == 6, "sparsekern: shape has 4 numbers and geometry 6");
  const int64_t sizes[] = {input.height, input.width}, results[] = {output.height, output.width};
  for (int64_t i = 0; i < 2; ++i) {
    const int64_t stride = geometry[i], padding = geometry[2 + i], dilation = geometry[4 + i], kernel = shape[2 + i];
    STD_TORCH_CHECK(stride > 0 && padding >= 0 && dilation > 0 && kernel > 0 &&
                        results[i] == (sizes[i] + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1,
                    "sparsekern: stride, padding or dilation do not fit the images");
  }
  STD_TORCH_CHECK(input.images == output.images && input.channels == shape[1] && output.channels == shape[0],
                  "sparsekern: images and channels do not fit the weight");
}

std::optional<SparseGrid> forward_grid(const Ints& shape, const Ints& g, SparseImage& input, SparseImage& output,
                                       uint32_t shared, int32_t images = kSparseImages) {
  check_geometry(shape, g, input, output);
  if (is_pointwise(shape, g)) {
    input = as_long_images(input, images);
    output = as_long_images(output, images);
  }
  return make_grid(forward_axis(output.height, shape[2], g[0], g[2], g[4]),
                   forward_axis(output.width, shape[3], g[1], g[3], g[5]), input.channels, shared);
}

// A weight for tensor cores, packed. Of the memory, up to twice that of the dense weight, only what is used is touched.
struct Bands {
  SparseBands bands{};
  Tensor values, blocks, elements, offsets, counts;

  Bands(const SparseWeight& weight, const SparseGrid& grid, const Tensor& like, bool gradient, void* stream) {
    bands.slabs = (weight.channels + grid.slab - 1) / grid.slab;
    bands.most = (grid.slab * grid.taps + 15) / 16;
    const int64_t parts = (weight.rows + 3) / 4 * int64_t{bands.slabs}, columns = parts * bands.most * 16;
    offsets = torch::stable::new_empty(like, {columns}, ScalarType::Short);
    counts = torch::stable::new_empty(like, {parts}, ScalarType::Int);
    bands.offsets = static_cast<uint16_t*>(offsets.mutable_data_ptr());
    bands.steps = counts.mutable_data_ptr<int32_t>();
    if (gradient) {
      blocks = torch::stable::new_empty(like, {columns * 4}, ScalarType::Int);
      elements = torch::stable::new_empty(like, {columns}, ScalarType::Long);
      bands.blocks = blocks.mutable_data_ptr<int32_t>();
      bands.elements = elements.mutable_data_ptr<int64_t>();
    } else {
      values = torch::stable::new_empty(like, {columns * 8}, ScalarType::Int);
      bands.values = values.mutable_data_ptr();
    }
    check_launch("sparse_conv2d", sparse_pack_halves(weight, grid, bands, stream));
  }
};

// The product on tensor cores.
bool product_halves(const Tensor& result, const Tensor& input, const Tensor& weight,
                    const std::vector<Tensor>& structure, const std::string& layout, const std::optional<Tensor>& bias,
                    const Ints& shape, const Ints& strides, const Ints& geometry) {
  const ScalarType type = result.scalar_type();
  SparseImage in = image_of(input, type), out = image_of(result, type);
  STD_TORCH_CHECK(layout == "4x1" && shape[0] % 4 == 0 && weight.scalar_type() == type &&
                      (!bias || (bias->scalar_type() == type && bias->is_contiguous() && on_device(*bias) &&
                                 bias->numel() == shape[0])) &&
                      reinterpret_cast<uintptr_t>(out.data) % 4 == 0,
                  "sparsekern: 16-bit operands must be of one dtype, of 4x1 blocks, and the result aligned");
  const std::optional<SparseGrid> grid = forward_grid(shape, geometry, in, out, kSparseShared, kSparseHalfImages);
  if (!grid) return false;
  const OnDeviceOf device(result);
  const Layer layer(weight, structure, layout, shape, strides, false);
  const Bands packed(layer.weight, *grid, result, false, device.stream);
  check_launch("sparse_conv2d",
               sparse_product_halves(dtype_of("sparse_conv2d", result), layer.weight, *grid, packed.bands, in, out,
                                     bias ? bias->const_data_ptr() : nullptr, device.stream));
  return true;
}

bool sparse_product_cuda(Tensor result, Tensor input, Tensor weight, std::vector<Tensor> structure, std::string layout,
                         std::optional<Tensor> bias, Ints shape, Ints strides, Ints geometry) {
  if (const ScalarType type = result.scalar_type(); type == ScalarType::Half || type == ScalarType::BFloat16) {
    return product_halves(result, input, weight, structure, layout, bias, shape, strides, geometry);
  }
  SparseImage in = image_of(input), out = image_of(result);
  const std::optional<SparseGrid> grid = forward_grid(shape, geometry, in, out, kSparseShared);
  if (!grid) return false;
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == ScalarType::Float && bias->is_contiguous() && on_device(*bias) &&
                            bias->numel() == shape[0]),
                  "sparsekern: bias must be contiguous float32, one per output");
  const OnDeviceOf device(result);
  Layer layer(weight, structure, layout, shape, strides, false);
  layer.pack(*grid, result, false, device.stream);
  check_launch("sparse_conv2d", sparse_product(layer.weight, *grid, layer.packed, in, out, {0, 0, 1, 1},
                                               bias ? bias->const_data_ptr<float>() : nullptr, device.stream));
  return true;
}

// `structure` is that of the transposed weight. The caller has zeroed `result` if a stride leaves pixels out.
bool sparse_input_gradient_cuda(Tensor result, Tensor grad, Tensor weight, std::vector<Tensor> structure,
                                std::string layout, Ints shape, Ints strides, Ints geometry) {
  SparseImage to = image_of(result), from = image_of(grad);
  check_geometry(shape, geometry, to, from);
  if (is_pointwise(shape, geometry)) {
    to = as_long_images(to);
    from = as_long_images(from);
  }
  const auto down = gradient_axis(to.height, shape[2], geometry[0], geometry[2], geometry[4]);
  const auto across = gradient_axis(to.width, shape[3], geometry[1], geometry[3], geometry[5]);
  std::vector<SparseGrid> grids;
  for (const GradientPass& v : down) {
    for (const GradientPass& h : across) {
      const std::optional<SparseGrid> grid = make_grid(v.axis, h.axis, from.channels, kSparseShared);
      if (!grid) return false;
      grids.push_back(*grid);
    }
  }
  const OnDeviceOf device(result);
  Layer layer(weight, structure, layout, shape, strides, true);
  size_t next = 0;
  for (const GradientPass& v : down) {
    for (const GradientPass& h : across) {
      const SparseGrid& grid = grids[next++];
      layer.pack(grid, result, false, device.stream);
      const SparsePlace place{int32_t(v.first), int32_t(h.first), int32_t(geometry[0]), int32_t(geometry[1])};
      check_launch("sparse_conv2d_backward",
                   sparse_product(layer.weight, grid, layer.packed, from, to, place, nullptr, device.stream));
    }
  }
  return true;
}

// Into how many parts the tiles of a weight's gradient are split: four blocks of threads, `others` for each part, for
// each of the 132 multiprocessors of the largest GPU at hand when this was written.
int32_t splits_of(const SparseGrid& grid, int64_t images, int64_t images_of_tile, int64_t others) {
  const int64_t tiles = ((grid.rows + grid.tile_rows - 1) / grid.tile_rows) *
                        ((grid.columns + grid.tile_columns - 1) / grid.tile_columns) *
                        ((images + images_of_tile - 1) / images_of_tile);
  return static_cast<int32_t>(std::clamp<int64_t>(528 / others, 1, std::min<int64_t>(tiles, 65535)));
}

// The gradient of the weight on tensor cores.
bool weight_gradient_halves(Tensor& result, const Tensor& grad, const Tensor& input,
                            const std::vector<Tensor>& structure, const std::string& layout, const Ints& shape,
                            const Ints& strides, const Ints& geometry) {
  const ScalarType type = result.scalar_type();
  SparseImage in = image_of(input, type), out = image_of(grad, type);
  STD_TORCH_CHECK(layout == "4x1" && shape[0] % 4 == 0, "sparsekern: 16-bit operands must be of 4x1 blocks");
  const std::optional<SparseGrid> grid =
      forward_grid(shape, geometry, in, out, kSparseMoreShared - kGradientReserved, kSparseHalfImages);
  if (!grid) return false;
  const OnDeviceOf device(result);
  const Layer layer(std::nullopt, structure, layout, shape, strides, false);
  if (layer.weight.blocks == 0) return true;
  const Bands packed(layer.weight, *grid, result, true, device.stream);
  const int32_t splits = splits_of(*grid, out.images, kSparseHalfImages, packed.bands.slabs * ((shape[0] + 63) / 64));
  Tensor partial = torch::stable::new_empty(result, {splits * int64_t{layer.weight.blocks} * 4}, ScalarType::Float);
  check_launch("sparse_conv2d_backward",
               sparse_weight_gradient_halves(dtype_of("sparse_conv2d_backward", result), layer.weight, *grid,
                                             packed.bands, in, out, partial.mutable_data_ptr<float>(), splits,
                                             result.mutable_data_ptr(), device.stream));
  return true;
}

// The caller has zeroed `result`, of which `strides` are.
bool sparse_weight_gradient_cuda(Tensor result, Tensor grad, Tensor input, std::vector<Tensor> structure,
                                 std::string layout, Ints shape, Ints strides, Ints geometry) {
  if (const ScalarType type = result.scalar_type(); type == ScalarType::Half || type == ScalarType::BFloat16) {
    return weight_gradient_halves(result, grad, input, structure, layout, shape, strides, geometry);
  }
  SparseImage in = image_of(input), out = image_of(grad);
  constexpr uint32_t kReserved = 17408;  // the gradients of a tile, and a little that is static
  const std::optional<SparseGrid> grid = forward_grid(shape, geometry, in, out, kSparseShared - kReserved);
  if (!grid) return false;
  const OnDeviceOf device(result);
  Layer layer(std::nullopt, structure, layout, shape, strides, false);
  if (layer.weight.blocks == 0) return true;
  layer.pack(*grid, result, true, device.stream);
  const int32_t splits = splits_of(*grid, out.images, kSparseImages, layer.packed.slabs * ((shape[0] + 31) / 32));
  const int64_t size = layer.weight.blocks * int64_t{layer.weight.tall} * layer.weight.wide;
  Tensor partial = torch::stable::new_empty(result, {splits * size}, ScalarType::Float);
  check_launch("sparse_conv2d_backward",
               sparse_weight_gradient(layer.weight, *grid, layer.packed, in, out, partial.mutable_data_ptr<float>(),
                                      splits, result.mutable_data_ptr<float>(), device.stream));
  return true;
}

}  // namespace
}  // namespace sparsekern::cuda

SPARSEKERN_CUDA_LIBRARY(m) {
  m.impl("_sparse_product_cuda", TORCH_BOX(&sparsekern::cuda::sparse_product_cuda));
  m.impl("_sparse_input_gradient_cuda", TORCH_BOX(&sparsekern::cuda::sparse_input_gradient_cuda));
  m.impl("_sparse_weight_gradient_cuda", TORCH_BOX(&sparsekern::cuda::sparse_weight_gradient_cuda));
}
