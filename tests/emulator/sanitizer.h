// Under -fsanitize=thread: CUDA threads as fibers without an order of their own, and edges where CUDA synchronises.
#pragma once

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace simt {
#ifdef __SANITIZE_THREAD__
constexpr bool kDetectsRaces = true;

inline void happens_before(void* token) { __tsan_release(token); }
inline void happens_after(void* token) { __tsan_acquire(token); }

// The emulator's own accesses are no part of the kernel.
struct Quiet {
  Quiet() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
};

inline void fiber_to_host(void* host) { __tsan_switch_to_fiber(host, __tsan_switch_to_fiber_no_sync); }
inline void host_to_fiber(void*& host, void*& fiber) {
  host = __tsan_get_current_fiber();
  if (!fiber) fiber = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
}
inline void destroy_fiber(void* fiber) {
  if (fiber) __tsan_destroy_fiber(fiber);
}
#else
constexpr bool kDetectsRaces = false;

inline void happens_before(void*) {}
inline void happens_after(void*) {}
struct Quiet {
  Quiet() {}
};
inline void fiber_to_host(void*) {}
inline void host_to_fiber(void*&, void*&) {}
inline void destroy_fiber(void*) {}
#endif
}  // namespace simt
