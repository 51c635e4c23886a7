// Visiting the entries of a mask with their rows, by a whole grid, and finding entries in another mask's row.
#pragma once

#include "rows.cuh"

namespace deftx {

constexpr int kThreads = 256;
constexpr int kItems = 8;  // entries per thread and tile
constexpr int kTile = kThreads * kItems;
constexpr int kRows = 1024;  // rows of a tile that fit in shared memory; sparser tiles search crow_indices itself

template <typename Column>
struct Mask {
  const int64_t* crow;  // [rows + 1]
  const Column* col;    // [nnz]
  int64_t rows, nnz;
};

// The rows of a tile, in shared memory.
struct Tile {
  int64_t ends[2];    // the rows of its first and of its last entry
  int offset[kRows];  // where a row's entries begin, counted from the tile's first entry
};

// By the whole grid: calls visit(entry, its row) for the entries of a mask and, with row -1, for those that the last
// tile lacks. All threads of a warp call it together, for 32 entries in a row.
template <typename Column, typename Visit>
__device__ void for_each_entry(const Mask<Column>& mask, const Visit& visit) {
  __shared__ Tile tile;
  for (int64_t begin = int64_t{blockIdx.x} * kTile; begin < mask.nnz; begin += int64_t{gridDim.x} * kTile) {
    const int64_t end = min(begin + kTile, mask.nnz);
    __syncthreads();  // the tile before this one has been read
    if (threadIdx.x < 64) {
      const int which = threadIdx.x / 32;
      const int64_t row = find_row_by_warp(mask.crow, 0, mask.rows, which ? end - 1 : begin);
      if (threadIdx.x % 32 == 0) tile.ends[which] = row;
    }
    __syncthreads();
    const int64_t first = tile.ends[0], count = tile.ends[1] - first + 1;
    if (count <= kRows) {
      for (int r = threadIdx.x; r < count; r += kThreads)
        tile.offset[r] = static_cast<int>(max(mask.crow[first + r] - begin, int64_t{-1}));
      __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t entry = begin + k * kThreads + threadIdx.x;
      int64_t row = -1;
      if (entry < end)
        row = count <= kRows ? first + find_row<int>(tile.offset, 0, count, static_cast<int>(entry - begin))
                             : find_row<int64_t>(mask.crow, first, tile.ends[1] + 1, entry);
      visit(entry, row);
    }
  }
}

static __device__ int64_t clamped(int64_t x, int64_t low, int64_t high) { return min(max(x, low), high); }

struct Place {
  int64_t at;  // the first entry of the row whose column is not less; the row's end if there is none
  bool found;
};

// CSRMask has checked crow_indices; the clamps keep a wrong one from reaching other memory.
template <typename Column>
__device__ Place look_up(const Mask<Column>& mask, int64_t row, Column column) {
  int64_t low = clamped(mask.crow[row], 0, mask.nnz);
  const int64_t end = clamped(mask.crow[row + 1], low, mask.nnz);
  for (int64_t high = end; low < high;) {
    const int64_t middle = (low + high) / 2;
    if (mask.col[middle] < column)
      low = middle + 1;
    else
      high = middle;
  }
  return {low, low < end && mask.col[low] == column};
}

template <typename Kernel>
unsigned blocks_for(Kernel* kernel, int64_t elements, int64_t per_block) {
  return static_cast<unsigned>(
      std::max<int64_t>(1, std::min(resident_blocks(kernel, kThreads), (elements + per_block - 1) / per_block)));
}

}  // namespace deftx
