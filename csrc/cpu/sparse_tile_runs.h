// Where the numbers of one tile lie in an image, to pack a few channels of it at a time.
#pragma once
#include <vector>

#include "sparse_tiling.h"

namespace sparsekern {

// How the numbers of a tile lie in the channels of an image, for each plane.
struct TileRuns {
  std::vector<std::vector<SparseRun>> planes;
  int64_t step;

  void of_inputs(const Grid& grid, const Tiling& t, int64_t tile, const Strides& s) {
    planes.resize(grid.planes());
    step = grid.columns.stride;
    for (int64_t plane = 0; plane < grid.planes(); ++plane) {
      grid.inputs(planes[plane], tile / t.per_span, tile % t.per_span * t.tile, t.tile + grid.reach, plane, s);
    }
  }
  void of_outputs(const Grid& grid, const Tiling& t, int64_t tile, const Strides& s) {
    planes.resize(1);
    step = 1;
    grid.outputs(planes[0], tile / t.per_span, tile % t.per_span * t.tile, t.tile, s);
  }
  // All planes of a few channels, which share cache lines of the image; `apart` floats lie between two planes.
  void pack(const Image<const float>& image, int64_t channels, float* packed, int64_t apart, int64_t width) const {
    for (const std::vector<SparseRun>& runs : planes) {
      pack_runs(image, step, runs, channels, packed, width);
      packed += apart;
    }
  }
};

inline Image<const float> from_channel(const Image<const float>& image, int64_t channel) {
  return {image.data + channel * image.strides.channel, image.strides};
}

}  // namespace sparsekern
