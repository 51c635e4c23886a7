// The k largest of each segment, in one pass over the scores: steps 1 to 3 of topk.cu, on the device.
#pragma once

#include "scores.cuh"

namespace deftx {
namespace {

constexpr int kDigit = 11;  // bits of a radix round
constexpr int kBins = 1 << kDigit;
constexpr int64_t kWhole = 1 << 12;    // segments up to this size are their own sample
constexpr int64_t kSamples = 1 << 18;  // of a segment, at most
constexpr int kHeld = 512;             // candidates that a warp holds back

// A radix select under way: the elements whose value >> high is `prefix` are left, and `remaining` of them are wanted.
struct Search {
  uint64_t prefix;
  int64_t remaining;
  int32_t high;
  int32_t phase;  // of `narrow`: kByKey, kByPlace, kDecided
};
enum : int32_t { kByKey, kByPlace, kDecided, kFailed };

struct Segment {
  // Set by the host.
  int64_t k, elements;
  int64_t first_tile, last_tile;  // up to, not including
  int32_t first_item, last_item;
  int64_t samples, sample_at,
      rank[2];  // of a sample: how many, where, and the ranks (from 1, descending) of the bracket's ends
  int64_t list_at, capacity;
  // Set by kernels, or by the host where k is 0 or all.
  uint64_t from, above;                   // keys: the bracket, later the threshold
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

// ---- 1. sample ----

__device__ uint32_t scramble(uint64_t x) {  // the finaliser of MurmurHash3
  x ^= x >> 33, x *= 0xff51afd7ed558ccdull, x ^= x >> 33, x *= 0xc4ceb9fe1a85ec53ull;
  return static_cast<uint32_t>(x >> 32);
}

// One element of each of `samples` stretches of the segment, at a place in it that looks random: rows and columns leave
// no trace.
__device__ int64_t sampled_element(const Segment& s, int64_t i) {
  if (s.samples == s.elements) return i;
  const int64_t stretch = s.elements / s.samples, longer = s.elements % s.samples;  // the first `longer` have one more
  const int64_t begin = i * stretch + min(i, longer), length = stretch + (i < longer);
  return begin +
         static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(scramble(i)) << 32, static_cast<uint64_t>(length)));
}

template <typename Key, bool kBase>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const Bits bits, Segment* segments, Key* samples, Counter* counters,  // [segments][2][kBins]
                  int blocks_each, int round) {
  __shared__ unsigned bins[2][kBins];
  Segment& segment = segments[blockIdx.x / blocks_each];
  const int block = blockIdx.x % blocks_each;
  const int64_t n = segment.samples;
  if (n == 0) return;
  Key* keys = samples + segment.sample_at;
  Counter* mine = counters + int64_t{blockIdx.x / blocks_each} * 2 * kBins;
  Search ends[2] = {segment.ends[0], segment.ends[1]};
  if (round == 0) {
    for (int e = 0; e < 2; ++e) ends[e] = {0, min(max(segment.rank[e], int64_t{1}), n), KeyOf<Key>::kBits, kByKey};
  }
  clear_bins(bins[0], 2 * kBins);
  for (int64_t i = block * int64_t{kThreads} + threadIdx.x; i < n; i += blocks_each * int64_t{kThreads}) {
    WordOf<Key> key;
    if (round == 0) {
      const int64_t element = bits.items[segment.first_item].first_element + sampled_element(segment, i);
      int low = segment.first_item, high = segment.last_item;
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
  if (!last_block(&segment.done, blocks_each)) return;
  for (int e = 0; e < 2; ++e) {
    const Pick p = pick_digit(mine + (round == 0 ? 0 : e * kBins), ends[e].remaining, round > 0 || e == 1);
    advance(ends[e], p);
  }
  if (threadIdx.x == 0) {
    segment.ends[0] = ends[0], segment.ends[1] = ends[1];
    if (round == KeyOf<Key>::kRounds - 1) {
      const int shift = ends[0].high;
      segment.from = segment.rank[0] > n ? 0 : ends[0].prefix << shift;
      segment.above = segment.rank[1] < 1 ? uint64_t{1} << KeyOf<Key>::kBits : (ends[1].prefix + 1) << shift;
    }
  }
}

// ---- 2. stream ----

// What a warp has found inside the bracket, to be listed with one atomic for many.
template <typename Key>
struct Held {
  Key keys[kHeld];
  uint16_t places[kHeld];  // within the tile
};

// By a whole warp. Returns whether there was room.
template <typename Key>
__device__ bool list_held(const Held<Key>& held, int count, Segment& segment, const Lists<Key>& lists,
                          uint64_t tile_bit) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  unsigned long long at = 0;
  if (lane == 0) at = atomicAdd(&segment.candidates, static_cast<unsigned long long>(count));
  at = __shfl_sync(kFull, at, 0);
  for (int i = lane; i < count; i += 32) {
    if (at + i >= static_cast<unsigned long long>(segment.capacity)) break;
    lists.keys[segment.list_at + at + i] = held.keys[i];
    lists.places[segment.list_at + at + i] = tile_bit + held.places[i];
  }
  __syncwarp();
  return at + count <= static_cast<unsigned long long>(segment.capacity);
}

// By a whole warp, of a tile that holds a score beyond all finite ones.
template <typename Key, bool kBase>
__device__ __noinline__ void note_bad(const Item& item, int64_t start, uint64_t tile_bit, WordOf<Key> infinity,
                                      Status* status) {
  for (int i = threadIdx.x % 32; i < kTile && start + i < item.numel; i += 32) {
    if (load_key<Key, kBase>(item, start + i) < infinity) continue;
    atomicMin(&status->first_bad, static_cast<unsigned long long>(tile_bit + i));
    break;
  }
}

// Blocks for a multiprocessor: as many as the registers of its loads allow.
template <typename Key, bool kBase>
constexpr int kStreamBlocks = sizeof(Key) == 8 ? 2
                              : kBase          ? 3
                                               : 4;

// Sets the bits of the keys from `from` on, and counts them. kTies: also counts the keys up to `above` in each tile;
// else lists them.
template <typename Key, bool kBase, bool kTies>
__global__ void __launch_bounds__(kThreads, kStreamBlocks<Key, kBase>)
    stream_kernel(const Bits bits, Segment* segments, const Lists<Key> lists,
                  uint32_t* ties,  // [tiles]
                  WordOf<Key> infinity, Status* status) {
  using Scores = Eights<Key, kBase, !kTies>;
  constexpr int kGroups = KeyOf<Key>::kGroups;
  __shared__ Held<Key> all_held[kTies ? 1 : kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Held<Key>& held = all_held[kTies ? 0 : warp];
  int current = -1;  // segment
  typename Scores::Limit from{}, above{};
  bool room = true;
  unsigned beyond = 0;
  for (int64_t tile = blockIdx.x * int64_t{kWarps} + warp; tile < bits.tiles; tile += gridDim.x * int64_t{kWarps}) {
    const Item& item = bits.items[find_item<&Item::first_tile>(bits.items, bits.count, tile)];
    if (item.segment != current) {
      if (!kTies && current >= 0) {
        const unsigned sum = __reduce_add_sync(kFull, beyond);
        if (lane == 0 && sum) atomicAdd(&segments[current].beyond, static_cast<unsigned long long>(sum));
      }
      current = item.segment, beyond = 0, room = true;
      from = Scores::limit(segments[current].from), above = Scores::limit(segments[current].above);
    }
    const int64_t start = (tile - item.first_tile) * kTile;
    uint8_t* bytes = reinterpret_cast<uint8_t*>(bits.words + tile * kWords) + lane;
    typename Scores::Seen seen{};
    unsigned chosen = 0, tied = 0;
    int count = 0;  // held
    for (int at = 0; at < kTile; at += kGroups * 256) {
      if (start + at >= item.numel) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) bytes[at / 8 + g * 32] = 0;
        continue;
      }
      const int64_t mine = start + at + lane * 8;
      const Scores scores(item, mine);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int64_t left = item.numel - mine - g * 256;
        const uint32_t valid = left >= 8 ? 0xFFu : left <= 0 ? 0u : (1u << left) - 1;
        const uint32_t set = scores.not_below(g, from) & valid, over = set & scores.not_below(g, above),
                       inside = set & ~over;
        if constexpr (!kTies) scores.look(g, seen);
        bytes[at / 8 + g * 32] = static_cast<uint8_t>(set);
        chosen += __popc(set);
        if constexpr (kTies) {
          tied += __popc(inside);
        } else {
          beyond += __popc(over);
          if (room && __any_sync(kFull, inside)) {
            if (count > kHeld - 256) {
              room = list_held(held, count, segments[current], lists, static_cast<uint64_t>(tile) * kTile);
              count = 0;
            }
            const int through = warp_inclusive(__popc(inside));
            int place = count + through - __popc(inside);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              if (inside >> j & 1) {
                held.keys[place] = static_cast<Key>(scores.key(g, j));
                held.places[place++] = static_cast<uint16_t>(at + g * 256 + lane * 8 + j);
              }
            }
            count += __shfl_sync(kFull, through, 31);
          }
        }
      }
    }
    chosen = __reduce_add_sync(kFull, chosen);
    if (lane == 0) bits.counts[tile] = chosen;
    if constexpr (kTies) {
      tied = __reduce_add_sync(kFull, tied);
      if (lane == 0) ties[tile] = tied;
    } else {
      const uint64_t tile_bit = static_cast<uint64_t>(tile) * kTile;
      if (count > 0) room = list_held(held, count, segments[current], lists, tile_bit);
      if (__any_sync(kFull, Scores::found_bad(seen, infinity)))
        note_bad<Key, kBase>(item, start, tile_bit, infinity, status);
    }
  }
  if (!kTies && current >= 0) {
    const unsigned sum = __reduce_add_sync(kFull, beyond);
    if (lane == 0 && sum) atomicAdd(&segments[current].beyond, static_cast<unsigned long long>(sum));
  }
}

