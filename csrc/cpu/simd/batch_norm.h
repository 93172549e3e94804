// Batch normalisation in training over a range of channels. The contract is sparsekern/ops/batch_norm.py.
//
// A block of channels that stays in the second-level cache, with all of its images, is taken through all passes, so
// only the first of them waits for memory. Channels of small images are taken together: what lies together is read
// together. No result depends on where blocks begin.
#pragma once
#include "kernels.h"
#include "vec_scalar.h"

namespace {

using sparsekern::BatchNorm;
using sparsekern::BatchNormGradient;
using sparsekern::BatchNormShape;

using NormVec = WideOf<float>::type;

constexpr int64_t kNormChannels = 64;
// Numbers of one tensor in a block: 256 KiB, of up to three tensors.
constexpr int64_t kNormNumbers = int64_t{1} << 16;
// Longest sum in one number, times the four that are summed side by side: rounding does not grow with the image.
constexpr int64_t kNormStretch = 256;

inline NormVec first_lanes(NormVec v, int64_t n) { return n < NormVec::kLanes ? v.keep((uint32_t{1} << n) - 1) : v; }

// body(first channel, one past the last) for each block.
template <class F>
inline void norm_blocks(const BatchNormShape& s, int64_t begin, int64_t end, const F& body) {
  const int64_t numbers = s.images * s.pixels, fit = numbers < kNormNumbers ? kNormNumbers / numbers : 1;
  const int64_t step = fit < kNormChannels ? fit : kNormChannels;
  for (int64_t c = begin; c < end; c += step) body(c, c + step < end ? c + step : end);
}

// body(channel of the block, its first pixel) for each image and channel of [begin, end), in the order of memory.
template <class F>
inline void norm_images(const BatchNormShape& s, int64_t begin, int64_t end, const F& body) {
  for (int64_t n = 0; n < s.images; ++n) {
    for (int64_t c = begin; c < end; ++c) body(c - begin, (n * s.channels + c) * s.pixels);
  }
}

// Adds the terms of `count` numbers from `at` on to `total`. term(i, n, sums) adds those of n numbers from i on.
template <int kSums, class F>
inline __attribute__((always_inline)) void norm_add(int64_t at, int64_t count, NormVec (&total)[kSums], const F& term) {
  constexpr int64_t kLanes = NormVec::kLanes, kSide = 4;
  const int64_t end = at + count;
  while (at < end) {
    const int64_t left = end - at, most = kNormStretch * kSide * kLanes, stop = left < most ? end : at + most;
    NormVec part[kSide][kSums];
    for (auto& sums : part) {
      for (NormVec& sum : sums) sum = NormVec::splat(0.0f);
    }
    for (; at + kSide * kLanes <= stop; at += kSide * kLanes) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < kSide; ++j) term(at + j * kLanes, kLanes, part[j]);
    }
    for (; at < stop; at += kLanes) term(at, stop - at < kLanes ? stop - at : kLanes, part[0]);
    for (int k = 0; k < kSums; ++k) total[k] = total[k] + ((part[0][k] + part[1][k]) + (part[2][k] + part[3][k]));
  }
}

// write(i, n) for `count` numbers from `at` on.
template <class F>
inline __attribute__((always_inline)) void norm_write(int64_t at, int64_t count, const F& write) {
  constexpr int64_t kLanes = NormVec::kLanes;
  const int64_t end = at + count;
  for (; at + kLanes <= end; at += kLanes) write(at, kLanes);
  if (at < end) write(at, end - at);
}

inline NormVec norm_load(const float* p, int64_t n) {
  return n == NormVec::kLanes ? NormVec::load(p) : NormVec::load(p, n);
}
inline void norm_store(NormVec v, float* p, int64_t n, bool stream) {
  if (stream) {
    v.stream(p);
  } else if (n == NormVec::kLanes) {
    v.store(p);
  } else {
    v.store(p, n);
  }
}

