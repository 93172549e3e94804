// Between images and packed tiles: one row of `width` floats, a multiple of the lanes, per channel. Images of bfloat16
// are widened on the way in, and rounded on the way out.
#pragma once
#include "kernels.h"
#include "vec_scalar.h"

namespace {

using sparsekern::SparseRun;

using PackVec = WideOf<float>::type;

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

inline float widen(float x) { return x; }
inline float narrow(float x, float) { return x; }

template <class T>
inline void fetch_image(const T* p, int64_t i) {
  fetch<1>(reinterpret_cast<const float*>(p + i));
}
template <class T>
inline void claim_image(T* p, int64_t i) {
  claim<1>(reinterpret_cast<float*>(p + i));
}

template <class T>
inline PackVec load_stepped(const T* p, int64_t step, int64_t n) {
  if (step == 1) return PackVec::load(p, n);
  if (step == 2) return PackVec::load_even(p, n);
  float lanes[PackVec::kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = widen(p[i * step]);
  return PackVec::load(lanes);
}

// Channels between what is moved and what is fetched meanwhile.
constexpr int64_t kAhead = 4;

// The runs ascend; what lies between them becomes 0.
template <class T>
inline void pack_image(const T* image, int64_t channel, int64_t step, const SparseRun* runs, int64_t count,
                       int64_t channels, float* packed, int64_t width) {
  constexpr int64_t kLanes = PackVec::kLanes;
  const PackVec zero = PackVec::splat(0.0f);
  for (int64_t c = 0; c < channels; ++c, image += channel, packed += width) {
    int64_t written = 0;
    for (int64_t r = 0; r < count; ++r) {
      for (; written < runs[r].packed; written += kLanes) zero.store(packed + written, lesser(kLanes, width - written));
      const T* const from = image + runs[r].image;
      // Each store fills a whole vector: its zeros are the gap, or make room for the next run.
      int64_t i = 0;
      for (int64_t j = 0; j < runs[r].count * step; j += 16) fetch_image(from, kAhead * channel + j);
      if (step == 1) {
        for (; i + kLanes <= runs[r].count; i += kLanes) PackVec::load(from + i).store(packed + runs[r].packed + i);
      } else if (step == 2) {
        for (; i + kLanes <= runs[r].count; i += kLanes) {
          PackVec::load_even(from + 2 * i).store(packed + runs[r].packed + i);
        }
      }
      written = runs[r].packed + i;
      for (; i < runs[r].count; i += kLanes) {
        const PackVec v = load_stepped(from + i * step, step, lesser(kLanes, runs[r].count - i));
        if (written + kLanes <= width) {
          v.store(packed + written);
        } else {
          v.store(packed + written, width - written);
        }
        written += kLanes;
      }
    }
    for (; written < width; written += kLanes) zero.store(packed + written, lesser(kLanes, width - written));
  }
}

// `pixels` points at the channels of each of `count` pixels, a multiple of the lanes; null is a pixel of zeros.
template <class T>
inline void pack_last(const T* const* pixels, int64_t count, int64_t channels, float* packed, int64_t width) {
  constexpr int kLanes = PackVec::kLanes;
  for (int64_t p = 0; p < count; p += kLanes) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t n = lesser(kLanes, channels - c);
      PackVec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = pixels[p + i] ? PackVec::load(pixels[p + i] + c, n) : PackVec::splat(0.0f);
      }
      transpose(block);
      for (int i = 0; i < n; ++i) block[i].store(packed + (c + i) * width + p);
    }
  }
}

