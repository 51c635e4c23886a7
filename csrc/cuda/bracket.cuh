// A bracket of two keys around each segment's k-th largest, from a sample, and the choice among the candidates inside
// it: steps 1 and 3 of topk.cu, on the device.
#pragma once

#include "scores.cuh"

namespace deftx {
namespace {

constexpr int kDigit = 11;  // bits of a radix round
constexpr int kBins = 1 << kDigit;
constexpr int64_t kOwnSample = 1 << 12;  // segments up to this size are their own sample
// Of a segment, at most. Of a large one more: half as many candidates, which are written and read several times.
constexpr int64_t kSamples = 1 << 18, kManySamples = 1 << 20, kLarge = 1'000'000'000;

// A radix select under way: the elements whose value >> high is `prefix` are left, and `remaining` of them are wanted.
struct Search {
  uint64_t prefix;
  int64_t remaining;
  int32_t high;
  int32_t phase;  // of `narrow`: kByKey, kByPlace, kDecided
};
enum : int32_t { kByKey, kByPlace, kDecided, kFailed };

// What the host knows of a segment.
struct SegmentPlan {
  int64_t k, elements;
  int64_t first_tile, last_tile;  // up to, not including
  int32_t first_item, last_item;
  int64_t samples, sample_at,
      rank[2];  // of a sample: how many, where, and the ranks (from 1, descending) of the bracket's ends
  int64_t list_at, capacity;
};

// What kernels find out about it.
struct SegmentState {
  uint64_t from, above;                   // keys: the bracket, later the threshold. By the host where k is 0 or all.
  unsigned long long candidates, beyond;  // how many lie inside the bracket, how many above it
  Search ends[2], search;
  uint64_t cut_key, cut_place;  // (key - from, places from the segment's end): candidates from here on are chosen
  int64_t quota;                // ties to choose
  unsigned done;
};

enum Redo : unsigned { kTiesOverflow = 1, kMissed = 2 };
struct Status {
  unsigned long long first_bad;  // its bit, or ~0
  unsigned redo;
};

template <typename Key>
struct Lists {
  Key* keys;         // [capacity of all segments]
  uint64_t* places;  // bits of the mask
};

using Counter = unsigned long long;

__device__ int bit_length(uint64_t x) { return 64 - __clzll(static_cast<long long>(x)); }

// By a block of kThreads: the digit of the `remaining`-th largest of the values counted in `counters`; sets these to
// zero.
struct Pick {
  uint64_t digit;
  int64_t above, count;
};
__device__ Pick pick_digit(Counter* counters, int64_t remaining, bool clear) {
  constexpr int kEach = kBins / kThreads;
  __shared__ Pick picked;
  Counter mine[kEach];
  int64_t sum = 0, total;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int bin = kBins - 1 - (static_cast<int>(threadIdx.x) * kEach + i);
    mine[i] = __ldcg(counters + bin);
    if (clear) counters[bin] = 0;
    sum += static_cast<int64_t>(mine[i]);
  }
  int64_t above = block_exclusive(sum, total);
  if (threadIdx.x == 0) picked = {0, 0, 0};
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t count = static_cast<int64_t>(mine[i]);
    if (above < remaining && remaining <= above + count) {
      picked = {static_cast<uint64_t>(kBins - 1 - (static_cast<int>(threadIdx.x) * kEach + i)), above, count};
    }
    above += count;
  }
  __syncthreads();
  const Pick result = picked;
  __syncthreads();
  return result;
}

__device__ bool takes_part(uint64_t value, const Search& s) { return s.high >= 64 || (value >> s.high) == s.prefix; }
__device__ int low_of(const Search& s) { return max(s.high - kDigit, 0); }
__device__ int digit_of(uint64_t value, const Search& s) {
  const int low = low_of(s);
  return static_cast<int>(value >> low) & ((1 << (s.high - low)) - 1);
}
__device__ void advance(Search& s, const Pick& p) {
  const int low = low_of(s);
  s.prefix = s.prefix << (s.high - low) | p.digit;
  s.remaining -= p.above;
  s.high = low;
}

__device__ void clear_bins(unsigned* bins, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) bins[i] = 0;
  __syncthreads();
}
__device__ void add_bins(const unsigned* bins, Counter* counters, int count) {
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    if (bins[i]) atomicAdd(counters + i, static_cast<Counter>(bins[i]));
  }
}

