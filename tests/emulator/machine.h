// One emulated streaming multiprocessor: a fiber per CUDA thread, barriers, launches. Own code, x86-64.
//
// A block runs on one OS thread; several blocks run side by side. Threads switch at barriers and warp collectives only,
// in one of three orders (`schedule`), so that a missing barrier changes the result in at least one of them. Built with
// -fsanitize=thread, each CUDA thread is a fiber of ThreadSanitizer and nothing but CUDA's own synchronisation orders
// them: a missing barrier is then a reported race whatever the order.
#pragma once
#include <sys/mman.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "sanitizer.h"

#ifndef __x86_64__
#error "the emulator switches fibers in x86-64 assembly; another CPU needs its own switch_stack"
#endif

namespace simt {

constexpr size_t kStack = 64 << 10, kMostThreads = 1024, kMostShared = 227 << 10;

enum class State : uint8_t { kReady, kAtBarrier, kAtWarp, kDone };

struct Copy {
  void* to;
  const void* from;
  bool live;
};

// Lanes of one mask that meet; two generations, so that the first to leave may arrive again before the last has read.
struct Rendezvous {
  uint32_t mask = 0, arrived = 0, generation = 0;
  int operation = 0;
  alignas(16) unsigned char slots[2][32][64];
};

struct Warp {
  Rendezvous rendezvous[4];
  uint32_t live = 0;
};

struct Thread {
  void* stack = nullptr;
  uint3 index{};
  int linear = 0;
  State state = State::kReady;
  Warp* warp = nullptr;
  std::vector<std::vector<Copy>> copies;  // cp.async groups; the last one is open
};

struct Machine {
  unsigned char* stacks = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared_store;
  unsigned char* shared = nullptr;
  void* scheduler = nullptr;
  void *host_fiber = nullptr, *fibers[kMostThreads] = {};  // of ThreadSanitizer, which has a limited number of them
  Thread* current = nullptr;
  uint3 block{};
  dim3 block_size, grid_size;
  int live = 0, at_barrier = 0, counted = 0, last_count = 0;
  unsigned barriers = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  const char* error = nullptr;
  char barrier_token[2] = {}, begin_token = 0, end_token = 0;  // addresses for happens-before edges

