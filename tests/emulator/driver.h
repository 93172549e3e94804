// What the parts of the driver share. Each part lists runs of kernels, which return the bytes of their results.
#pragma once
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"
#include "numbers.cuh"

namespace driver {

using Bytes = std::vector<unsigned char>;
using Floats = std::vector<float>;

struct Run {
  std::string name;
  std::function<Bytes()> run;
};

std::vector<Run> steps();
std::vector<Run> selections();
std::vector<Run> layers();

inline std::mt19937 generator;

inline Floats normal(size_t n) {
  std::normal_distribution<float> distribution;
  Floats values(n);
  for (float& v : values) v = distribution(generator);
  return values;
}

template <class T>
void append(Bytes& all, const std::vector<T>& values) {
  const auto* const first = reinterpret_cast<const unsigned char*>(values.data());
  all.insert(all.end(), first, first + values.size() * sizeof(T));
}

template <class S>
std::vector<S> stored(const Floats& values) {
  std::vector<S> result(values.size());
  for (size_t i = 0; i < values.size(); ++i) sparsekern::cuda::narrow(values[i], result[i]);
  return result;
}

}  // namespace driver
