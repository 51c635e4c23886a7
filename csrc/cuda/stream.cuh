// One pass over the scores against the bracket of each segment: step 2 of topk.cu, on the device.
//
// A warp takes a tile at a time, 256 scores at once, eight to a lane. It stores a bit for each score that is not below
// the bracket, a byte a lane, and remembers in which eights some score may lie inside the bracket (about 20 of a tile's
// 512). At the end of the tile these are compacted, a lane to each, and looked at again: their bytes are still in the
// L2 cache. What is above the bracket follows from the two counts.
#pragma once

#include "bracket.cuh"
#include "classify.cuh"

namespace deftx {
namespace {

// A tile that lies in its tensor as a whole, and in an aligned one, needs no bounds.
__device__ bool is_whole(const Item& item, int64_t start) {
  return start + kTile <= item.numel && is_aligned(item.a) && is_aligned(item.b);
}

// The item, with types that the compiler knows where all tensors of the call have one. Of 16 bits there is one kind of
// key.
template <typename Key, int kType>
__device__ Item with_type(Item item) {
  if constexpr (sizeof(Key) == 2) {
    item.a_type = kBFloat16;
  } else if constexpr (kType != kAnyType) {
    item.a_type = item.b_type = kType;
  }
  return item;
}

// The tiles of a block, which lie next to each other, so that a warp seldom enters another tensor. Calls
// run(tile, index of the tensor) by whole warps.
template <typename Run>
__device__ __forceinline__ void for_each_tile(const Bits& bits, const Run& run) {
  const int64_t last = bits.tiles * (blockIdx.x + int64_t{1}) / gridDim.x;
  int64_t end = 0;  // of the tensor
  int index = 0;
  for (int64_t tile = bits.tiles * int64_t{blockIdx.x} / gridDim.x + threadIdx.x / 32; tile < last; tile += kWarps) {
    if (tile >= end) {
      index = find_item<&Item::first_tile>(bits.items, bits.count, tile);
      end = index + 1 < bits.count ? bits.items[index + 1].first_tile : bits.tiles;
    }
    run(tile, index);
  }
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

// Whether the tiles that need no bounds have code of their own: not where types are looked up.
template <typename Key, int kType>
constexpr bool kHasWhole = sizeof(Key) == 2 || kType != kAnyType;

// Eights that a lane loads at once, and blocks for a multiprocessor: as many as the registers allow.
template <typename Key, bool kBase, int kType, bool kWhole>
constexpr int kTileEights = kHasWhole<Key, kType> && !kWhole                  ? 1
                            : sizeof(Key) == 4 && !kBase && kType == kFloat32 ? 4
                                                                              : KeyOf<Key>::kGroups;
template <typename Key, bool kBase, int kType>
constexpr int kStreamBlocks = (sizeof(Key) == 8 ? 2
                               : kBase          ? 3
                                                : 4) -
                              (sizeof(Key) == 4 && kType == kAnyType);

// A warp in the pass. An eight is hit where one of its scores may lie inside the bracket.
template <typename Key, bool kBase, int kType>
struct Stream {
  using Word = WordOf<Key>;
  using Bracket = typename FiniteEights<Key, kBase, true, 1>::Bracket;
  using Worst = typename FiniteEights<Key, kBase, true, 1>::Worst;

  const Bits& bits;
  const SegmentPlan* plans;
  SegmentState* states;
  const Lists<Key>& lists;
  uint16_t* queue;  // [kTile / 8], in shared memory
  int lane;
  int current = -1;  // segment
  bool room = true;  // in its list
  unsigned beyond = 0;
  Bracket bracket{};

  __device__ void leave_segment() {
    if (current >= 0 && lane == 0 && beyond) {
      atomicAdd(&states[current].beyond, static_cast<unsigned long long>(beyond));
    }
  }
  __device__ void enter_segment(int segment) {
    leave_segment();
    current = segment, beyond = 0, room = true;
    bracket = Bracket(states[segment].from, states[segment].above);
  }

  // Stores the tile's bits, and counts this lane's. Returns a bit for each of its eights that was hit.
  template <bool kWhole>
  __device__ uint32_t classify(const Item& item, int64_t start, uint8_t* bytes, unsigned& chosen, Worst& worst) const {
    constexpr int kEights = kTileEights<Key, kBase, kType, kWhole>;
    uint32_t hits = 0;
#pragma unroll 1
    for (int at = 0; at < kTile; at += kEights * 256) {
      hits >>= kEights;
      if (!kWhole && start + at >= item.numel) {
#pragma unroll
        for (int g = 0; g < kEights; ++g) bytes[at / 8 + g * 32] = 0;
        continue;
      }
      const int64_t mine = start + at + lane * 8;
      const FiniteEights<Key, kBase, kWhole, kEights> scores(item, mine);
      uint32_t set = 0;  // the last eight's bits come last
#pragma unroll
      for (int g = 0; g < kEights; ++g) {
        const bool hit = scores.classify(g, bracket, set, worst);
        if (!kWhole) set &= ~0xFFu | valid_bits(item, mine + g * 256);
        bytes[at / 8 + g * 32] = static_cast<uint8_t>(set);
        if (hit) hits |= 1u << (kTile / 256 - kEights + g);
      }
      chosen += __popc(set);
    }
    return hits;
  }

  // The places of the eights that were hit, as multiples of eight within the tile, to the queue. Returns how many.
  __device__ int compact(uint32_t hits) const {
    const int mine = __popc(hits), through = warp_inclusive(mine);
    for (int at = through - mine; hits; hits &= hits - 1) {
      queue[at++] = static_cast<uint16_t>((__ffs(hits) - 1) * 32 + lane);
    }
    __syncwarp();
    return __shfl_sync(kFull, through, 31);
  }

  // Lists the scores of this lane's eight that are marked. Returns how many the warp has.
  __device__ int list(const Item& item, int64_t from, uint64_t bit, uint32_t inside) {
    const int mine = __popc(inside), through = warp_inclusive(mine), total = __shfl_sync(kFull, through, 31);
    if (!room || total == 0) return total;
    const SegmentPlan& plan = plans[current];
    unsigned long long at = 0;
    if (lane == 0) at = atomicAdd(&states[current].candidates, static_cast<unsigned long long>(total));
    at = __shfl_sync(kFull, at, 0);
    const int64_t left = plan.capacity - static_cast<int64_t>(at);
    room = total <= left;
    const int fit = static_cast<int>(max(min(left, int64_t{total}), int64_t{0}));
    Key* keys = lists.keys + plan.list_at + at;
    uint64_t* places = lists.places + plan.list_at + at;
    for (int to = through - mine; inside && to < fit; inside &= inside - 1, ++to) {
      const int j = __ffs(inside) - 1;
      keys[to] = static_cast<Key>(load_key<Key, kBase>(item, from + j));
      places[to] = bit + j;
    }
    return total;
  }

  // Lists what lies inside the bracket, of the queue's eights. Returns how many scores.
  template <bool kWhole>
  __device__ unsigned list_queue(const Item& item, int64_t start, uint64_t tile_bit, int queued) {
    using Exact = Eights<Key, kBase, kWhole, 1>;
    const typename Exact::Limit low = Exact::limit(states[current].from), high = Exact::limit(states[current].above);
    unsigned found = 0;
    for (int i = lane; i - lane < queued; i += 32) {
      const int place = i < queued ? queue[i] * 8 : 0;
      uint32_t inside = 0;
      if (i < queued) {
        const Exact scores(item, start + place);
        inside = scores.not_below(0, low) & ~scores.not_below(0, high);
        if (!kWhole) inside &= valid_bits(item, start + place);
      }
      found += list(item, start + place, tile_bit + place, inside);
    }
    __syncwarp();  // the queue has been read
    return found;
  }

  template <bool kWhole>
  __device__ __forceinline__ void take_tile(const Item& item, int64_t tile, int index, Word infinity, Status* status) {
    const int64_t start = (tile - item.first_tile) * kTile;
    const uint64_t tile_bit = static_cast<uint64_t>(tile) * kTile;
    unsigned chosen = 0, found = 0;
    Worst worst{};
    const uint32_t hits =
        classify<kWhole>(item, start, reinterpret_cast<uint8_t*>(bits.words + tile * kWords) + lane, chosen, worst);
    chosen = __reduce_add_sync(kFull, chosen);
    if (lane == 0) bits.counts[tile] = chosen;
    if (__any_sync(kFull, hits)) found = list_queue<kWhole>(item, start, tile_bit, compact(hits));
    beyond += chosen - found;
    if (__any_sync(kFull, (FiniteEights<Key, kBase, true, 1>::found_bad(worst, infinity)))) {
      note_bad<Key, kBase>(bits.items[index], start, tile_bit, infinity, status);
    }
  }
};

// Sets the bits of the scores that are not below their segment's bracket, counts them in each tile, and lists those
// inside it.
template <typename Key, bool kBase, int kType>
__global__ void __launch_bounds__(kThreads, kStreamBlocks<Key, kBase, kType>)
    stream_kernel(const Bits bits, const SegmentPlan* __restrict__ plans, SegmentState* states, const Lists<Key> lists,
                  WordOf<Key> infinity, Status* status) {
  __shared__ uint16_t queues[kWarps][kTile / 8];
  const int lane = threadIdx.x % 32;
  Stream<Key, kBase, kType> stream{bits, plans, states, lists, queues[threadIdx.x / 32], lane};
  for_each_tile(bits, [&](int64_t tile, int index) {
    const Item item = with_type<Key, kType>(bits.items[index]);  // a copy: stores might change what a reference means
    if (item.segment != stream.current) stream.enter_segment(item.segment);
    if (kHasWhole<Key, kType> && is_whole(item, (tile - item.first_tile) * kTile)) {
      stream.template take_tile<true>(item, tile, index, infinity, status);
    } else {
      stream.template take_tile<false>(item, tile, index, infinity, status);
    }
  });
  stream.leave_segment();
}

}  // namespace
}  // namespace deftx
