// Bit masks over a list of tensors, and the CSR structure made from them.
//
// A tensor's elements are cut into tiles of kTile, in order; a tensor begins a tile of its own, and one without
// elements has one too, which holds its empty rows. Element i of a tensor is bit i of the words of its tiles. The
// code that makes the mask also counts each tile's bits. `scan` turns the counts into where a tile's entries begin,
// `emit` writes crow_indices and col_indices: a warp to a tile, the columns through shared memory so that they are
// written in whole sectors.
#pragma once

#include "../stable.h"

namespace deftx {
namespace {  // one in every source file: kernels of the same name do not clash when the library is linked

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 4096;         // elements
constexpr int kWords = kTile / 32;  // of a tile: four to a lane
constexpr int kChunk = 2048;        // tiles that one block scans
constexpr int kStage = kTile / 4;   // entries of a tile that fit in a warp's shared memory
constexpr unsigned kFull = 0xffffffffu;
constexpr int64_t kMaxColumns = 2'147'483'647;
constexpr int64_t kMaxNarrowColumns = 65'536;  // uint16 columns up to here

// One tensor of the list.
struct Item {
  const void* a;
  const void* b;  // null where there is no base
  int64_t numel, rows, columns;
  int64_t first_tile, first_row, first_element;  // among all tensors
  int64_t k;                                     // entries of each row, where rows are selected one by one
  int32_t a_type, b_type;                        // enum Type of scores.cuh
  int32_t segment;
};

// Everything a kernel needs to know of the mask. Device memory.
struct Bits {
  const Item* items;      // [count]
  uint32_t* words;        // [tiles * kWords]
  uint32_t* counts;       // [tiles] bits; after scan: bits before, within the chunk
  int64_t* chunk_before;  // [chunks + 1] bits before the chunk
  unsigned* chunks_done;  // 0
  int64_t tiles, rows;
  int count;

  __host__ __device__ int64_t chunks() const { return (tiles + kChunk - 1) / kChunk; }
};

template <int64_t Item::* first>
__device__ int find_item(const Item* __restrict__ items, int count,
                         int64_t at) {  // by one whole warp, 32 probes at a time
  const int lane = threadIdx.x % 32;
  int low = 0, high = count;  // the last item whose `first` is not beyond `at`
  while (high - low > 1) {
    const int step = (high - low + 31) / 32, probe = low + lane * step;
    const unsigned at_or_before = __ballot_sync(kFull, probe < high && items[probe].*first <= at);
    low += (at_or_before ? 31 - __clz(at_or_before) : 0) * step;
    high = min(high, low + step);
  }
  return low;
}

template <typename T>
__device__ T warp_inclusive(T value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const T other = __shfl_up_sync(kFull, value, d);
    if (lane >= d) value += other;
  }
  return value;
}

// The sum over the threads before this one, and over all of a block of kThreads. Every thread of the block takes part.
template <typename T>
__device__ T block_exclusive(T value, T& total) {
  __shared__ T sums[kWarps];
  const T inclusive = warp_inclusive(value);
  __syncthreads();  // the sums of a call before this one have been read
  if (threadIdx.x % 32 == 31) sums[threadIdx.x / 32] = inclusive;
  __syncthreads();
  T before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < static_cast<int>(threadIdx.x / 32)) before += sums[w];
    total += sums[w];
  }
  return before + inclusive - value;
}

