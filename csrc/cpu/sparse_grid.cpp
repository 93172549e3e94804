#include "sparse_grid.h"

#include <algorithm>
#include <utility>

namespace sparsekern {
namespace {

// The parts of rows [begin, end) x columns [left, right) of every image that lie in numbers [from, from + count).
template <class F>
void each_row(const Grid& g, int64_t from, int64_t count, const Axis::Plane& rows, const Axis::Plane& columns,
              const F& body) {
  if (columns.begin >= columns.end) return;
  const int64_t until = from + count;
  for (int64_t image = std::max<int64_t>(from / g.image_pitch, 0); image < g.span_images; ++image) {
    const int64_t start = image * g.image_pitch;
    const int64_t first = std::max(rows.begin, (from - start) / g.pitch);
    if (start + first * g.pitch + columns.begin >= until && first == rows.begin) return;
    for (int64_t row = first; row < rows.end; ++row) {
      const int64_t at = start + row * g.pitch;
      const int64_t low = std::max(from, at + columns.begin), high = std::min(until, at + columns.end);
      if (at + columns.begin >= until) break;
      if (low < high) body(image, row, low - at, low - from, high - low);
    }
  }
}

// Neighbouring runs that continue each other in image and tile are one.
void append(std::vector<SparseRun>& runs, SparseRun run, int64_t step) {
  if (!runs.empty()) {
    SparseRun& last = runs.back();
    if (last.packed + last.count == run.packed && last.image + last.count * step == run.image) {
      last.count += run.count;
      return;
    }
  }
  runs.push_back(run);
}

}  // namespace

Axis::Axis(int64_t size, int64_t output, int64_t stride, int64_t padding, const std::vector<int64_t>& positions)
    : stride(stride), padding(padding), output(output), pitch(output) {
  for (int64_t position : positions) {
    const int64_t phase = position % stride;
    reach = std::max(reach, position / stride);
    const auto found = std::find_if(planes.begin(), planes.end(), [&](const Plane& p) { return p.phase == phase; });
    taps.push_back({found - planes.begin(), position / stride});
    if (found == planes.end()) planes.push_back({phase, 0, 0});
  }
  const int64_t entries = output + reach;
  int64_t least = entries;
  for (Plane& p : planes) {
    p.begin = std::clamp(ceil_divide(padding - p.phase, stride), int64_t{0}, entries);
    p.end = std::clamp(ceil_divide(size + padding - p.phase, stride), p.begin, entries);
    least = std::min(least, p.begin);
    pitch = std::max(pitch, p.end);
  }
  // What reaches past a row falls on the zeros that begin the next.
  pitch = std::max(pitch, entries - least);
}

Grid::Grid(Axis r, Axis c, int64_t images, int64_t lanes) : rows(std::move(r)), columns(std::move(c)), images(images) {
  pitch = columns.pitch;
  image_pitch = rows.pitch * pitch;
  reach = rows.reach * pitch + columns.reach;
  length = (rows.output - 1) * pitch + columns.output;
  const int64_t alone = (length + lanes - 1) / lanes * lanes;
  // One span wastes no lanes at the end of an image, but costs runs that end in the middle of a tile.
  const bool together = images > 1 && image_pitch * 12 < alone * 11;
  spans = together ? 1 : images;
  span_images = together ? images : 1;
  length += (span_images - 1) * image_pitch;
}

void Grid::inputs(std::vector<SparseRun>& runs, int64_t span, int64_t from, int64_t count, int64_t plane,
                  const Strides& strides) const {
  const int64_t across = int64_t(columns.planes.size());
  const Axis::Plane &p = rows.planes[plane / across], &q = columns.planes[plane % across];
  runs.clear();
  each_row(*this, from, count, p, q, [&](int64_t image, int64_t row, int64_t column, int64_t packed, int64_t n) {
    const int64_t at = (span * span_images + image) * strides.batch + rows.position(p, row) * strides.row +
                       columns.position(q, column) * strides.column;
    append(runs, {at, packed, n}, strides.column * columns.stride);
  });
}

void Grid::outputs(std::vector<SparseRun>& runs, int64_t span, int64_t from, int64_t count,
                   const Strides& strides) const {
  runs.clear();
  each_row(*this, from, count, {0, 0, rows.output}, {0, 0, columns.output},
           [&](int64_t image, int64_t row, int64_t column, int64_t packed, int64_t n) {
             const int64_t at = (span * span_images + image) * strides.batch + row * strides.row;
             append(runs, {at + column * strides.column, packed, n}, strides.column);
           });
}

}  // namespace sparsekern
