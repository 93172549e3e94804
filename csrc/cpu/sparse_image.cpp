#include "sparse_image.h"

#include <algorithm>

#include "dispatch.h"

namespace sparsekern {
namespace {

// Channels are neighbours and pixels are not.
bool channels_last(const Strides& s) { return s.channel == 1 && s.column != 1; }

// The kernels for images of a type.
auto pack_kernel(const float*) { return kernels().sparse_pack; }
auto pack_kernel(const BFloat16*) { return kernels().sparse_pack_bf16; }
auto pack_last_kernel(const float*) { return kernels().sparse_pack_last; }
auto pack_last_kernel(const BFloat16*) { return kernels().sparse_pack_last_bf16; }
auto unpack_kernel(const float*) { return kernels().sparse_unpack; }
auto unpack_kernel(const BFloat16*) { return kernels().sparse_unpack_bf16; }
auto unpack_last_kernel(const float*) { return kernels().sparse_unpack_last; }
auto unpack_last_kernel(const BFloat16*) { return kernels().sparse_unpack_last_bf16; }

// One address per number, null where the runs have none.
template <class T>
T* const* addresses(T* data, int64_t pixel, int64_t count, const std::vector<SparseRun>& runs) {
  thread_local std::vector<T*> pixels;
  pixels.assign(count, nullptr);
  for (const SparseRun& run : runs) {
    for (int64_t i = 0; i < run.count; ++i) pixels[run.packed + i] = data + run.image + i * pixel;
  }
  return pixels.data();
}

}  // namespace

template <class T>
void pack_runs(const Image<const T>& input, int64_t step, const std::vector<SparseRun>& runs, int64_t channels,
               float* packed, int64_t width) {
  const Strides& s = input.strides;
  const int64_t pixel = s.column * step;
  if (channels_last(s)) {
    pack_last_kernel(input.data)(addresses(input.data, pixel, width, runs), width, channels, packed, width);
  } else {
    pack_kernel(input.data)(input.data, s.channel, pixel, runs.data(), int64_t(runs.size()), channels, packed, width);
  }
}
template void pack_runs(const Image<const float>&, int64_t, const std::vector<SparseRun>&, int64_t, float*, int64_t);
template void pack_runs(const Image<const BFloat16>&, int64_t, const std::vector<SparseRun>&, int64_t, float*, int64_t);

template <class T>
void unpack_runs(const float* packed, int64_t width, int64_t count, const std::vector<SparseRun>& runs,
                 int64_t channels, int64_t step, const Image<T>& output, bool stream) {
  const Strides& s = output.strides;
  const int64_t pixel = s.column * step;
  if (channels_last(s)) {
    unpack_last_kernel(output.data)(packed, width, addresses(output.data, pixel, count, runs), count, channels);
  } else {
    unpack_kernel(output.data)(packed, width, runs.data(), int64_t(runs.size()), channels, output.data, s.channel,
                               pixel, stream);
  }
}
template void unpack_runs(const float*, int64_t, int64_t, const std::vector<SparseRun>&, int64_t, int64_t,
                          const Image<float>&, bool);
template void unpack_runs(const float*, int64_t, int64_t, const std::vector<SparseRun>&, int64_t, int64_t,
                          const Image<BFloat16>&, bool);

void spread_runs(const float* packed, int64_t width, const std::vector<SparseRun>& runs, int64_t channels, int64_t step,
                 const Image<float>& output, const SpreadShape& shape, bool stream) {
  thread_local Buffer<float> lines;
  const Strides& s = output.strides;
  const int64_t size = shape.rows * shape.columns;
  const auto image_of = [&](const SparseRun& run) { return run.image / std::max(s.batch, size); };
  for (auto first = runs.begin(); first != runs.end();) {
    const int64_t image = image_of(*first);
    auto next = first;
    while (next != runs.end() && image_of(*next) == image) ++next;
    const SparseRun& last = *(next - 1);
    const int64_t pixel = last.image + (last.count - 1) * step - image * s.batch;
    const bool whole = pixel % shape.columns + step >= shape.columns;  // the row has no further pixel
    const int64_t until = whole ? std::min((pixel / shape.columns + shape.down) * shape.columns, size) : pixel + step;
    const int64_t end = image * s.batch + until;
    kernels().sparse_spread(packed, width, &*first, next - first, channels, output.data, s.channel, step, end,
                            lines.get(2 * (end - first->image + 32)), stream);
    first = next;
  }
}

NumberedRows numbered_rows(const std::vector<SparseRun>& runs, int64_t count, const Image<const float>& image,
                           int64_t begin, int64_t channels, int64_t width, Buffer<float>& buffer) {
  const Strides& s = image.strides;
  const float* const first = image.data + begin * s.channel;
  if (s.column == 1 && runs.size() == 1 && runs[0].count == count) return {first + runs[0].image, s.channel};
  float* const packed = buffer.get(channels * width);
  pack_runs(Image<const float>{first, s}, 1, runs, channels, packed, width);
  return {packed, width};
}

}  // namespace sparsekern