// By the whole block: whether it is the last of `blocks` to come here. What the others wrote before can then be read
// (by __ldcg).
__device__ bool last_block(unsigned* done, unsigned blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(done, 1u) == blocks - 1;
    if (last) *done = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// counts -> the sum of the counts before, within a chunk; chunk_before. One block to a chunk.
__global__ void __launch_bounds__(kThreads) scan_kernel(uint32_t* counts,       // [tiles]
                                                        int64_t* chunk_before,  // [gridDim.x + 1]
                                                        unsigned* done, int64_t tiles) {
  constexpr int kEach = kChunk / kThreads;
  const int64_t first = blockIdx.x * int64_t{kChunk} + threadIdx.x * kEach;
  uint32_t mine[kEach], sum = 0, total;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    mine[i] = first + i < tiles ? counts[first + i] : 0;
    sum += mine[i];
  }
  uint32_t before = block_exclusive(sum, total);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (first + i < tiles) counts[first + i] = before;
    before += mine[i];
  }
  if (threadIdx.x == 0) chunk_before[blockIdx.x] = total;
  if (!last_block(done, gridDim.x)) return;
  int64_t carry = 0;
  for (int64_t at = 0; at < gridDim.x; at += kThreads) {
    const int64_t c = at + threadIdx.x;
    int64_t chunk_total;
    const int64_t chunk = block_exclusive<int64_t>(c < gridDim.x ? __ldcg(chunk_before + c) : 0, chunk_total);
    if (c < gridDim.x) chunk_before[c] = carry + chunk;
    carry += chunk_total;
  }
  if (threadIdx.x == 0) chunk_before[gridDim.x] = carry;
}

__device__ int64_t bits_before(const uint32_t* counts, const int64_t* chunk_before, int64_t tile) {
  return chunk_before[tile / kChunk] + counts[tile];
}

// The columns of a word's bits into `stage`. `column` is the column of bit 0.
template <typename Column>
__device__ int stage_columns(Column* stage, int place, uint32_t word, uint32_t column, uint32_t columns) {
  for (; word; word &= word - 1) {
    uint32_t c = column + __ffs(word) - 1;
    if (c >= columns) c = columns >= 32 ? c - columns : c % columns;
    stage[place++] = static_cast<Column>(c);
  }
  return place;
}

template <typename Column>
__global__ void __launch_bounds__(kThreads) emit_kernel(const Bits bits, int64_t* __restrict__ crow,  // [rows + 1]
                                                        Column* __restrict__ col,                     // [nnz]
                                                        int64_t nnz) {
  __shared__ Column stages[kWarps][kStage];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Column* stage = stages[warp];
  for (int64_t tile = blockIdx.x * int64_t{kWarps} + warp; tile < bits.tiles; tile += gridDim.x * int64_t{kWarps}) {
    const Item& item = bits.items[find_item<&Item::first_tile>(bits.items, bits.count, tile)];
    const uint32_t* words = bits.words + tile * kWords;
    const uint4 mine = reinterpret_cast<const uint4*>(words)[lane];
    const int count = __popc(mine.x) + __popc(mine.y) + __popc(mine.z) + __popc(mine.w);
    const int inclusive = warp_inclusive(count), before = inclusive - count, total = __shfl_sync(kFull, inclusive, 31);
    const int64_t out = bits_before(bits.counts, bits.chunk_before, tile);
    const int64_t start = (tile - item.first_tile) * kTile, end = min(start + kTile, item.numel),
                  columns = item.columns;
    if (tile == bits.tiles - 1 && lane == 0) crow[bits.rows] = out + total;
    if (columns == 0) {
      for (int64_t r = lane; r < item.rows; r += 32) crow[item.first_row + r] = out;
    }
    if (item.numel == 0) continue;
    const int64_t row =
        (start | columns) >> 32 ? start / columns : static_cast<uint32_t>(start) / static_cast<uint32_t>(columns);
    const uint32_t column = static_cast<uint32_t>(start - row * columns), width = static_cast<uint32_t>(columns);
    for (int64_t r = row + (column > 0); r * columns < end; r += 32) {  // rows that begin in this tile
      const bool begins = (r + lane) * columns < end;
      const int at = begins ? static_cast<int>((r + lane) * columns - start) : 0;
      int rank = __shfl_sync(kFull, before, at / 128);
      for (int w = at / 128 * 4; w < at / 32; ++w) rank += __popc(words[w]);
      rank += __popc(words[at / 32] & ((1u << at % 32) - 1));
      if (begins) crow[item.first_row + r + lane] = out + rank;
    }
    // Up to kStage entries at once, each lane four words in a row; else kStage elements at a time, each lane one word.
    const int batches = total <= kStage ? 1 : kTile / kStage;
    int64_t to = out;
    for (int batch = 0; batch < batches; ++batch) {
      int staged = total, place = before;
      __syncwarp();  // the batch before has been written out
      if (batches == 1) {
        uint32_t c = (column + lane * 128) % width;
        const uint32_t four[4] = {mine.x, mine.y, mine.z, mine.w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          place = stage_columns(stage, place, four[w], c, width);
          c += 32;
          if (c >= width) c = width >= 32 ? c - width : c % width;
        }
      } else {
        const uint32_t word = words[batch * 32 + lane];
        const int through = warp_inclusive(__popc(word));
        staged = __shfl_sync(kFull, through, 31);
        stage_columns(stage, through - __popc(word), word, (column + (batch * 32 + lane) * 32) % width, width);
      }
      __syncwarp();
      for (int i = lane; i < staged; i += 32) {
        if (to + i < nnz) col[to + i] = stage[i];
      }
      to += staged;
    }
  }
}

