// Exact top-k masks by radix selection; every launch serves a whole list of tensors. The contract is
// sparsekern/ops/topk_mask.py. Per pass, a block counts one digit of the keys of its chunk; the last block of a segment
// finds the digit of the threshold. Ties at the threshold are then ranked in logical order, and bits become masks.
#include "topk_batch.cuh"
#include "topk_keys.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kThreads = 32 * kTopkWarps, kBlocks = 4,
              kCopies = 4;  // two warps share a histogram: scores fall into few bins
constexpr int kDigitBits = 11, kPerWarp = kTopkChunk / kTopkWarps, kPerThread = kTopkBins / kThreads;
static_assert(kTopkBins == 1 << kDigitBits);

template <class Key>
__device__ __forceinline__ int digit_shift(int pass) {
  const int shift = 8 * int(sizeof(Key)) - kDigitBits * (pass + 1);
  return shift < 0 ? 0 : shift;
}

// The last digit is what the others leave.
template <class Key>
__device__ __forceinline__ uint32_t digit_mask(int pass) {
  const int left = 8 * int(sizeof(Key)) - kDigitBits * pass;
  return (1u << (left < kDigitBits ? left : kDigitBits)) - 1;
}

// Whether the key shares what earlier passes have found of the threshold.
template <class Key>
__device__ __forceinline__ bool has_prefix(Key key, Key threshold, int pass) {
  return pass == 0 || (key ^ threshold) >> (8 * int(sizeof(Key)) - kDigitBits * pass) == 0;
}

// The inclusive sum of `value` over this thread and those before it; `total` over all. Every thread must call it.
__device__ __forceinline__ uint32_t block_scan(uint32_t value, uint32_t& total) {
  __shared__ uint32_t parts[kTopkWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int d = 1; d < 32; d *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, value, d);
    if (lane >= d) value += other;
  }
  __syncthreads();  // of an earlier call
  if (lane == 31) parts[warp] = value;
  __syncthreads();
  total = 0;
  for (int w = 0; w < kTopkWarps; ++w) {
    if (w < warp) value += parts[w];
    total += parts[w];
  }
  return value;
}

// The last block of a segment: which digit has the `needed`-th highest key, and how many are above it.
template <class Key>
__device__ void pick_digit(const ScoreTensor& t, const TopkSpace& space, const uint32_t* histogram, int pass) {
  TopkState& state = space.states[t.segment];
  const uint64_t found = pass == 0 ? 0 : state.key;
  const int64_t needed = pass == 0 ? t.keep : state.needed;
  const int top = kTopkBins - 1 - kPerThread * static_cast<int>(threadIdx.x);  // thread 0 has the highest bins
  uint32_t counts[kPerThread], sum = 0, total;
  for (int j = 0; j < kPerThread; ++j) sum += counts[j] = histogram[top - j];
  int64_t above = static_cast<int64_t>(block_scan(sum, total)) - sum;  // meets at a barrier: all have read the state
  const int shift = digit_shift<Key>(pass);
  if (needed == 0 || needed > total) {
    // Nothing is chosen, or every candidate, which is what is above a threshold of 0.
    if (threadIdx.x) return;
    state = {needed ? found : static_cast<uint64_t>(static_cast<Key>(~Key{0})), needed, 0};
  } else {
    if (above >= needed || above + sum < needed) return;  // one thread stays
    int digit = -1;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      if (digit >= 0) continue;
      if (above + counts[j] >= needed) {
        digit = top - j;
        state = {found | static_cast<uint64_t>(digit) << shift, needed - above, counts[j]};
      }
      above += counts[j];
    }
  }
  if (shift == 0 && state.key == 0) atomicOr(space.status, 2);
}

template <class Key>
__global__ void __launch_bounds__(kThreads, kBlocks)
    count_digits(const __grid_constant__ TopkBatch batch, const TopkSpace space, bool magnitude, int pass) {
  __shared__ uint32_t bins[kCopies][kTopkBins];
  __shared__ bool last;
  for (int b = threadIdx.x; b < kCopies * kTopkBins; b += kThreads) bins[0][b] = 0;
  const ScoreTensor& t = chunk_tensor(batch);
  const Key threshold = pass == 0 ? 0 : static_cast<Key>(space.states[t.segment].key);
  const uint32_t begin = (chunk_of(batch) - t.first_chunk) * kTopkChunk;
  const uint32_t end = begin + kTopkChunk < t.groups ? begin + kTopkChunk : t.groups;
  const int shift = digit_shift<Key>(pass);
  uint32_t* const own = bins[threadIdx.x / 64 % kCopies];
  bool nan = false;
  __syncthreads();
  with_type(t.dtype, [&](auto zero) {
    Key* const keys = static_cast<Key*>(t.keys);
    const bool stored = t.width == 4;
#pragma unroll 4
    for (uint32_t g = begin + threadIdx.x; g < end; g += kThreads) {
      const Key key = stored && pass > 0 ? keys[g] : compute_key<decltype(zero), Key>(t, g, magnitude, nan);
      if (stored && pass == 0) keys[g] = key;
      if (has_prefix(key, threshold, pass)) atomicAdd(&own[key >> shift & digit_mask<Key>(pass)], 1u);
    }
  });
  if (__syncthreads_or(nan) && threadIdx.x == 0 && pass == 0) atomicOr(space.status, 1);
  const int64_t slot = int64_t{pass} * space.segments + t.segment;
  uint32_t* const histogram = space.histograms + slot * kTopkBins;
  for (int b = threadIdx.x; b < kTopkBins; b += kThreads) {
    uint32_t sum = 0;
    for (int c = 0; c < kCopies; ++c) sum += bins[c][b];
    if (sum) atomicAdd(&histogram[b], sum);
  }
  __syncthreads();
  if (threadIdx.x == 0) last = take_ticket(space.tickets + slot) == t.segment_chunks - 1;
  __syncthreads();
  if (last) pick_digit<Key>(t, space, histogram, pass);
}