// ---- 3. narrow, apply ----

__device__ uint64_t last_place(const Segment& s) { return static_cast<uint64_t>(s.last_tile) * kTile - 1; }

// Where the search among the candidates begins.
__device__ Search opened(const Segment& s) {
  const int64_t wanted = s.k - static_cast<int64_t>(s.beyond), found = static_cast<int64_t>(s.candidates);
  if (wanted < 0 || wanted > found || found > s.capacity) return {0, wanted, 0, kFailed};
  if (wanted == 0 || wanted == found) return {0, wanted, 0, kDecided};
  const int length = bit_length(s.above - s.from - 1);
  return length
             ? Search{0, wanted, length, kByKey}
             : Search{0, wanted, bit_length(static_cast<uint64_t>(s.last_tile - s.first_tile) * kTile - 1), kByPlace};
}

template <typename Key>
__global__ void __launch_bounds__(kThreads) narrow_kernel(Segment* segments, const Lists<Key> lists, Counter* counters,
                                                          int blocks_each, int round, Status* status) {
  __shared__ unsigned bins[kBins];
  Segment& segment = segments[blockIdx.x / blocks_each];
  const int block = blockIdx.x % blocks_each;
  Search search = round == 0 ? opened(segment) : segment.search;
  if (round > 0 && search.phase >= kDecided) return;
  Counter* mine = counters + int64_t{blockIdx.x / blocks_each} * 2 * kBins;
  const Key* keys = lists.keys + segment.list_at;
  const uint64_t* places = lists.places + segment.list_at;
  const uint64_t last = last_place(segment);
  const int64_t n = static_cast<int64_t>(segment.candidates);
  if (search.phase < kDecided && block * int64_t{kThreads} < n) {
    clear_bins(bins, kBins);
    for (int64_t i = block * int64_t{kThreads} + threadIdx.x; i < n; i += blocks_each * int64_t{kThreads}) {
      uint64_t value = keys[i] - segment.from;
      if (search.phase == kByPlace) {
        if (value != segment.cut_key) continue;
        value = last - places[i];
      }
      if (takes_part(value, search)) atomicAdd(&bins[digit_of(value, search)], 1u);
    }
    add_bins(bins, mine, kBins);
  }
  if (!last_block(&segment.done, blocks_each)) return;
  uint64_t cut_key = segment.cut_key, cut_place = 0;
  int64_t quota = segment.quota;
  if (search.phase >= kDecided) {
    cut_key = search.remaining == 0 ? ~uint64_t{0} : 0;
    if (search.phase == kFailed && threadIdx.x == 0) {
      const bool single = search.remaining >= 0 && search.remaining <= static_cast<int64_t>(segment.candidates) &&
                          segment.above == segment.from + 1;
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
      search = {0, search.remaining,
                bit_length(static_cast<uint64_t>(segment.last_tile - segment.first_tile) * kTile - 1), kByPlace};
    }
  }
  if (threadIdx.x == 0) {
    segment.search = search, segment.cut_key = cut_key, segment.cut_place = cut_place, segment.quota = quota;
  }
}

template <typename Key>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(const Bits bits, const Segment* __restrict__ segments, const Lists<Key> lists, int blocks_each) {
  const Segment& segment = segments[blockIdx.x / blocks_each];
  if (segment.search.phase == kFailed) return;
  const uint64_t last = last_place(segment), cut_key = segment.cut_key, cut_place = segment.cut_place;
  const int64_t n = static_cast<int64_t>(segment.candidates);
  for (int64_t i = blockIdx.x % blocks_each * int64_t{kThreads} + threadIdx.x; i < n;
       i += blocks_each * int64_t{kThreads}) {
    const uint64_t key = lists.keys[segment.list_at + i] - segment.from;
    if (key > cut_key) continue;
    const uint64_t place = lists.places[segment.list_at + i];
    if (key == cut_key && last - place >= cut_place) continue;
    atomicAnd(bits.words + place / 32, ~(1u << place % 32));
    atomicSub(bits.counts + place / kTile, 1u);
  }
}

}  // namespace
}  // namespace deftx
