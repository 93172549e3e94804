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

// Channels that are moved run by run, which spreads the cost of a run over them. Of an image with rows of 14 pixels
// they take half of the time that they take one by one.
constexpr int64_t kPackGroup = 4;

// One run of a few channels. Each store fills a whole vector, as far as the `room` of the row goes: its zeros are the
// gap, or make room for the next run. kStep is 0 for steps that are neither 1 nor 2.
template <int64_t kStep, class T>
inline void pack_run(const T* from, int64_t channel, int64_t step, int64_t count, int64_t channels, float* to,
                     int64_t room, int64_t width) {
  constexpr int64_t kLanes = PackVec::kLanes;
  const int64_t size = kStep ? kStep : step, whole = kStep ? count / kLanes * kLanes : 0;
  const auto part = [&](int64_t i) {
    const PackVec v = load_stepped(from + i * size, size, lesser(kLanes, count - i));
    if (i + kLanes <= room) {
      v.store(to + i);
    } else {
      v.store(to + i, room - i);
    }
  };
  for (int64_t c = 0; c < channels; ++c, from += channel, to += width) {
    if (kStep && count <= kLanes) {  // the rows of small images
      fetch_image(from, kPackGroup * channel);
      if (kStep == 2) fetch_image(from, kPackGroup * channel + 16);
      part(0);
      continue;
    }
    for (int64_t j = 0; j < count * size; j += 16) fetch_image(from, kPackGroup * channel + j);
    int64_t i = 0;
    for (; i < whole; i += kLanes) {
      (kStep == 1 ? PackVec::load(from + i) : PackVec::load_even(from + 2 * i)).store(to + i);
    }
    for (; i < count; i += kLanes) part(i);
  }
}

// The runs ascend; what lies between them becomes 0.
template <int64_t kStep, class T>
inline void pack_group(const T* image, int64_t channel, int64_t step, const SparseRun* runs, int64_t count,
                       int64_t channels, float* packed, int64_t width) {
  constexpr int64_t kLanes = PackVec::kLanes;
  const PackVec zero = PackVec::splat(0.0f);
  const auto clear = [&](int64_t from, int64_t until) {
    for (; from < until; from += kLanes) {
      for (int64_t c = 0; c < channels; ++c) zero.store(packed + c * width + from, lesser(kLanes, width - from));
    }
  };
  int64_t written = 0;
  for (int64_t r = 0; r < count; ++r) {
    const SparseRun& run = runs[r];
    clear(written, run.packed);
    pack_run<kStep>(image + run.image, channel, step, run.count, channels, packed + run.packed, width - run.packed,
                    width);
    written = run.packed + (run.count + kLanes - 1) / kLanes * kLanes;
  }
  clear(written, width);
}

template <class T>
inline void pack_image(const T* image, int64_t channel, int64_t step, const SparseRun* runs, int64_t count,
                       int64_t channels, float* packed, int64_t width) {
  const auto pack = step == 1 ? pack_group<1, T> : step == 2 ? pack_group<2, T> : pack_group<0, T>;
  for (int64_t c = 0; c < channels; c += kPackGroup) {
    pack(image + c * channel, channel, step, runs, count, lesser(kPackGroup, channels - c), packed + c * width, width);
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

// One run of a few channels. `stream`: past the caches if it begins on a cache line, as far as it fills vectors.
template <int64_t kStep, class T>
inline void unpack_run(const float* from, int64_t width, int64_t count, int64_t channels, T* to, int64_t channel,
                       int64_t step, bool stream) {
  constexpr int64_t kLanes = PackVec::kLanes;
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t c = 0; c < channels; ++c, from += width, to += channel) {
    if (kStep == 1 && count <= kLanes) {
      claim_image(to, kPackGroup * channel);
      PackVec::load(from, count).store(to, count);
      continue;
    }
    const bool past = stream && reinterpret_cast<uintptr_t>(to) % 64 == 0;
    if (!past) {
      for (int64_t j = 0; j < count * step; j += 16) claim_image(to, kPackGroup * channel + j);
    }
    if constexpr (kStep == 2 && sizeof(T) == sizeof(float)) {
      for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t n = lesser(kLanes, count - i);
        PackVec::load(from + i, n).store_even(to + 2 * i, n);
      }
    } else if constexpr (kStep == 1) {
      if constexpr (sizeof(T) == sizeof(float)) {
        for (int64_t i = 0; past && i < whole; i += kLanes) PackVec::load(from + i).stream(to + i);
      }
      for (int64_t i = past ? whole : 0; i < whole; i += kLanes) PackVec::load(from + i).store(to + i);
      if (whole < count) PackVec::load(from + whole, count - whole).store(to + whole, count - whole);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i * step] = narrow(from[i], T{});
    }
  }
}

template <class T>
inline void unpack_image(const float* packed, int64_t width, const SparseRun* runs, int64_t count, int64_t channels,
                         T* image, int64_t channel, int64_t step, bool stream) {
  const auto unpack = step == 1 ? unpack_run<1, T> : step == 2 ? unpack_run<2, T> : unpack_run<0, T>;
  for (int64_t c = 0; c < channels; c += kPackGroup) {
    const int64_t group = lesser(kPackGroup, channels - c);
    for (int64_t r = 0; r < count; ++r) {
      unpack(packed + c * width + runs[r].packed, width, runs[r].count, group, image + c * channel + runs[r].image,
             channel, step, stream && step == 1);
    }
  }
  if (stream) PackVec::fence();
}

// The inverse of pack_last; a pixel that is null is dropped. All channels of a pixel come one after another: cache
// lines that are written alone wait alone.
template <class T>
inline void unpack_last(const float* packed, int64_t width, T* const* pixels, int64_t count, int64_t channels) {
  constexpr int kLanes = PackVec::kLanes;
  for (int64_t p = 0; p < count; p += kLanes) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t n = lesser(kLanes, channels - c);
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