template <class Key>
__device__ __forceinline__ Key key_at(const ScoreTensor& t, uint32_t group, bool magnitude) {
  if (t.width == 4) return static_cast<const Key*>(t.keys)[group];
  Key key = 0;
  bool nan = false;
  with_type(t.dtype, [&](auto zero) { key = compute_key<decltype(zero), Key>(t, group, magnitude, nan); });
  return key;
}

// Whether some but not all of the groups at the threshold are chosen.
__device__ __forceinline__ bool splits_ties(const TopkState& s) { return s.key != 0 && s.needed < s.ties; }

// How many groups of each warp's part of the chunk, in logical order, are at the threshold; where that matters.
template <class Key>
__global__ void __launch_bounds__(kThreads, kBlocks)
    count_ties(const __grid_constant__ TopkBatch batch, const TopkSpace space, bool magnitude) {
  const ScoreTensor& t = chunk_tensor(batch);
  const TopkState state = space.states[t.segment];
  if (!splits_ties(state)) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t begin = (chunk_of(batch) - t.first_chunk) * kTopkChunk + warp * kPerWarp;
  uint32_t found = 0;
  for (int i = 0; i < kPerWarp && begin + i < t.groups; i += 32) {
    const uint32_t g = begin + i + lane;
    const bool tie = g < t.groups && key_at<Key>(t, storage_group(t, g), magnitude) == state.key;
    found += __popc(__ballot_sync(~0u, tie));
  }
  if (lane == 0) space.counts[uint64_t{chunk_of(batch)} * kTopkWarps + warp] = found;
}

// The number of groups at the threshold in the segment before this warp's part. Every thread of the block must call it.
__device__ __forceinline__ int64_t ties_before(const ScoreTensor& t, const TopkSpace& space, uint32_t chunk) {
  const uint32_t* const counts = space.counts;
  uint32_t sum = 0, total;
  for (uint64_t i = uint64_t{t.segment_first} * kTopkWarps + threadIdx.x; i < uint64_t{chunk} * kTopkWarps;
       i += kThreads) {
    sum += counts[i];
  }
  block_scan(sum, total);
  for (uint32_t w = 0; w < threadIdx.x / 32; ++w) total += counts[uint64_t{chunk} * kTopkWarps + w];
  return total;
}

template <class Key>
__global__ void __launch_bounds__(kThreads, kBlocks)
    choose(const __grid_constant__ TopkBatch batch, const TopkSpace space, bool magnitude) {
  const ScoreTensor& t = chunk_tensor(batch);
  const TopkState state = space.states[t.segment];
  const bool splits = splits_ties(state);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t begin = (chunk_of(batch) - t.first_chunk) * kTopkChunk + warp * kPerWarp;
  int64_t before = splits ? ties_before(t, space, chunk_of(batch)) : 0;
  for (int i = 0; i < kPerWarp && begin + i < t.groups; i += 32) {
    const uint32_t g = begin + i + lane, stored = g < t.groups ? storage_group(t, g) : 0;
    const Key key = g < t.groups ? key_at<Key>(t, stored, magnitude) : 0;
    const uint32_t ties = __ballot_sync(~0u, key != 0 && key == state.key);
    const int64_t rank = before + __popc(ties & ((1u << lane) - 1));
    const bool chosen = key > state.key || ((ties >> lane & 1) && (!splits || rank < state.needed));
    before += __popc(ties);
    if (t.dims == 0) {
      const uint32_t word = __ballot_sync(~0u, chosen);
      if (lane == 0) t.bits[g / 32] = word;
    } else if (chosen) {
      atomicOr(&t.bits[stored / 32], 1u << (stored & 31));
    }
  }
}

