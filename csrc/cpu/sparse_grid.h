// The geometry of a convolution as flat rows of pixels.
//
// Padded and split by phase of the stride, the images of one channel lie one after another: output pixel (image, y, x)
// is number image * image_pitch + y * pitch + x, and the activation that a tap of the kernel gives it is the same
// number plus the tap's shift, in the tap's plane. So a tile is a range of numbers, whatever rows and images it spans;
// a few numbers belong to no output pixel. Rows share the zeros between them, and so do images.
#pragma once
#include <cstdint>
#include <vector>

#include "simd/kernels.h"

namespace sparsekern {

// Rounded up, of negative numbers too.
inline int64_t ceil_divide(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

// A dense image of `batch` x channels x height x width elements; strides are in elements.
struct Strides {
  int64_t batch, channel, row, column;
};

// One spatial axis: output o reads position o * stride + taps[i] - padding, and positions outside the axis are zeros.
struct Axis {
  struct Plane {
    int64_t phase, begin, end;  // entries [begin, end) are inside the axis
  };
  struct Tap {
    int64_t plane, shift;
  };
  int64_t stride, padding, output, reach = 0, pitch;
  std::vector<Plane> planes;
  std::vector<Tap> taps;

  Axis(int64_t size, int64_t output, int64_t stride, int64_t padding, const std::vector<int64_t>& positions);
  int64_t position(const Plane& plane, int64_t entry) const { return entry * stride + plane.phase - padding; }
};

struct Grid {
  Axis rows, columns;
  int64_t images, pitch, image_pitch, reach;
  // Either every image is a span of its own, or all images are one.
  int64_t spans, span_images, length;

  Grid(Axis rows, Axis columns, int64_t images, int64_t lanes);
  int64_t planes() const { return int64_t(rows.planes.size() * columns.planes.size()); }

  // The activations of numbers [from, from + count) in one plane, 0 where a number has none.
  void inputs(std::vector<SparseRun>& runs, int64_t span, int64_t from, int64_t count, int64_t plane,
              const Strides& strides) const;
  // The output pixels among numbers [from, from + count).
  void outputs(std::vector<SparseRun>& runs, int64_t span, int64_t from, int64_t count, const Strides& strides) const;
};

}  // namespace sparsekern