// Whether results go past the caches: whole vectors, of a tensor that is several times the second-level cache. Their
// lines are not read first: measured (Xeon with AVX-512, two threads) 1.2x faster in a training step of ResNet-50,
// forward and backward; at 4 MiB, backward, 1.3x slower.
inline bool norm_streams(const BatchNormShape& s, const float* out) {
  constexpr int64_t kLarge = int64_t{1} << 21;
  const bool aligned = s.pixels % NormVec::kLanes == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(NormVec) == 0;
  return aligned && s.images * s.channels * s.pixels >= kLarge;
}

inline double norm_sum(NormVec v) {
  float lanes[NormVec::kLanes];
  v.store(lanes);
  double sum = 0;
  for (const float lane : lanes) sum += lane;
  return sum;
}

inline bool norm_finite(float x) { return (as_bits(x) & 0x7f800000u) != 0x7f800000u; }

// Mean, its rounding to float32 left over in `rest`, and variance of each channel of [begin, end).
inline void norm_statistics(const BatchNorm& b, int64_t begin, int64_t end, double* rest) {
  const BatchNormShape& s = b.shape;
  const double count = static_cast<double>(s.images * s.pixels);
  float from[kNormChannels];
  NormVec sums[kNormChannels][1];
  // A mean is found as the mean distance from a number of the channel, then the variance from distances to the mean:
  // neither loses digits where the mean is large.
  for (int64_t c = 0; c < end - begin; ++c) {
    const float first = b.input[(begin + c) * s.pixels];
    from[c] = norm_finite(first) ? first : 0.0f;
  }
  const auto distances = [&](const auto& term) {
    for (int64_t c = 0; c < end - begin; ++c) sums[c][0] = NormVec::splat(0.0f);
    norm_images(s, begin, end, [&](int64_t c, int64_t at) {
      const NormVec minus = NormVec::splat(-from[c]);
      norm_add(at, s.pixels, sums[c], [&](int64_t i, int64_t n, NormVec(&sum)[1]) {
        sum[0] = term(first_lanes(norm_load(b.input + i, n) + minus, n), sum[0]);
      });
    });
  };
  distances([](NormVec x, NormVec sum) { return x + sum; });
  for (int64_t c = 0; c < end - begin; ++c) {
    const double mean = from[c] + norm_sum(sums[c][0]) / count;
    from[c] = b.mean[begin + c] = static_cast<float>(mean);
    rest[c] = mean - from[c];
  }
  distances([](NormVec x, NormVec sum) { return madd(x, x, sum); });
  for (int64_t c = 0; c < end - begin; ++c) {
    const double variance = norm_sum(sums[c][0]) / count - rest[c] * rest[c];
    b.variance[begin + c] = variance < 0 ? 0.0f : static_cast<float>(variance);
  }
}

template <bool kResidual, bool kRelu>
inline void norm_outputs(const BatchNorm& b, int64_t begin, int64_t end, const double* rest) {
  const BatchNormShape& s = b.shape;
  float scales[kNormChannels], shifts[kNormChannels];
  for (int64_t c = 0; c < end - begin; ++c) {
    const int64_t channel = begin + c;
    const double scale = (b.weight ? b.weight[channel] : 1.0) / square_root(b.variance[channel] + b.eps);
    scales[c] = static_cast<float>(scale);
    shifts[c] = static_cast<float>((b.bias ? b.bias[channel] : 0.0) - rest[c] * scale);
  }
  const bool stream = norm_streams(s, b.output);
  norm_images(s, begin, end, [&](int64_t c, int64_t at) {
    const NormVec minus = NormVec::splat(-b.mean[begin + c]);
    const NormVec scale = NormVec::splat(scales[c]), shift = NormVec::splat(shifts[c]);
    norm_write(at, s.pixels, [&](int64_t i, int64_t n) {
      NormVec y = madd(norm_load(b.input + i, n) + minus, scale, shift);
      if (kResidual) y = y + norm_load(b.residual + i, n);
      if (kRelu) y = larger(NormVec::splat(0.0f), y);
      norm_store(y, b.output + i, n, stream);
    });
  });
}

