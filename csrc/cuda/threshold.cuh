// Masks by a threshold: keys above it, and of those equal to it the first few. With the radix select over all scores
// that finds the threshold where a bracket did not.
#pragma once

#include "stream.cuh"

namespace deftx {
namespace {

// For each segment the threshold (from), what is above it, and how many ties to choose; or, where some bracket missed,
// the start of a radix select over all scores.
template <typename Key>
__global__ void restart_kernel(const SegmentPlan* __restrict__ plans, SegmentState* states, int count, bool missed) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const SegmentPlan& plan = plans[i];
  SegmentState& s = states[i];
  if (missed) {
    const bool search = plan.k > 0 && plan.k < plan.elements;
    if (!search) s.from = s.above = plan.k == 0 ? uint64_t{1} << KeyOf<Key>::kBits : 0;
    s.search = {0, plan.k, KeyOf<Key>::kBits, search ? kByKey : kDecided};
    s.quota = 0;
  } else if (s.search.phase == kFailed) {
    s.quota = plan.k - static_cast<int64_t>(s.beyond);
  } else if (s.cut_key == ~uint64_t{0}) {
    s.from = s.above, s.quota = 0;
  } else {
    s.from += s.cut_key;
    s.above = s.from + (s.quota > 0);
  }
}

template <typename Key, bool kBase>
__global__ void __launch_bounds__(kThreads, sizeof(Key) == 8 ? 2 : 3)
    count_all_kernel(const Bits bits, const SegmentPlan* __restrict__ plans, const SegmentState* __restrict__ states,
                     int first_segment, int count,
                     Counter* counters) {  // [count][2][kBins], of the segments from first_segment on
  __shared__ unsigned bins[kBins];
  constexpr int kGroups = KeyOf<Key>::kGroups;
  const int64_t begin = plans[first_segment].first_tile, tiles = plans[first_segment + count - 1].last_tile - begin;
  const int64_t last_tile = begin + tiles * (blockIdx.x + int64_t{1}) / gridDim.x;
  for (int64_t tile = begin + tiles * int64_t{blockIdx.x} / gridDim.x; tile < last_tile;) {
    const int s = bits.items[find_item<&Item::first_tile>(bits.items, bits.count, tile)].segment;
    const int64_t end = min(last_tile, plans[s].last_tile);
    const Search search = states[s].search;
    if (search.phase != kDecided) {
      clear_bins(bins, kBins);
      for (int64_t t = tile + threadIdx.x / 32; t < end; t += kWarps) {
        const Item item = bits.items[find_item<&Item::first_tile>(bits.items, bits.count, t)];
        const int64_t start = (t - item.first_tile) * kTile;
        for (int at = 0; at < kTile && start + at < item.numel; at += kGroups * 256) {
          const int64_t mine = start + at + threadIdx.x % 32 * 8;
          WordOf<Key> keys[kGroups][8];
          load_keys<Key, kBase>(keys, item, mine);
#pragma unroll
          for (int g = 0; g < kGroups; ++g) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              if (mine + g * 256 + j < item.numel && takes_part(keys[g][j], search)) {
                atomicAdd(&bins[digit_of(keys[g][j], search)], 1u);
              }
            }
          }
        }
      }
      add_bins(bins, counters + int64_t{s - first_segment} * 2 * kBins, kBins);
      __syncthreads();
    }
    tile = end;
  }
}

__global__ void __launch_bounds__(kThreads) pick_kernel(SegmentState* states, Counter* counters) {
  SegmentState& segment = states[blockIdx.x];
  Search search = segment.search;
  if (search.phase == kDecided) return;
  const Pick p = pick_digit(counters + int64_t{blockIdx.x} * 2 * kBins, search.remaining, true);
  advance(search, p);
  const bool all = p.count == search.remaining;
  if (all || search.high == 0) search.phase = kDecided;
  if (threadIdx.x != 0) return;
  segment.search = search;
  if (search.phase == kDecided) {
    segment.from = search.prefix << search.high;
    segment.above = all ? segment.from : segment.from + 1;
    segment.quota = all ? 0 : search.remaining;
  }
}

// Stores a tile's bits of the keys from `from` on, and counts them and those below `above`, of this lane.
template <typename Key, bool kBase, bool kWhole>
__device__ __forceinline__ void mark_tile(const Item& item, int64_t start, uint8_t* bytes, uint64_t from,
                                          uint64_t above, unsigned& chosen, unsigned& tied) {
  constexpr int kEights = kTileEights<Key, kBase, kAnyType, kWhole>;
  using Scores = Eights<Key, kBase, kWhole, kEights>;
  const typename Scores::Limit low = Scores::limit(from), high = Scores::limit(above);
#pragma unroll 1
  for (int at = 0; at < kTile; at += kEights * 256) {
    if (!kWhole && start + at >= item.numel) {
#pragma unroll
      for (int g = 0; g < kEights; ++g) bytes[at / 8 + g * 32] = 0;
      continue;
    }
    const int64_t mine = start + at + threadIdx.x % 32 * 8;
    const Scores scores(item, mine);
#pragma unroll
    for (int g = 0; g < kEights; ++g) {
      uint32_t set = scores.not_below(g, low);
      if (!kWhole) set &= valid_bits(item, mine + g * 256);
      bytes[at / 8 + g * 32] = static_cast<uint8_t>(set);
      chosen += __popc(set);
      tied += __popc(set & ~scores.not_below(g, high));
    }
  }
}

