// Geometry of the passes of a convolution, on the host: which input pixel a tap reads, how tiles lie in shared memory.
#pragma once
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "kernels.h"

namespace sparsekern::cuda {

// One axis of a pass: output position o reads input position o * stride + positions[tap] - before; -1: not in the pass.
struct AxisPass {
  int64_t size, stride, before;
  std::vector<int64_t> positions;
};

inline AxisPass forward_axis(int64_t output, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  AxisPass pass{output, stride, padding, {}};
  for (int64_t k = 0; k < kernel; ++k) pass.positions.push_back(k * dilation);
  return pass;
}

// The input gradient is, for every `stride`-th input position from `first` on, a pass over the gradients at stride 1.
struct GradientPass {
  int64_t first;
  AxisPass axis;
};

inline std::vector<GradientPass> gradient_axis(int64_t input, int64_t kernel, int64_t stride, int64_t padding,
                                               int64_t dilation) {
  std::vector<GradientPass> found;
  const int64_t most = (kernel - 1) * dilation / stride;
  for (int64_t phase = 0; phase < stride; ++phase) {
    const int64_t entry = std::max<int64_t>(0, (padding - phase + stride - 1) / stride);
    const int64_t first = entry * stride + phase - padding;
    AxisPass axis{first < input ? (input - 1 - first) / stride + 1 : 0, 1, most - entry, {}};
    bool any = false;
    for (int64_t k = 0; k < kernel; ++k) {
      const bool here = k * dilation % stride == phase;
      axis.positions.push_back(here ? most - k * dilation / stride : -1);
      any = any || here;
    }
    if (axis.size > 0 && any) found.push_back({first, axis});
  }
  return found;
}

// Tiles of the shape that wastes least, and as many channels at a time as `shared` bytes hold; none if too few.
inline std::optional<SparseGrid> make_grid(const AxisPass& v, const AxisPass& h, int64_t channels, uint32_t shared) {
  const int64_t taps = static_cast<int64_t>(v.positions.size() * h.positions.size());
  if (taps > kSparseTaps) return std::nullopt;
  SparseGrid g{};
  g.rows = static_cast<int32_t>(v.size);
  g.columns = static_cast<int32_t>(h.size);
  g.stride_y = static_cast<int32_t>(v.stride);
  g.stride_x = static_cast<int32_t>(h.stride);
  g.top = static_cast<int32_t>(v.before);
  g.left = static_cast<int32_t>(h.before);
  int64_t fewest = INT64_MAX;
  for (int32_t across : {8, 16, 4, 32, 2, 1}) {
    const int32_t down = kSparsePixels / across;
    const int64_t count = ((v.size + down - 1) / down) * ((h.size + across - 1) / across);
    if (count >= fewest) continue;
    fewest = count;
    g.tile_rows = down;
    g.tile_columns = across;
  }
  const auto reach = [](const AxisPass& a) { return *std::max_element(a.positions.begin(), a.positions.end()); };
  const int64_t halo_rows = (g.tile_rows - 1) * v.stride + reach(v) + 1;
  const int64_t halo_columns = (g.tile_columns - 1) * h.stride + reach(h) + 1;
  const int64_t split = (halo_columns + h.stride - 1) / h.stride, pitch = split * h.stride;
  const int64_t step = halo_rows * pitch | 1;  // odd: neighbouring channels lie in different banks
  int64_t slab = 32;
  while (slab > 4 && (slab / 2 >= channels || slab * step * 16 > shared)) slab /= 2;
  if (slab * step * 16 > shared) return std::nullopt;
  g.halo_rows = static_cast<int32_t>(halo_rows);
  g.halo_columns = static_cast<int32_t>(halo_columns);
  g.split_columns = static_cast<int32_t>(split);
  g.pitch = static_cast<int32_t>(pitch);
  g.channel_step = static_cast<int32_t>(step);
  g.slab = static_cast<int32_t>(slab);
  for (int64_t y : v.positions) {
    for (int64_t x : h.positions) {
      const bool here = y >= 0 && x >= 0;
      g.tap_offset[g.taps++] = here ? static_cast<int32_t>(y * pitch + x % h.stride * split + x / h.stride) : -1;
    }
  }
  return g;
}

}  // namespace sparsekern::cuda