void batch_norm(const BatchNorm& b, int64_t begin, int64_t end) {
  double rest[kNormChannels];
  norm_blocks(b.shape, begin, end, [&](int64_t first, int64_t last) {
    norm_statistics(b, first, last, rest);
    if (b.residual) {
      b.relu ? norm_outputs<true, true>(b, first, last, rest) : norm_outputs<true, false>(b, first, last, rest);
    } else {
      b.relu ? norm_outputs<false, true>(b, first, last, rest) : norm_outputs<false, false>(b, first, last, rest);
    }
  });
  NormVec::fence();
}

// The gradient behind the ReLU, which is that of the residual.
template <bool kRelu>
inline __attribute__((always_inline)) NormVec norm_gradient(const BatchNormGradient& b, int64_t i, int64_t n) {
  const NormVec g = norm_load(b.grad + i, n);
  return kRelu ? g.unless_at_most_zero(norm_load(b.output + i, n)) : g;
}

template <bool kRelu, bool kStore>
inline void norm_gradients(const BatchNormGradient& b, int64_t begin, int64_t end) {
  const BatchNormShape& s = b.shape;
  const double count = static_cast<double>(s.images * s.pixels);
  // Of the gradient, and of the gradient times the distance from the mean.
  NormVec sums[kNormChannels][2];
  for (int64_t c = 0; c < end - begin; ++c) sums[c][0] = sums[c][1] = NormVec::splat(0.0f);
  norm_images(s, begin, end, [&](int64_t c, int64_t at) {
    const NormVec minus = NormVec::splat(-b.mean[begin + c]);
    norm_add(at, s.pixels, sums[c], [&](int64_t i, int64_t n, NormVec(&sum)[2]) {
      const NormVec g = norm_gradient<kRelu>(b, i, n);
      sum[0] = sum[0] + g;
      sum[1] = madd(g, first_lanes(norm_load(b.input + i, n) + minus, n), sum[1]);
    });
  });
  float scales[kNormChannels], slopes[kNormChannels], shifts[kNormChannels];
  for (int64_t c = 0; c < end - begin; ++c) {
    const int64_t channel = begin + c;
    const double of_bias = norm_sum(sums[c][0]), distance = norm_sum(sums[c][1]);
    const double inverse = 1 / square_root(b.variance[channel] + b.eps);
    const double scale = (b.weight ? b.weight[channel] : 1.0) * inverse;
    if (b.grad_weight) b.grad_weight[channel] = static_cast<float>(distance * inverse);
    if (b.grad_bias) b.grad_bias[channel] = static_cast<float>(of_bias);
    scales[c] = static_cast<float>(scale);
    slopes[c] = static_cast<float>(-scale * inverse * inverse * distance / count);
    shifts[c] = static_cast<float>(-scale * of_bias / count);
  }
  if (!b.grad_input && !kStore) return;
  const bool stream = norm_streams(s, b.grad_input) && (!kStore || norm_streams(s, b.grad_residual));
  norm_images(s, begin, end, [&](int64_t c, int64_t at) {
    const NormVec minus = NormVec::splat(-b.mean[begin + c]), scale = NormVec::splat(scales[c]);
    const NormVec slope = NormVec::splat(slopes[c]), shift = NormVec::splat(shifts[c]);
    norm_write(at, s.pixels, [&](int64_t i, int64_t n) {
      const NormVec g = norm_gradient<kRelu>(b, i, n), x = norm_load(b.input + i, n) + minus;
      if (kStore) norm_store(g, b.grad_residual + i, n, stream);
      if (b.grad_input) norm_store(madd(g, scale, madd(x, slope, shift)), b.grad_input + i, n, stream);
    });
  });
}

void batch_norm_backward(const BatchNormGradient& b, int64_t begin, int64_t end) {
  norm_blocks(b.shape, begin, end, [&](int64_t first, int64_t last) {
    if (b.grad_residual) {
      b.output ? norm_gradients<true, true>(b, first, last) : norm_gradients<false, true>(b, first, last);
    } else {
      b.output ? norm_gradients<true, false>(b, first, last) : norm_gradients<false, false>(b, first, last);
    }
  });
  NormVec::fence();
}

}  // namespace