// ---- sample ----

__device__ uint32_t scramble(uint64_t x) {  // the finaliser of MurmurHash3
  x ^= x >> 33, x *= 0xff51afd7ed558ccdull, x ^= x >> 33, x *= 0xc4ceb9fe1a85ec53ull;
  return static_cast<uint32_t>(x >> 32);
}

// One element of each of `samples` stretches of the segment, at a place in it that looks random: rows and columns leave
// no trace.
__device__ int64_t sampled_element(int64_t stretch, int64_t longer, int64_t i) {  // the first `longer` have one more
  const int64_t begin = i * stretch + min(i, longer), length = stretch + (i < longer);
  return begin +
         static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(scramble(i)) << 32, static_cast<uint64_t>(length)));
}

template <typename Key, bool kBase>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const Bits bits, const SegmentPlan* __restrict__ plans, SegmentState* states, Key* samples,
                  Counter* counters,  // [segments][2][kBins]
                  int blocks_each, int round) {
  __shared__ unsigned bins[2][kBins];
  const SegmentPlan plan = plans[blockIdx.x / blocks_each];
  SegmentState& state = states[blockIdx.x / blocks_each];
  const int block = blockIdx.x % blocks_each;
  const int64_t n = plan.samples;
  if (n == 0) return;
  const int64_t stretch = plan.elements / n, longer = plan.elements % n;
  Key* keys = samples + plan.sample_at;
  Counter* mine = counters + int64_t{blockIdx.x / blocks_each} * 2 * kBins;
  Search ends[2] = {state.ends[0], state.ends[1]};
  if (round == 0) {
    for (int e = 0; e < 2; ++e) ends[e] = {0, min(max(plan.rank[e], int64_t{1}), n), KeyOf<Key>::kBits, kByKey};
  }
  clear_bins(bins[0], 2 * kBins);
  for (int64_t i = block * int64_t{kThreads} + threadIdx.x; i < n; i += blocks_each * int64_t{kThreads}) {
    WordOf<Key> key;
    if (round == 0) {
      const int64_t element = bits.items[plan.first_item].first_element + sampled_element(stretch, longer, i);
      int low = plan.first_item, high = plan.last_item;
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (bits.items[middle].first_element <= element ? low : high) = middle;
      }
      key = load_key<Key, kBase>(bits.items[low], element - bits.items[low].first_element);
      keys[i] = static_cast<Key>(key);
    } else {
      key = keys[i];
    }
    if (takes_part(key, ends[0])) atomicAdd(&bins[0][digit_of(key, ends[0])], 1u);
    if (round > 0 && takes_part(key, ends[1])) atomicAdd(&bins[1][digit_of(key, ends[1])], 1u);
  }
  add_bins(bins[0], mine, 2 * kBins);
  if (!last_block(&state.done, blocks_each)) return;
  for (int e = 0; e < 2; ++e) {
    const Pick p = pick_digit(mine + (round == 0 ? 0 : e * kBins), ends[e].remaining, round > 0 || e == 1);
    advance(ends[e], p);
  }
  if (threadIdx.x == 0) {
    state.ends[0] = ends[0], state.ends[1] = ends[1];
    if (round == KeyOf<Key>::kRounds - 1) {
      const int shift = ends[0].high;
      state.from = plan.rank[0] > n ? 0 : ends[0].prefix << shift;
      state.above = plan.rank[1] < 1 ? uint64_t{1} << KeyOf<Key>::kBits : (ends[1].prefix + 1) << shift;
    }
  }
}

// ---- narrow, apply ----

__device__ uint64_t last_place(const SegmentPlan& s) { return static_cast<uint64_t>(s.last_tile) * kTile - 1; }

__device__ int place_bits(const SegmentPlan& s) {
  return bit_length(static_cast<uint64_t>(s.last_tile - s.first_tile) * kTile - 1);
}

// Where the search among the candidates begins.
__device__ Search opened(const SegmentPlan& plan, const SegmentState& s) {
  const int64_t wanted = plan.k - static_cast<int64_t>(s.beyond), found = static_cast<int64_t>(s.candidates);
  if (wanted < 0 || wanted > found || found > plan.capacity) return {0, wanted, 0, kFailed};
  if (wanted == 0 || wanted == found) return {0, wanted, 0, kDecided};
  const int length = bit_length(s.above - s.from - 1);
  return length ? Search{0, wanted, length, kByKey} : Search{0, wanted, place_bits(plan), kByPlace};
}

