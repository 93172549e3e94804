// Warp collectives, block barriers, atomics and intrinsics of CUDA on the emulated machine.
#pragma once
#include <bit>
#include <cmath>

#include "machine.h"

namespace simt {

enum Operation {
  kSyncWarp = 1,
  kShuffle,
  kShuffleXor,
  kShuffleDown,
  kShuffleUp,
  kBallot,
  kMatch,
  kReduce,
  kMma,
  kLdmatrix
};

inline int lane() { return machine().current->linear & 31; }

inline Rendezvous& find_rendezvous(Warp& warp, uint32_t mask) {
  Rendezvous* found = nullptr;
  for (Rendezvous& r : warp.rendezvous) {
    if (r.arrived && r.mask == mask) found = &r;
    if (r.arrived && r.mask != mask && (r.mask & mask)) fail("masks of two warp collectives overlap");
  }
  for (Rendezvous& r : warp.rendezvous) {
    if (!found && !r.arrived && r.mask == mask) found = &r;
  }
  for (Rendezvous& r : warp.rendezvous) {
    if (!found && !r.arrived) found = &r;
  }
  if (!found) fail("too many masks of warp collectives at once");
  return *found;
}

// All lanes of `mask` meet, each with a value; returns where the values of all of them are, 64 bytes apart.
template <class T>
const unsigned char* meet(uint32_t mask, int operation, const T& value) {
  static_assert(sizeof(T) <= 64 && std::is_trivially_copyable_v<T>);
  Quiet quiet;
  Machine& m = machine();
  Thread& t = *m.current;
  if (!(mask >> lane() & 1)) fail("a lane is not in the mask of its warp collective");
  if (mask & ~t.warp->live) fail("the mask of a warp collective names lanes that have exited");
  Rendezvous& r = find_rendezvous(*t.warp, mask);
  if (r.arrived && r.operation != operation) fail("lanes of one mask are in different warp collectives");
  char* const token = reinterpret_cast<char*>(&r) + (r.generation & 1);
  if (operation == kSyncWarp) happens_before(token);
  unsigned char (*const slots)[64] = r.slots[r.generation & 1];
  r.mask = mask;
  r.operation = operation;
  std::memcpy(slots[lane()], &value, sizeof value);
  r.arrived |= 1u << lane();
  if (r.arrived == mask) {
    r.arrived = 0;
    ++r.generation;
    const size_t base = t.linear & ~31;
    for (size_t l = 0; l < 32 && base + l < m.threads.size(); ++l) {
      if ((mask >> l & 1) && int(l) != lane()) m.threads[base + l].state = State::kReady;
    }
  } else {
    t.state = State::kAtWarp;
    yield();
  }
  if (operation == kSyncWarp) happens_after(token);
  return &slots[0][0];
}

template <class T>
T value_of(const unsigned char* slots, int lane) {
  T value;
  std::memcpy(&value, slots + 64 * lane, sizeof value);
  return value;
}

// Returns how many threads came with a true predicate; none can be at the next barrier before all have read it.
inline int barrier(bool predicate) {
  Quiet quiet;
  Machine& m = machine();
  char* const token = &m.barrier_token[m.barriers & 1];
  happens_before(token);
  m.counted += predicate;
  if (++m.at_barrier == m.live) {
    release_barrier(m);
  } else {
    m.current->state = State::kAtBarrier;
    yield();
  }
  happens_after(token);
  return m.last_count;
}

template <class T, class F>
T reduce(uint32_t mask, T value, const F& combine) {
  const unsigned char* const slots = meet(mask, kReduce, value);
  T result{};
  bool first = true;
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    result = first ? value_of<T>(slots, l) : combine(result, value_of<T>(slots, l));
    first = false;
  }
  return result;
}

}  // namespace simt

#define threadIdx (simt::machine().current->index)
#define blockIdx (simt::machine().block)
#define blockDim (simt::machine().block_size)
#define gridDim (simt::machine().grid_size)
constexpr int warpSize = 32;

inline void __syncthreads() { simt::barrier(false); }
inline int __syncthreads_count(int predicate) { return simt::barrier(predicate != 0); }
inline int __syncthreads_or(int predicate) { return simt::barrier(predicate != 0) != 0; }
inline void __syncwarp(uint32_t mask = ~0u) { simt::meet(mask, simt::kSyncWarp, 0); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  const int own = simt::lane();
  const unsigned char* const slots = simt::meet(mask, simt::kShuffle, value);
  return simt::value_of<T>(slots, (own & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
  const int own = simt::lane(), other = own ^ bits;
  const unsigned char* const slots = simt::meet(mask, simt::kShuffleXor, value);
  return (other & ~(width - 1)) <= (own & ~(width - 1)) ? simt::value_of<T>(slots, other) : value;
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const int own = simt::lane();
  const unsigned char* const slots = simt::meet(mask, simt::kShuffleDown, value);
  return (own & (width - 1)) + int(delta) < width ? simt::value_of<T>(slots, own + int(delta)) : value;
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const int own = simt::lane();
  const unsigned char* const slots = simt::meet(mask, simt::kShuffleUp, value);
  return (own & (width - 1)) >= int(delta) ? simt::value_of<T>(slots, own - int(delta)) : value;
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  const unsigned char* const slots = simt::meet(mask, simt::kBallot, predicate);
  uint32_t bits = 0;
  for (int l = 0; l < 32; ++l) {
    if (mask >> l & 1) bits |= uint32_t{simt::value_of<int>(slots, l) != 0} << l;
  }
  return bits;
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <class T>
uint32_t __match_any_sync(uint32_t mask, T value) {
  const unsigned char* const slots = simt::meet(mask, simt::kMatch, value);
  uint32_t bits = 0;
  for (int l = 0; l < 32; ++l) {
    if ((mask >> l & 1) && simt::value_of<T>(slots, l) == value) bits |= 1u << l;
  }
  return bits;
}
inline unsigned __reduce_add_sync(uint32_t mask, unsigned v) {
  return simt::reduce(mask, v, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_or_sync(uint32_t mask, unsigned v) {
  return simt::reduce(mask, v, [](unsigned a, unsigned b) { return a | b; });
}

template <class T, class V>
T atomicAdd(T* p, V v) {
  return std::atomic_ref<T>(*p).fetch_add(static_cast<T>(v), std::memory_order_relaxed);
}
template <class T, class V>
T atomicOr(T* p, V v) {
  return std::atomic_ref<T>(*p).fetch_or(static_cast<T>(v), std::memory_order_relaxed);
}

template <class T>
T atomicMax(T* p, T v) {
  const std::atomic_ref<T> at(*p);
  T before = at.load(std::memory_order_relaxed);
  while (before < v && !at.compare_exchange_weak(before, v, std::memory_order_relaxed)) {
  }
  return before;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __clz(uint32_t x) { return std::countl_zero(x); }
inline int __ffs(uint32_t x) { return x ? std::countr_zero(x) + 1 : 0; }
inline unsigned __float_as_uint(float f) { return std::bit_cast<unsigned>(f); }
inline float __uint_as_float(unsigned i) { return std::bit_cast<float>(i); }
inline long long __double_as_longlong(double d) { return std::bit_cast<long long>(d); }
using std::fabs;
using std::fma;
using std::fmaf;
using std::sqrt;
