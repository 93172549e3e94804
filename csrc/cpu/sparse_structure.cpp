// The kept columns of every row of a mask on CPU: the tensors that sparsekern/ops/sparse_structure.py describes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <string>
#include <vector>

#include "dispatch.h"

namespace sparsekern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Bits = std::vector<uint64_t>;

constexpr int64_t kGrain = int64_t{1} << 16;  // elements per task

int64_t words_of(int64_t bits) { return (bits + 63) / 64; }

// `n` <= 64 bits from any bit on; behind the last ones lies a word to read.
uint64_t bits_at(const uint64_t* from, int64_t at, int64_t n) {
  const int64_t shift = at % 64;
  uint64_t found = from[at / 64] >> shift;
  if (shift) found |= from[at / 64 + 1] << (64 - shift);
  return n < 64 ? found & ((uint64_t{1} << n) - 1) : found;
}

// The lowest bit of each four, side by side: 16 bits.
uint64_t every_fourth(uint64_t bits) {
  bits &= 0x1111111111111111;
  bits = (bits | bits >> 3) & 0x0303030303030303;
  bits = (bits | bits >> 6) & 0x000f000f000f000f;
  bits = (bits | bits >> 12) & 0x000000ff000000ff;
  return (bits | bits >> 24) & 0xffff;
}

// A mask of bytes (outputs, inputs, taps), as blocks of `tall` outputs or `wide` inputs.
struct Mask {
  const uint8_t* bytes;
  int64_t outputs, inputs, taps;
  int64_t tall, wide;

  int64_t rows() const { return outputs / tall; }
  int64_t columns() const { return inputs / wide * taps; }
  int64_t words() const { return words_of(columns()); }

  // The blocks of a row in which a weight is kept, a bit each; false if some of them are not kept as a whole.
  bool row(int64_t row, uint64_t* found) const {
    const int64_t size = inputs * taps;
    const auto pack = [&](int64_t output, uint64_t* to) {
      to[words_of(size) - 1] = 0;
      kernels().mask_to_bits(bytes + output * size, 0, size, reinterpret_cast<uint8_t*>(to));
    };
    thread_local Bits held;
    held.resize(words_of(size) + 1);
    if (wide == 4) {
      pack(row, held.data());
      return taps == 1 ? quads(held.data(), found) : channels(held.data(), found);
    }
    pack(row * tall, found);
    bool whole = true;
    for (int64_t i = 1; i < tall; ++i) {
      pack(row * tall + i, held.data());
      for (int64_t j = 0; j < words(); ++j) {
        whole = whole && found[j] == held[j];
        found[j] |= held[j];
      }
    }
    return whole;
  }

  // Blocks of four neighbours.
  bool quads(const uint64_t* bits, uint64_t* found) const {
    std::fill_n(found, words(), 0);
    bool whole = true;
    for (int64_t i = 0; i < words_of(inputs); ++i) {
      const uint64_t pairs = bits[i] | bits[i] >> 1, both = bits[i] & bits[i] >> 1;
      const uint64_t any = every_fourth(pairs | pairs >> 2);
      whole = whole && any == every_fourth(both & both >> 2);
      found[i / 4] |= any << i % 4 * 16;
    }
    return whole;
  }

  // Blocks of four channels of several taps.
  bool channels(const uint64_t* bits, uint64_t* found) const {
    std::fill_n(found, words(), 0);
    bool whole = true;
    int64_t at = 0;
    for (int64_t c = 0; c < inputs; c += 4) {
      for (int64_t tap = 0; tap < taps; tap += 64) {
        const int64_t n = std::min<int64_t>(64, taps - tap);
        uint64_t any = 0, all = ~uint64_t{0};
        for (int64_t i = 0; i < 4; ++i) {
          const uint64_t own = bits_at(bits, (c + i) * taps + tap, n);
          any |= own;
          all &= own;
        }
        whole = whole && any == all;
        found[at / 64] |= any << at % 64;
        if (at % 64 + n > 64) found[at / 64 + 1] |= any >> (64 - at % 64);
        at += n;
      }
    }
    return whole;
  }
};

// Row pointers and column indices; nothing if `whole` is asked for and blocks are kept in part.
std::vector<Tensor> sparse_structure_cpu(Tensor mask, std::string layout, bool whole) {
  STD_TORCH_CHECK(mask.is_cpu() && mask.is_contiguous() && mask.dim() >= 2 && mask.scalar_type() == ScalarType::Bool,
                  "sparsekern: mask must be contiguous, on CPU, of bool and of two or more dims");
  Mask m{static_cast<const uint8_t*>(mask.const_data_ptr()), mask.size(0), mask.size(1), 1, 1, 1};
  for (int64_t i = 2; i < mask.dim(); ++i) m.taps *= mask.size(i);
  if (layout == "4x1") m.tall = 4;
  if (layout == "1x4") m.wide = 4;
  STD_TORCH_CHECK(m.outputs % m.tall == 0 && m.inputs % m.wide == 0, "sparsekern: mask must have full blocks");
  const int64_t rows = m.rows(), words = m.words();
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, m.inputs * m.taps * m.tall));
  Tensor pointers = torch::stable::new_empty(mask, {rows + 1}, ScalarType::Int);
  int32_t* const first = pointers.mutable_data_ptr<int32_t>();
  Bits bits(rows * words);
  std::atomic<bool> good = true;
  torch::stable::parallel_for(0, words ? rows : 0, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end && good; ++row) {
      uint64_t* const own = bits.data() + row * words;
      if (!m.row(row, own) && whole) good = false;
      first[row + 1] = 0;
      for (int64_t i = 0; i < words; ++i) first[row + 1] += std::popcount(own[i]);
    }
  });
  if (!good) return {};
  if (!words) std::fill_n(first, rows + 1, 0);
  first[0] = 0;
  for (int64_t row = 0; row < rows; ++row) first[row + 1] += first[row];
  Tensor indices = torch::stable::new_empty(mask, {first[rows]}, ScalarType::Int);
  int32_t* const to = indices.mutable_data_ptr<int32_t>();
  torch::stable::parallel_for(0, words ? rows : 0, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int32_t* next = to + first[row];
      for (int64_t i = 0; i < words; ++i) {
        for (uint64_t left = bits[row * words + i]; left; left &= left - 1) {
          *next++ = static_cast<int32_t>(i * 64 + std::countr_zero(left));
        }
      }
    }
  });
  return {pointers, indices};
}

}  // namespace
}  // namespace sparsekern

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("_sparse_structure_cpu", TORCH_BOX(&sparsekern::sparse_structure_cpu));
}