// The bits of the keys from each segment's threshold on; in each tile the number of them, and of the ties.
template <typename Key, bool kBase>
__global__ void __launch_bounds__(kThreads, kStreamBlocks<Key, kBase, kAnyType>)
    threshold_kernel(const Bits bits, const SegmentState* __restrict__ states, uint32_t* ties) {  // [tiles]
  const int lane = threadIdx.x % 32;
  for_each_tile(bits, [&](int64_t tile, int index) {
    const Item item = with_type<Key, kAnyType>(bits.items[index]);  // a copy, as in stream_kernel
    const int64_t start = (tile - item.first_tile) * kTile;
    const uint64_t from = states[item.segment].from, above = states[item.segment].above;
    uint8_t* bytes = reinterpret_cast<uint8_t*>(bits.words + tile * kWords) + lane;
    unsigned chosen = 0, tied = 0;
    if (is_whole(item, start)) {
      mark_tile<Key, kBase, true>(item, start, bytes, from, above, chosen, tied);
    } else {
      mark_tile<Key, kBase, false>(item, start, bytes, from, above, chosen, tied);
    }
    chosen = __reduce_add_sync(kFull, chosen);
    tied = __reduce_add_sync(kFull, tied);
    if (lane == 0) bits.counts[tile] = chosen, ties[tile] = tied;
  });
}

// Takes the ties beyond the quota out of the mask: of each segment the last ones.
template <typename Key, bool kBase>
__global__ void __launch_bounds__(kThreads, sizeof(Key) == 8 ? 2 : 3)
    trim_kernel(const Bits bits, const SegmentPlan* __restrict__ plans, const SegmentState* __restrict__ states,
                const uint32_t* __restrict__ ties,             // scanned
                const int64_t* __restrict__ ties_of_chunks) {  // scanned
  constexpr int kGroups = KeyOf<Key>::kGroups;
  const int lane = threadIdx.x % 32;
  for (int64_t tile = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32; tile < bits.tiles;
       tile += gridDim.x * int64_t{kWarps}) {
    const Item item = bits.items[find_item<&Item::first_tile>(bits.items, bits.count, tile)];
    const SegmentState& segment = states[item.segment];
    const int64_t before = bits_before(ties, ties_of_chunks, tile);
    const int64_t after =
        tile + 1 < bits.tiles ? bits_before(ties, ties_of_chunks, tile + 1) : ties_of_chunks[bits.chunks()];
    const int64_t allowed =
        segment.quota - (before - bits_before(ties, ties_of_chunks, plans[item.segment].first_tile));
    if (after - before <= max(allowed, int64_t{0})) continue;
    const WordOf<Key> from = static_cast<WordOf<Key>>(segment.from), above = static_cast<WordOf<Key>>(segment.above);
    const int64_t start = (tile - item.first_tile) * kTile;
    uint8_t* bytes = reinterpret_cast<uint8_t*>(bits.words + tile * kWords) + lane;
    int64_t seen = 0;
    unsigned removed = 0;
    for (int at = 0; at < kTile && start + at < item.numel; at += kGroups * 256) {
      const int64_t mine = start + at + lane * 8;
      WordOf<Key> keys[kGroups][8];
      load_keys<Key, kBase>(keys, item, mine);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        uint32_t tied = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const bool tie = mine + g * 256 + j < item.numel && keys[g][j] >= from && keys[g][j] < above;
          tied |= static_cast<uint32_t>(tie) << j;
        }
        const int through = warp_inclusive(__popc(tied));
        int64_t rank = seen + through - __popc(tied);
        uint32_t excess = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (tied >> j & 1) excess |= static_cast<uint32_t>(rank++ >= allowed) << j;
        }
        seen += __shfl_sync(kFull, through, 31);
        if (excess) bytes[at / 8 + g * 32] &= static_cast<uint8_t>(~excess);
        removed += __popc(excess);
      }
    }
    removed = __reduce_add_sync(kFull, removed);
    if (lane == 0) bits.counts[tile] -= removed;
  }
}

// The mask from each segment's threshold (from, above, quota): bits, ties in each tile, and no more of them than the
// quota.
template <typename Key, bool kBase>
void mask_by_threshold(const Bits& bits, const SegmentPlan* plans, const SegmentState* states, const Tensor& like,
                       cudaStream_t stream) {
  Workspace work;
  const int64_t ties_at = work.add(sizeof(uint32_t) * bits.tiles),
                chunks_at = work.add(sizeof(int64_t) * (bits.chunks() + 1));
  work.allocate(like);
  uint32_t* ties = work.at<uint32_t>(ties_at);
  int64_t* ties_of_chunks = work.at<int64_t>(chunks_at);
  threshold_kernel<Key, kBase>
      <<<grid_of(threshold_kernel<Key, kBase>, bits), kThreads, 0, stream>>>(bits, states, ties);
  DEFTX_LAUNCH_CHECK();
  scan(bits, ties, ties_of_chunks, stream);
  trim_kernel<Key, kBase>
      <<<grid_of(trim_kernel<Key, kBase>, bits), kThreads, 0, stream>>>(bits, plans, states, ties, ties_of_chunks);
  DEFTX_LAUNCH_CHECK();
}

}  // namespace
}  // namespace deftx