// `stream`: past the caches, those runs of floats that begin on a cache line and as far as they fill vectors.
template <class T>
inline void unpack_image(const float* packed, int64_t width, const SparseRun* runs, int64_t count, int64_t channels,
                         T* image, int64_t channel, int64_t step, bool stream) {
  constexpr int64_t kLanes = PackVec::kLanes;
  for (int64_t c = 0; c < channels; ++c, image += channel, packed += width) {
    for (int64_t r = 0; r < count; ++r) {
      const float* const from = packed + runs[r].packed;
      T* const to = image + runs[r].image;
      const bool past = stream && step == 1 && reinterpret_cast<uintptr_t>(to) % 64 == 0;
      if (!past) {
        for (int64_t j = 0; j < runs[r].count * step; j += 16) claim_image(to, kAhead * channel + j);
      }
      if constexpr (sizeof(T) == sizeof(float)) {
        if (step == 2) {
          for (int64_t i = 0; i < runs[r].count; i += kLanes) {
            const int64_t n = lesser(kLanes, runs[r].count - i);
            PackVec::load(from + i, n).store_even(to + 2 * i, n);
          }
          continue;
        }
      }
      if (step != 1) {
        for (int64_t i = 0; i < runs[r].count; ++i) to[i * step] = narrow(from[i], T{});
        continue;
      }
      int64_t i = 0;
      if constexpr (sizeof(T) == sizeof(float)) {
        if (past) {
          for (; i + kLanes <= runs[r].count; i += kLanes) PackVec::load(from + i).stream(to + i);
        }
      }
      for (; i + kLanes <= runs[r].count; i += kLanes) PackVec::load(from + i).store(to + i);
      if (i < runs[r].count) PackVec::load(from + i, runs[r].count - i).store(to + i, runs[r].count - i);
    }
  }
  if (stream) PackVec::fence();
}

// The inverse of pack_last; a pixel that is null is dropped.
template <class T>
inline void unpack_last(const float* packed, int64_t width, T* const* pixels, int64_t count, int64_t channels) {
  constexpr int kLanes = PackVec::kLanes;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t n = lesser(kLanes, channels - c);
    for (int64_t p = 0; p < count; p += kLanes) {
      PackVec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = i < n ? PackVec::load(packed + (c + i) * width + p) : PackVec::splat(0.0f);
      }
      transpose(block);
      for (int i = 0; i < kLanes; ++i) {
        if (pixels[p + i]) block[i].store(pixels[p + i] + c, n);
      }
    }
  }
}

void sparse_pack(const float* image, int64_t channel, int64_t step, const SparseRun* runs, int64_t count,
                 int64_t channels, float* packed, int64_t width) {
  pack_image(image, channel, step, runs, count, channels, packed, width);
}
void sparse_pack_bf16(const BFloat16* image, int64_t channel, int64_t step, const SparseRun* runs, int64_t count,
                      int64_t channels, float* packed, int64_t width) {
  pack_image(image, channel, step, runs, count, channels, packed, width);
}
void sparse_pack_last(const float* const* pixels, int64_t count, int64_t channels, float* packed, int64_t width) {
  pack_last(pixels, count, channels, packed, width);
}
void sparse_pack_last_bf16(const BFloat16* const* pixels, int64_t count, int64_t channels, float* packed,
                           int64_t width) {
  pack_last(pixels, count, channels, packed, width);
}
void sparse_unpack(const float* packed, int64_t width, const SparseRun* runs, int64_t count, int64_t channels,
                   float* image, int64_t channel, int64_t step, bool stream) {
  unpack_image(packed, width, runs, count, channels, image, channel, step, stream);
}
void sparse_unpack_bf16(const float* packed, int64_t width, const SparseRun* runs, int64_t count, int64_t channels,
                        BFloat16* image, int64_t channel, int64_t step, bool stream) {
  unpack_image(packed, width, runs, count, channels, image, channel, step, stream);
}
void sparse_unpack_last(const float* packed, int64_t width, float* const* pixels, int64_t count, int64_t channels) {
  unpack_last(packed, width, pixels, count, channels);
}
void sparse_unpack_last_bf16(const float* packed, int64_t width, BFloat16* const* pixels, int64_t count,
                             int64_t channels) {
  unpack_last(packed, width, pixels, count, channels);
}

}  // namespace
