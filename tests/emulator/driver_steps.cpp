// Steps of the optimizers, of every type, beside zeros and after an overflow.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "driver.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes)
#endif

using namespace sparsekern;
using namespace sparsekern::cuda;

namespace driver {
namespace {

// Eight elements of which the mask keeps none: AddressSanitizer reports who reads or writes them.
template <class S>
void forbid(std::vector<S>& values, const std::vector<uint8_t>& mask, bool forbidden) {
  for (size_t i = 0; i < values.size(); i += 8) {
    if (mask[i / 8]) continue;
    [[maybe_unused]] const size_t bytes = std::min<size_t>(8, values.size() - i) * sizeof(S);
    if (forbidden) {
      ASAN_POISON_MEMORY_REGION(&values[i], bytes);
    } else {
      ASAN_UNPOISON_MEMORY_REGION(&values[i], bytes);
    }
  }
}

// A chunk by vectors, one with a tail, and a short tensor; `zero`: what is pruned is known to be zero. A gradient
// scaler's numbers are on the device: an overflow, `found_inf`, leaves all as it was.
template <class S>
Bytes step(Dtype dtype, bool adam, bool zero, float found_inf) {
  Bytes result;
  const float scale = 2;
  const double wide_inf = found_inf;
  const DeviceScalar grad_scale{&scale, false}, inf{&wide_inf, true};
  for (size_t n : {9000, 37}) {
    auto param = stored<S>(normal(n)), grad = stored<S>(normal(n)), first = stored<S>(normal(n));
    auto second = stored<S>(Floats(n, 0.5f));
    Floats counts{3};
    std::vector<uint8_t> mask((n + 7) / 8, 0x5A), inner((n + 7) / 8, 0x32), fresh{1};
    for (size_t i = 1; i < mask.size(); i += 3) mask[i] = 0;
    std::vector<double> rates(2);
    const std::vector<S> before = param;
    StepTensor t{param.data(),
                 grad.data(),
                 {first.data(), second.data()},
                 mask.data(),
                 zero ? nullptr : inner.data(),
                 int64_t(n),
                 0,
                 0,
                 0,
                 0};
    t.known_zero = zero;
    std::vector<S>* const all[] = {&param, &grad, &first, &second};
    for (auto* const values : all) forbid(*values, mask, zero);
    if (adam) {
      const AdamwStep rule{0.1, 0.9, 0.99, 1e-8, 0.01, false};
      adamw_rates(counts.data(), 1, rule, rates.data(), inf, nullptr);
      masked_adamw(dtype, &t, 1, rule, rates.data(), grad_scale, inf, nullptr);
    } else {
      const SgdStep rule{-0.1, 0.9, 1, 0.01, 0.02, 0.03, false, false, false, false};
      masked_sgd(dtype, &t, 1, rule, fresh.data(), grad_scale, inf, nullptr);
      clear_fresh(fresh.data(), 1, inf, nullptr);
    }
    for (auto* const values : all) forbid(*values, mask, false);
    if ((std::memcmp(before.data(), param.data(), n * sizeof(S)) == 0) != (found_inf != 0)) {
      printf("a step after an overflow, or none where there was no overflow\n");
      std::exit(1);
    }
    append(result, param);
    append(result, first);
    append(result, second);
    append(result, fresh);
  }
  return result;
}

Bytes step_of_every_type(bool adam, bool zero, float found_inf) {
  Bytes result;
  for (const Bytes& found :
       {step<float>(Dtype::kFloat32, adam, zero, found_inf), step<double>(Dtype::kFloat64, adam, zero, found_inf),
        step<__half>(Dtype::kFloat16, adam, zero, found_inf),
        step<__nv_bfloat16>(Dtype::kBFloat16, adam, zero, found_inf)}) {
    append(result, found);
  }
  return result;
}

}  // namespace

std::vector<Run> steps() {
  std::vector<Run> found;
  for (bool adam : {false, true}) {
    for (bool zero : {false, true}) {
      for (float inf : {0.f, 1.f}) {
        const std::string name = adam ? "masked_adamw" : "masked_sgd", more = zero ? " beside zeros" : "";
        found.push_back(
            {name + more + (inf ? " after an overflow" : ""), [=] { return step_of_every_type(adam, zero, inf); }});
      }
    }
  }
  return found;
}

}  // namespace driver
