#include "dispatch.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdlib>
#include <string>

namespace sparsekern {
namespace {

struct Isa {
  const char* name;
  const Kernels* table;
  bool (*supported)();
};

// Best first.
const Isa kIsas[] = {
#ifdef __x86_64__
    {"avx512", &kernels_avx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    // Every CPU with AVX2 and FMA has F16C.
    {"avx2", &kernels_avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"scalar", &kernels_scalar, [] { return true; }},
};

// The best supported entry at or below `cap` in the list; null for an unknown name.
const Isa* choose(const std::string& cap) {
  bool reached = cap.empty();
  for (const Isa& isa : kIsas) {
    reached = reached || cap == isa.name;
    if (reached && isa.supported()) return &isa;
  }
  return cap == "avx2" || cap == "avx512" ? &kIsas[sizeof(kIsas) / sizeof(kIsas[0]) - 1] : nullptr;
}

const Isa* choose_from_environment() {
  const char* cap = std::getenv("SPARSEKERN_CPU_ISA");
  const Isa* isa = choose(cap ? cap : "");
  STD_TORCH_CHECK(isa, "SPARSEKERN_CPU_ISA: got '", cap, "', allowed are scalar, avx2, avx512");
  return isa;
}

std::atomic<const Isa*> current{nullptr};

const Isa& isa() {
  const Isa* chosen = current.load(std::memory_order_acquire);
  if (!chosen) current.store(chosen = choose_from_environment(), std::memory_order_release);
  return *chosen;
}

std::string cpu_isa() { return isa().name; }

void set_cpu_isa(std::string cap) {
  const Isa* chosen = choose(cap);
  STD_TORCH_CHECK(chosen, "set_cpu_isa: cap is '", cap, "', allowed are scalar, avx2, avx512 and '' for the best");
  current.store(chosen, std::memory_order_release);
}

}  // namespace

const Kernels& kernels() { return *isa().table; }

}  // namespace sparsekern

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&sparsekern::cpu_isa));
  m.impl("set_cpu_isa", TORCH_BOX(&sparsekern::set_cpu_isa));
}