  ~Machine() {
    for (void* fiber : fibers) destroy_fiber(fiber);
    if (stacks) munmap(stacks, kStack * kMostThreads);
  }
};

inline Machine& machine() {
  static thread_local Machine m;
  return m;
}

// 0: forward, 1: reverse, above: random from this seed, with a new order at every switch.
inline int& schedule() {
  static int value = 0;
  return value;
}

inline int& os_threads() {
  static int value = 2;
  return value;
}

// Saves the callee-saved registers of the running stack in *from and continues on `to`.
__attribute__((naked, noinline)) static void switch_stack(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
      "movq %rsp,(%rdi); movq %rsi,%rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

inline void yield() {
  Machine& m = machine();
  void **from = &m.current->stack, *to = m.scheduler;
  fiber_to_host(m.host_fiber);
  switch_stack(from, to);
}

[[noreturn]] inline void fail(const char* message) {
  machine().error = message;
  for (;;) yield();
}

inline void release_barrier(Machine& m) {
  m.at_barrier = 0;
  m.last_count = m.counted;
  m.counted = 0;
  ++m.barriers;
  for (Thread& t : m.threads) {
    if (t.state == State::kAtBarrier) t.state = State::kReady;
  }
}

inline void fiber_entry() {
  Machine& m = machine();
  happens_after(&m.begin_token);
  m.body(m.argument);
  happens_before(&m.end_token);
  {
    Quiet quiet;  // ends before the last switch, from which a fiber never returns
    Thread& t = *m.current;
    for (const auto& group : t.copies) {
      if (!group.empty()) m.error = "a thread exits with cp.async copies that it did not wait for";
    }
    t.state = State::kDone;
    t.warp->live &= ~(1u << (t.linear & 31));
    if (--m.live && m.at_barrier == m.live) release_barrier(m);
  }
  yield();
  std::abort();
}

inline std::vector<int> begin_block(Machine& m) {
  const int n = static_cast<int>(m.threads.size());
  m.live = n;
  m.at_barrier = m.counted = 0;
  m.error = nullptr;
  std::fill(m.shared_store.begin(), m.shared_store.end(), 0xFF);  // what nobody wrote reads as NaN
  for (Warp& w : m.warps) {
    w.live = 0;
    for (Rendezvous& r : w.rendezvous) r.mask = r.arrived = 0;
  }
  std::vector<int> order(n);
  for (int i = 0; i < n; ++i) {
    Thread& t = m.threads[i];
    t.linear = i;
    t.index = {i % m.block_size.x, i / m.block_size.x % m.block_size.y, i / (m.block_size.x * m.block_size.y)};
    t.state = State::kReady;
    t.warp = &m.warps[i / 32];
    t.warp->live |= 1u << (i & 31);
    t.copies.assign(1, {});
    void** top = reinterpret_cast<void**>(m.stacks + (i + 1) * kStack) - 2;  // aligned as after a call
    *top = reinterpret_cast<void*>(&fiber_entry);
    for (int k = 0; k < 6; ++k) *--top = nullptr;
    t.stack = top;
    order[i] = schedule() == 1 ? n - 1 - i : i;
  }
  return order;
}

[[noreturn]] inline void report(const Machine& m) {
  int count[4] = {};
  for (const Thread& t : m.threads) ++count[static_cast<int>(t.state)];
  char where[160];
  snprintf(where, sizeof where, " in block (%u,%u,%u): %d at __syncthreads, %d at a warp collective, %d exited of %zu",
           m.block.x, m.block.y, m.block.z, count[1], count[2], count[3], m.threads.size());
  throw std::runtime_error(std::string("emulator: ") + (m.error ? m.error : "deadlock") + where);
}

inline void run_block() {
  Machine& m = machine();
  Quiet quiet;
  std::vector<int> order = begin_block(m);
  uint32_t random = 2654435761u * (schedule() + 1) + m.block.x;
  happens_before(&m.begin_token);
  while (m.live) {
    if (schedule() > 1) {
      for (size_t i = order.size() - 1; i > 0; --i) {
        random = random * 1664525u + 1013904223u;
        std::swap(order[i], order[(random >> 8) % (i + 1)]);
      }
    }
    bool ran = false;
    for (int i : order) {
      Thread& t = m.threads[i];
      if (t.state != State::kReady) continue;
      ran = true;
      m.current = &t;
      void *to = t.stack, **from = &m.scheduler;
      host_to_fiber(m.host_fiber, m.fibers[i]);
      switch_stack(from, to);
      if (m.error) report(m);
    }
    if (!ran) report(m);
  }
  happens_after(&m.end_token);
}

template <class F>
void run_blocks(std::atomic<uint64_t>& next, uint64_t blocks, dim3 grid, dim3 block, size_t shared, F& body) {
  Machine& m = machine();
  if (!m.stacks) {
    void* found = mmap(nullptr, kStack * kMostThreads, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) throw std::bad_alloc();
    m.stacks = static_cast<unsigned char*>(found);
  }
  const size_t n = size_t{block.x} * block.y * block.z;
  m.threads.resize(n);
  m.warps.resize((n + 31) / 32);
  m.block_size = block;
  m.grid_size = grid;
  m.shared_store.resize(shared + 128);
  m.shared = m.shared_store.data() + (-reinterpret_cast<uintptr_t>(m.shared_store.data()) & 127);
  m.body = [](void* f) { (*static_cast<F*>(f))(); };
  m.argument = const_cast<void*>(static_cast<const void*>(&body));
  for (uint64_t i; (i = next++) < blocks;) {
    const uint64_t b = schedule() == 1 ? blocks - 1 - i : i;
    m.block = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / (uint64_t{grid.x} * grid.y))};
    run_block();
  }
}

// Runs `body` for every thread of every block; throws on a deadlock or a misuse that a device would not forgive.
template <class F>
void launch(dim3 grid, dim3 block, size_t shared, F&& body) {
  const size_t n = size_t{block.x} * block.y * block.z;
  if (n < 1 || n > kMostThreads) throw std::runtime_error("emulator: a block has 1 to 1024 threads");
  if (shared > kMostShared) throw std::runtime_error("emulator: too much dynamic shared memory");
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (!blocks || grid.y > 65535 || grid.z > 65535) throw std::runtime_error("emulator: bad grid");
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  std::string message;
  const auto work = [&] {
    try {
      run_blocks(next, blocks, grid, block, shared, body);
    } catch (const std::exception& e) {
      next = blocks;
      if (!failed.exchange(true)) message = e.what();
    }
  };
  // A thread costs about what ten small blocks cost.
  const int extra = blocks < 16 && !kDetectsRaces ? 0 : static_cast<int>(std::min<uint64_t>(os_threads(), blocks)) - 1;
  std::vector<std::thread> others;
  for (int i = 0; i < extra; ++i) others.emplace_back(work);
  work();
  for (std::thread& t : others) t.join();
  if (failed) throw std::runtime_error(message);
}

}  // namespace simt
