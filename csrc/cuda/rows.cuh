// Finding the row of a mask's entry in crow_indices.
#pragma once

#include "../stable.h"

namespace deftx {

constexpr unsigned kFull = 0xffffffffu;

// The row of an entry: the last r in [low, high) with crow[r] <= entry. By one whole warp, 32 probes at a time: four
// dependent reads for a million rows.
static __device__ int64_t find_row_by_warp(const int64_t* __restrict__ crow, int64_t low, int64_t high, int64_t entry) {
  const int lane = threadIdx.x % 32;
  while (high - low > 1) {
    const int64_t step = (high - low + 31) / 32;
    const int64_t probe = low + lane * step;
    const unsigned at_or_before = __ballot_sync(kFull, probe < high && crow[probe] <= entry);
    const int last = at_or_before ? 31 - __clz(at_or_before) : 0;
    low += last * step;
    high = min(high, low + step);
  }
  return low;
}

template <typename Offset>
__device__ int64_t find_row(const Offset* crow, int64_t low, int64_t high, Offset entry) {
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (crow[middle] <= entry ? low : high) = middle;
  }
  return low;
}

}  // namespace deftx