// The bytes of 32 weights from `first` on, of which the lanes hold one bit each.
__device__ __forceinline__ void store_bits(const ScoreTensor& t, uint32_t first, bool bit) {
  const uint32_t word = __ballot_sync(~0u, bit), lane = threadIdx.x % 32, byte = first / 8 + lane;
  if (lane < 4 && 8 * byte < t.weights) t.mask[byte] = static_cast<uint8_t>(word >> 8 * lane);
}

// Bits of groups to bits of weights.
__global__ void __launch_bounds__(kThreads, kBlocks) spread(const __grid_constant__ TopkBatch batch) {
  const ScoreTensor& t = chunk_tensor(batch);
  const int lane = threadIdx.x % 32;
  const uint32_t size = kTopkChunk * t.width, from = (chunk_of(batch) - t.first_chunk) * size, weights = t.weights;
  const uint32_t blocks = (t.axis + 3) / 4;
  for (uint32_t first = from + threadIdx.x - lane; first < from + size && first < weights; first += kThreads) {
    uint32_t g = first + lane;
    if (t.width == 4) {
      const uint32_t row = g / t.inner, outer = row / t.axis;
      g = (outer * blocks + (row - outer * t.axis) / 4) * t.inner + (g - row * t.inner);
    }
    store_bits(t, first, first + lane < weights && t.bits[g / 32] >> (g & 31) & 1);
  }
}

// A weight is kept if fewer than n candidates of its group come before it in the order of scores.
__global__ void __launch_bounds__(kThreads, kBlocks)
    n_of_m(const __grid_constant__ TopkBatch batch, int32_t* status, uint32_t n, uint32_t m, bool magnitude) {
  const ScoreTensor& t = chunk_tensor(batch);
  const uint32_t from = (chunk_of(batch) - t.first_chunk) * kTopkChunk, weights = t.weights;
  const int lane = threadIdx.x % 32;
  bool nan = false;
  with_type(t.dtype, [&](auto zero) {
    using S = decltype(zero);
    const auto value = [&](uint32_t i) {
      const auto x = widen(static_cast<const S*>(t.score)[i]);
      return magnitude && x < 0 ? -x : x;
    };
    for (uint32_t first = from + threadIdx.x - lane; first < from + kTopkChunk && first < weights; first += kThreads) {
      const uint32_t i = first + lane;
      bool keep = i < weights && is_candidate(t, i);
      if (i < weights) {
        const uint32_t row = i / t.inner, at = row % t.axis, start = at - at % m, left = t.axis - start;
        const uint32_t stop = start + (m < left ? m : left), base = i - at * t.inner;
        const auto own = value(i);
        nan = nan || own != own;
        uint32_t better = 0;
        for (uint32_t j = start; j < stop && keep && better < n; ++j) {
          const auto other = value(base + j * t.inner);
          better += (other > own || (other == own && j < at)) && is_candidate(t, base + j * t.inner);
        }
        keep = keep && better < n;
      }
      store_bits(t, first, keep);
    }
  });
  if (__syncthreads_or(nan) && threadIdx.x == 0) atomicOr(status, 1);
}

template <class Key>
int topk_typed(const ScoreTensor* tensors, int64_t count, const TopkSpace& space, bool magnitude, void* stream) {
  int error = 0;
  for (int pass = 0; pass < topk_passes(sizeof(Key) == 8); ++pass) {
    each_batch(tensors, count, error, [&](const TopkBatch& batch, dim3 grid) {
      SPARSEKERN_LAUNCH(count_digits<Key>, grid, dim3(kThreads), 0, stream, batch, space, magnitude, pass);
    });
  }
  each_batch(tensors, count, error, [&](const TopkBatch& batch, dim3 grid) {
    SPARSEKERN_LAUNCH(count_ties<Key>, grid, dim3(kThreads), 0, stream, batch, space, magnitude);
  });
  each_batch(tensors, count, error, [&](const TopkBatch& batch, dim3 grid) {
    SPARSEKERN_LAUNCH(choose<Key>, grid, dim3(kThreads), 0, stream, batch, space, magnitude);
  });
  each_batch(tensors, count, error, [&](const TopkBatch& batch, dim3 grid) {
    SPARSEKERN_LAUNCH(spread, grid, dim3(kThreads), 0, stream, batch);
  });
  return error;
}

}  // namespace

int topk_mask(const ScoreTensor* tensors, int64_t count, const TopkSpace& space, bool wide, bool magnitude,
              void* stream) {
  return wide ? topk_typed<uint64_t>(tensors, count, space, magnitude, stream)
              : topk_typed<uint32_t>(tensors, count, space, magnitude, stream);
}

int topk_n_of_m(const ScoreTensor* tensors, int64_t count, int32_t* status, uint32_t n, uint32_t m, bool magnitude,
                void* stream) {
  int error = 0;
  each_batch(tensors, count, error, [&](const TopkBatch& batch, dim3 grid) {
    SPARSEKERN_LAUNCH(n_of_m, grid, dim3(kThreads), 0, stream, batch, status, n, m, magnitude);
  });
  return error;
}

}  // namespace sparsekern::cuda