// Counts the bits of masks that were made in no order.
__global__ void __launch_bounds__(kThreads) count_kernel(const Bits bits) {
  const int lane = threadIdx.x % 32;
  for (int64_t tile = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32; tile < bits.tiles;
       tile += gridDim.x * int64_t{kWarps}) {
    const uint4 mine = reinterpret_cast<const uint4*>(bits.words + tile * kWords)[lane];
    const unsigned count = __reduce_add_sync(kFull, __popc(mine.x) + __popc(mine.y) + __popc(mine.z) + __popc(mine.w));
    if (lane == 0) bits.counts[tile] = count;
  }
}

// The list of tensors, on the host.
struct Layout {
  std::vector<Item> items;
  int64_t tiles = 0, rows = 0, elements = 0;
  bool wide = false;
};

Layout layout_of(const std::vector<Tensor>& tensors, const char* op) {
  DEFTX_CHECK(!tensors.empty(), op, " needs at least one tensor");
  Layout layout;
  layout.items.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    check_tensor(t, Device::kCuda, "every tensor");
    DEFTX_CHECK(t.get_device_index() == tensors[0].get_device_index(), "tensor ", i,
                " is on another device than tensor 0");
    Item item{};
    item.a = t.const_data_ptr();
    item.numel = t.numel(), item.rows = rows_of(t), item.columns = columns_of(t);
    DEFTX_CHECK(item.columns <= kMaxColumns, "tensor ", i, " has ", item.columns, " columns; at most ", kMaxColumns,
                " are supported");
    item.first_tile = layout.tiles, item.first_row = layout.rows, item.first_element = layout.elements;
    layout.tiles += std::max<int64_t>(1, (item.numel + kTile - 1) / kTile);
    layout.rows = add_rows(layout.rows, item.rows);
    layout.elements += item.numel;
    layout.wide = layout.wide || item.columns > kMaxNarrowColumns;
    layout.items.push_back(item);
  }
  return layout;
}

// One allocation, handed out in pieces: first `add` each piece, then `allocate`, then `at`.
class Workspace {
 public:
  int64_t add(int64_t bytes) {
    const int64_t offset = bytes_;
    bytes_ += (bytes + 255) / 256 * 256;
    return offset;
  }
  void allocate(const Tensor& like) {
    memory_ = torch::stable::new_empty(like, {bytes_}, torch::headeronly::ScalarType::Byte);
  }
  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(const_cast<void*>(memory_.const_data_ptr())) + offset);
  }

 private:
  int64_t bytes_ = 0;
  Tensor memory_;
};