template <typename Key>
__global__ void __launch_bounds__(kThreads)
    narrow_kernel(const SegmentPlan* __restrict__ plans, SegmentState* states, const Lists<Key> lists,
                  Counter* counters, int blocks_each, int round, Status* status) {
  __shared__ unsigned bins[kBins];
  const SegmentPlan& plan = plans[blockIdx.x / blocks_each];
  SegmentState& state = states[blockIdx.x / blocks_each];
  const int block = blockIdx.x % blocks_each;
  Search search = round == 0 ? opened(plan, state) : state.search;
  if (round > 0 && search.phase >= kDecided) return;
  Counter* mine = counters + int64_t{blockIdx.x / blocks_each} * 2 * kBins;
  const Key* keys = lists.keys + plan.list_at;
  const uint64_t* places = lists.places + plan.list_at;
  const uint64_t last = last_place(plan);
  const int64_t n = static_cast<int64_t>(state.candidates);
  if (search.phase < kDecided && block * int64_t{kThreads} < n) {
    clear_bins(bins, kBins);
    for (int64_t i = block * int64_t{kThreads} + threadIdx.x; i < n; i += blocks_each * int64_t{kThreads}) {
      uint64_t value = keys[i] - state.from;
      if (search.phase == kByPlace) {
        if (value != state.cut_key) continue;
        value = last - places[i];
      }
      if (takes_part(value, search)) atomicAdd(&bins[digit_of(value, search)], 1u);
    }
    add_bins(bins, mine, kBins);
  }
  if (!last_block(&state.done, blocks_each)) return;
  uint64_t cut_key = state.cut_key, cut_place = 0;
  int64_t quota = state.quota;
  if (search.phase >= kDecided) {
    cut_key = search.remaining == 0 ? ~uint64_t{0} : 0;
    if (search.phase == kFailed && threadIdx.x == 0) {
      const bool single = search.remaining >= 0 && search.remaining <= static_cast<int64_t>(state.candidates) &&
                          state.above == state.from + 1;
      atomicOr(&status->redo, single ? kTiesOverflow : kMissed);
    }
  } else {
    if (round == 0 && search.phase == kByPlace) cut_key = 0, quota = search.remaining;
    const Pick p = pick_digit(mine, search.remaining, true);
    advance(search, p);
    if (p.count == search.remaining) {  // all that are left
      (search.phase == kByKey ? cut_key : cut_place) = search.prefix << search.high;
      if (search.phase == kByKey) quota = 0;
      search.phase = kDecided;
    } else if (search.high == 0) {  // ties
      cut_key = search.prefix, quota = search.remaining;
      search = {0, search.remaining, place_bits(plan), kByPlace};
    }
  }
  if (threadIdx.x == 0) {
    state.search = search, state.cut_key = cut_key, state.cut_place = cut_place, state.quota = quota;
  }
}

template <typename Key>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(const Bits bits, const SegmentPlan* __restrict__ plans, const SegmentState* __restrict__ states,
                 const Lists<Key> lists, int blocks_each) {
  const SegmentPlan& plan = plans[blockIdx.x / blocks_each];
  const SegmentState& state = states[blockIdx.x / blocks_each];
  if (state.search.phase == kFailed) return;
  const uint64_t last = last_place(plan), cut_key = state.cut_key, cut_place = state.cut_place;
  const int64_t n = static_cast<int64_t>(state.candidates);
  for (int64_t i = blockIdx.x % blocks_each * int64_t{kThreads} + threadIdx.x; i < n;
       i += blocks_each * int64_t{kThreads}) {
    const uint64_t key = lists.keys[plan.list_at + i] - state.from;
    if (key > cut_key) continue;
    const uint64_t place = lists.places[plan.list_at + i];
    if (key == cut_key && last - place >= cut_place) continue;
    atomicAnd(bits.words + place / 32, ~(1u << place % 32));
    atomicSub(bits.counts + place / kTile, 1u);
  }
}

}  // namespace
}  // namespace deftx