// Where the pieces of Bits lie in a workspace.
struct BitsPlan {
  int64_t items, words, counts, chunk_before, chunks_done;
  BitsPlan(Workspace& work, const Layout& layout)
      : items(work.add(sizeof(Item) * layout.items.size())),
        words(work.add(sizeof(uint32_t) * kWords * layout.tiles)),
        counts(work.add(sizeof(uint32_t) * layout.tiles)),
        chunk_before(work.add(sizeof(int64_t) * ((layout.tiles + kChunk - 1) / kChunk + 1))),
        chunks_done(work.add(sizeof(unsigned))) {}

  Bits upload(const Workspace& work, const Layout& layout, cudaStream_t stream) const {
    refuse_capture(stream);
    Item* table = work.at<Item>(items);
    DEFTX_CUDA_CHECK(cudaMemcpyAsync(table, layout.items.data(), sizeof(Item) * layout.items.size(),
                                     cudaMemcpyHostToDevice, stream));
    DEFTX_CUDA_CHECK(cudaMemsetAsync(work.at<unsigned>(chunks_done), 0, sizeof(unsigned), stream));
    return {table,
            work.at<uint32_t>(words),
            work.at<uint32_t>(counts),
            work.at<int64_t>(chunk_before),
            work.at<unsigned>(chunks_done),
            layout.tiles,
            layout.rows,
            static_cast<int>(layout.items.size())};
  }
};

// The grid of a kernel that takes a warp to a tile.
template <typename Kernel>
unsigned grid_of(Kernel* kernel, const Bits& bits) {
  return static_cast<unsigned>(std::min(resident_blocks(kernel, kThreads), (bits.tiles + kWarps - 1) / kWarps));
}

void scan(const Bits& bits, uint32_t* counts, int64_t* chunk_before, cudaStream_t stream) {
  scan_kernel<<<static_cast<unsigned>(bits.chunks()), kThreads, 0, stream>>>(counts, chunk_before, bits.chunks_done,
                                                                             bits.tiles);
  DEFTX_LAUNCH_CHECK();
}

void scan(const Bits& bits, cudaStream_t stream) { scan(bits, bits.counts, bits.chunk_before, stream); }

struct CsrOut {
  Tensor crow, col;
};

CsrOut new_csr(const Tensor& like, const Layout& layout, int64_t nnz) {
  using torch::headeronly::ScalarType;
  return {torch::stable::new_empty(like, {layout.rows + 1}, ScalarType::Long),
          torch::stable::new_empty(like, {nnz}, layout.wide ? ScalarType::Int : ScalarType::UInt16)};
}

// After scan. Never writes outside `out`, even where the mask holds another number of bits.
void emit(const Bits& bits, const CsrOut& out, bool wide, cudaStream_t stream) {
  int64_t* crow = static_cast<int64_t*>(out.crow.mutable_data_ptr());
  const int64_t nnz = out.col.numel();
  void* col = const_cast<void*>(out.col.const_data_ptr());
  if (wide) {
    emit_kernel<<<grid_of(emit_kernel<int32_t>, bits), kThreads, 0, stream>>>(bits, crow, static_cast<int32_t*>(col),
                                                                              nnz);
  } else {
    emit_kernel<<<grid_of(emit_kernel<uint16_t>, bits), kThreads, 0, stream>>>(bits, crow, static_cast<uint16_t*>(col),
                                                                               nnz);
  }
  DEFTX_LAUNCH_CHECK();
}

// For masks whose size the host does not know: waits for the scan, then as `emit`.
CsrOut emit_counted(const Bits& bits, const Layout& layout, const Tensor& like, cudaStream_t stream) {
  scan(bits, stream);
  int64_t nnz = 0;
  DEFTX_CUDA_CHECK(
      cudaMemcpyAsync(&nnz, bits.chunk_before + bits.chunks(), sizeof nnz, cudaMemcpyDeviceToHost, stream));
  DEFTX_CUDA_CHECK(cudaStreamSynchronize(stream));
  const CsrOut out = new_csr(like, layout, nnz);
  emit(bits, out, layout.wide, stream);
  return out;
}

}  // namespace
}  // namespace deftx
