// bit_diff, flat_exchange_, bit_checksum, bit_checksum_change, set_bits on the GPU.
//
// bit_diff reads the tensors once: each element gets one bit, each tile of kTile elements the number of its ones. The
// counts are added up, the host waits for their sum, which is the size of the result, and the entries of each tile are
// written, a warp to a tile, with values that are read again where there is an entry. The other ops do not wait. The
// tensors' addresses are parameters of the kernels.
#include "../bits.h"
#include "rows.cuh"
#include "scan.cuh"

namespace deftx {
namespace {

using torch::headeronly::ScalarType;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kGroup = 8;                     // elements that a thread compares at once
constexpr int kGroups = 4;                    // of a thread and tile
constexpr int kTile = 32 * kGroup * kGroups;  // elements; a tensor begins a tile of its own
constexpr int kSumTile = kThreads * 4 * 4;    // words of a tile of a checksum: four times 16 bytes for each thread
constexpr int kItems = 8;                     // entries per thread and step
constexpr int kStep = 32 * kItems;            // entries of a warp
constexpr int kTensors = 120;                 // per launch

struct Table {
  void* mine[kTensors];
  const void* theirs[kTensors];
  int64_t size[kTensors];       // elements, or bytes for a checksum
  int64_t first[kTensors + 1];  // [count + 1] tiles, among those of all tensors
  int count;
};
static_assert(sizeof(Table) <= 4000, "a kernel's parameters are limited to 4 KB");

// Calls launch(table, index of its first tensor) for tables of all tensors.
template <typename Launch>
void for_each_table(const std::vector<void*>& mine, const std::vector<void*>& theirs, const std::vector<int64_t>& sizes,
                    int64_t tile, const Launch& launch) {
  int64_t tiles = 0;
  for (size_t at = 0; at < mine.size(); at += kTensors) {
    Table table;
    table.count = static_cast<int>(std::min<size_t>(kTensors, mine.size() - at));
    for (int i = 0; i < table.count; ++i) {
      table.mine[i] = mine[at + i];
      table.theirs[i] = theirs.empty() ? nullptr : theirs[at + i];
      table.size[i] = sizes[at + i];
      table.first[i] = tiles;
      tiles += (table.size[i] + tile - 1) / tile;
    }
    table.first[table.count] = tiles;
    launch(table, static_cast<int64_t>(at));
  }
}

std::vector<void*> data_of(const std::vector<Tensor>& tensors) {
  std::vector<void*> data;
  data.reserve(tensors.size());
  for (const Tensor& t : tensors) data.push_back(const_cast<void*>(t.const_data_ptr()));
  return data;
}

std::vector<int64_t> sizes_of(const std::vector<Tensor>& tensors, int64_t bytes) {
  std::vector<int64_t> sizes;
  sizes.reserve(tensors.size());
  for (const Tensor& t : tensors) sizes.push_back(t.numel() * bytes);
  return sizes;
}

// How many blocks share the work, at most one to each of its parts.
template <typename Kernel>
unsigned blocks_for(Kernel* kernel, int64_t parts) {
  return static_cast<unsigned>(std::max<int64_t>(1, std::min(resident_blocks(kernel, kThreads), parts)));
}

// By a whole block: calls visit(tensor, tile within the tensor, tile among all) for a stretch of the table's tiles,
// `each` at a time, of which this thread takes number `mine`.
template <typename Visit>
__device__ void for_each_tile(const Table& table, int each, int mine, const Visit& visit) {
  const int64_t first = table.first[0], tiles = table.first[table.count] - first;
  const int64_t end = first + tiles * (blockIdx.x + int64_t{1}) / gridDim.x;
  int tensor = 0;
  for (int64_t tile = first + tiles * int64_t{blockIdx.x} / gridDim.x + mine; tile < end; tile += each) {
    if (tile >= table.first[tensor + 1])
      tensor = static_cast<int>(find_row<int64_t>(table.first, tensor, table.count, tile));
    visit(tensor, tile - table.first[tensor], tile);
  }
}

// ---- bit_diff ----

// Elements at ... at + kGroup, 0 beyond the tensor's `size`.
template <typename T>
struct Group {
  T element[kGroup];

  __device__ void load(const void* data, int64_t at, int64_t size) {
    constexpr int kBytes = sizeof(T) == 1 ? 8 : 16;  // of a load
    using Vector = std::conditional_t<sizeof(T) == 1, uint2, uint4>;
    const T* from = static_cast<const T*>(data) + at;
    if (at + kGroup <= size && reinterpret_cast<uintptr_t>(data) % kBytes == 0) {
      union {
        Vector vector[sizeof(element) / kBytes];
        T element[kGroup];
      } loaded;
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(element)) / kBytes; ++i)
        loaded.vector[i] = __ldcs(reinterpret_cast<const Vector*>(from) + i);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) element[i] = loaded.element[i];
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) element[i] = at + i < size ? from[i] : T{0};
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    mark_kernel(const __grid_constant__ Table table, uint8_t* __restrict__ bits,  // [tiles * kTile / 8]
                int64_t* __restrict__ counts) {                                   // [tiles]
  const int lane = threadIdx.x % 32;
  for_each_tile(table, kWarps, threadIdx.x / 32, [&](int tensor, int64_t tile, int64_t number) {
    unsigned bytes[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int64_t at = tile * kTile + (g * 32 + lane) * kGroup;
      Group<T> mine, theirs;
      mine.load(table.mine[tensor], at, table.size[tensor]);
      theirs.load(table.theirs[tensor], at, table.size[tensor]);
      bytes[g] = 0;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) bytes[g] |= (mine.element[i] != theirs.element[i]) << i;
    }
    unsigned count = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      bits[number * (kTile / 8) + g * 32 + lane] = static_cast<uint8_t>(bytes[g]);
      count += __popc(bytes[g]);
    }
    count = __reduce_add_sync(kFull, count);
    if (lane == 0) counts[number] = count;
  });
}

// By a whole warp: the sum of the counts of the lanes before this one.
__device__ int rank_of_lane(int count) {
  int rank = count;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int lower = __shfl_up_sync(kFull, rank, offset);
    if (static_cast<int>(threadIdx.x % 32) >= offset) rank += lower;
  }
  return rank - count;
}

template <typename T, typename Index>
__global__ void __launch_bounds__(kThreads)
    emit_kernel(const __grid_constant__ Table table, const uint32_t* __restrict__ bits,  // [tiles * kTile / 32]
                const int64_t* __restrict__ before,                                      // [tiles + 1]
                Index* __restrict__ indices, T* __restrict__ values) {                   // [nnz]
  static_assert(kTile == 32 * 32, "a word of bits for each lane");
  const int lane = threadIdx.x % 32;
  for_each_tile(table, kWarps, threadIdx.x / 32, [&](int tensor, int64_t tile, int64_t number) {
    int64_t out = before[number];
    if (out == before[number + 1]) return;
    uint32_t word = bits[number * 32 + lane];
    out += rank_of_lane(__popc(word));
    for (; word != 0; word &= word - 1, ++out) {
      const int64_t at = tile * kTile + lane * 32 + __ffs(word) - 1;
      indices[out] = static_cast<Index>(at);
      values[out] = static_cast<const T*>(table.mine[tensor])[at];
    }
  });
}

__global__ void offsets_kernel(const __grid_constant__ Table table, const int64_t* __restrict__ before,  // [tiles + 1]
                               int64_t* __restrict__ offsets) {  // [count + 1], of the table's tensors
  for (int i = threadIdx.x; i <= table.count; i += blockDim.x) offsets[i] = before[table.first[i]];
}

std::tuple<Tensor, Tensor, Tensor> bit_diff(std::vector<Tensor> mine, std::vector<Tensor> theirs) {
  check_pairs(mine, theirs, Device::kCuda);
  DEFTX_CHECK(!mine.empty(), "new must hold at least one tensor");
  const DeviceGuard guard(mine[0].get_device_index());
  const cudaStream_t stream = current_stream(mine[0]);
  const int64_t n = static_cast<int64_t>(mine.size());
  const std::vector<int64_t> sizes = sizes_of(mine, 1);
  const std::vector<void*> new_data = data_of(mine), old_data = data_of(theirs);
  int64_t tiles = 0;
  for (const int64_t size : sizes) tiles += (size + kTile - 1) / kTile;

  Tensor offsets = torch::stable::new_empty(mine[0], {n + 1}, ScalarType::Long), indices, values;
  Tensor bits = torch::stable::new_empty(mine[0], {tiles * (kTile / 8)}, ScalarType::Byte);
  Tensor before = torch::stable::new_empty(mine[0], {tiles + 1}, ScalarType::Long);
  auto* count = static_cast<int64_t*>(before.mutable_data_ptr());
  DEFTX_CUDA_CHECK(cudaMemsetAsync(count + tiles, 0, sizeof(int64_t), stream));
  with_size(mine[0], "new", [&](auto zero) {
    using T = decltype(zero);
    const auto launch = [&](auto* kernel, const Table& table, auto*... arguments) {
      const int64_t parts = (table.first[table.count] - table.first[0] + kWarps - 1) / kWarps;
      kernel<<<blocks_for(kernel, parts), kThreads, 0, stream>>>(table, arguments...);
      DEFTX_LAUNCH_CHECK();
    };
    for_each_table(new_data, old_data, sizes, kTile, [&](const Table& table, int64_t) {
      launch(mark_kernel<T>, table, static_cast<uint8_t*>(bits.mutable_data_ptr()), count);
    });
    const int64_t nnz = scan(count, tiles + 1, mine[0], stream);
    const bool wide = std::any_of(sizes.begin(), sizes.end(), [](int64_t size) { return size > INT32_MAX; });
    values = torch::stable::new_empty(mine[0], {nnz});
    indices = torch::stable::new_empty(mine[0], {nnz}, wide ? ScalarType::Long : ScalarType::Int);
    const auto* words = static_cast<const uint32_t*>(bits.const_data_ptr());
    const auto emit = [&](auto* index) {
      using Index = std::remove_pointer_t<decltype(index)>;
      for_each_table(new_data, old_data, sizes, kTile, [&](const Table& table, int64_t first) {
        launch(emit_kernel<T, Index>, table, words, static_cast<const int64_t*>(count), index,
               static_cast<T*>(values.mutable_data_ptr()));
        offsets_kernel<<<1, kTensors + 1, 0, stream>>>(table, count,
                                                       static_cast<int64_t*>(offsets.mutable_data_ptr()) + first);
        DEFTX_LAUNCH_CHECK();
      });
    };
    void* index = indices.mutable_data_ptr();
    wide ? emit(static_cast<int64_t*>(index)) : emit(static_cast<int32_t*>(index));
  });
  return {offsets, indices, values};
}

// ---- entries ----

template <typename T, typename Index>
__global__ void __launch_bounds__(kThreads)
    exchange_kernel(const __grid_constant__ Table table, const int64_t* __restrict__ offsets,  // [count + 1]
                    const Index* __restrict__ indices, T* __restrict__ values, int64_t nnz) {  // [nnz]
  constexpr int kOwn = sizeof(T) == 8 ? kItems / 2 : kItems;  // more would not fit into the registers
  const int64_t begin = min(max(offsets[0], int64_t{0}), nnz), end = min(max(offsets[table.count], begin), nnz);
  const int64_t warps = int64_t{gridDim.x} * kWarps;
  for (int64_t first = begin + (int64_t{blockIdx.x} * kWarps + threadIdx.x / 32) * (32 * kOwn); first < end;
       first += warps * (32 * kOwn)) {
    int tensor = static_cast<int>(find_row_by_warp(offsets, 0, table.count, first));
    T* element[kOwn];
    T value[kOwn], old[kOwn];
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const int64_t entry = first + k * 32 + threadIdx.x % 32;
      element[k] = nullptr;
      if (entry >= end) continue;
      while (tensor + 1 < table.count && offsets[tensor + 1] <= entry) ++tensor;
      const int64_t index = indices[entry];
      value[k] = values[entry];
      // Callers have checked the indices; this keeps a wrong one from touching other memory.
      if (index >= 0 && index < table.size[tensor]) element[k] = static_cast<T*>(table.mine[tensor]) + index;
    }
#pragma unroll
    for (int k = 0; k < kOwn; ++k) old[k] = element[k] ? *element[k] : T{0};
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const int64_t entry = first + k * 32 + threadIdx.x % 32;
      if (!element[k]) continue;
      values[entry] = old[k];
      *element[k] = value[k];
    }
  }
}

void flat_exchange_(std::vector<Tensor> tensors, Tensor offsets, Tensor indices, Tensor values) {
  const FlatEntries entries = check_exchange(tensors, offsets, indices, values, Device::kCuda);
  if (entries.nnz == 0) return;
  const DeviceGuard guard(indices.get_device_index());
  const cudaStream_t stream = current_stream(indices);
  with_types(entries, values, "values", [&](const auto* index, auto zero) {
    using T = decltype(zero);
    using Index = std::remove_const_t<std::remove_pointer_t<decltype(index)>>;
    for_each_table(data_of(tensors), {}, sizes_of(tensors, 1), kTile, [&](const Table& table, int64_t first) {
      const unsigned blocks =
          blocks_for(exchange_kernel<T, Index>, (entries.nnz + kStep * kWarps - 1) / (kStep * kWarps));
      exchange_kernel<T, Index><<<blocks, kThreads, 0, stream>>>(
          table, entries.offsets + first, index, static_cast<T*>(values.mutable_data_ptr()), entries.nnz);
      DEFTX_LAUNCH_CHECK();
    });
  });
}

// ---- checksums ----

using Sum = unsigned long long;  // atomicAdd's name for 64 bits

// Adds every thread's sum to that of its tensor, and clears it. By whole warps.
__device__ void add_sums(Sum* __restrict__ sums, int64_t tensor, Sum& sum) {
  if (__all_sync(kFull, tensor == __shfl_sync(kFull, tensor, 0))) {
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFull, sum, offset);
    if (threadIdx.x % 32 != 0) sum = 0;
  }
  if (sum != 0) atomicAdd(sums + tensor, sum);
  sum = 0;
}

// Word `at` of a tensor, 0 where it lacks bytes.
__device__ uint32_t load_word(const uint8_t* data, int64_t at, int64_t bytes) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (4 * at + i < bytes) word |= static_cast<uint32_t>(data[4 * at + i]) << (8 * i);
  return word;
}

__global__ void __launch_bounds__(kThreads)
    sum_kernel(const __grid_constant__ Table table, Sum* __restrict__ sums) {  // [count], of the table's tensors
  Sum sum = 0;
  int current = 0;
  for_each_tile(table, 1, 0, [&](int tensor, int64_t tile, int64_t) {
    if (tensor != current) add_sums(sums, current, sum);
    current = tensor;
    const auto* data = static_cast<const uint8_t*>(table.mine[tensor]);
    const int64_t bytes = table.size[tensor], first = tile * kSumTile;
    if (4 * (first + kSumTile) <= bytes && reinterpret_cast<uintptr_t>(data) % 16 == 0) {
      const auto* vectors = reinterpret_cast<const uint4*>(data + 4 * first);
      uint4 words[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) words[k] = __ldcs(vectors + k * kThreads + threadIdx.x);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t position = position_of(first + 4 * (k * kThreads + threadIdx.x));
        sum += Sum{key_of(position)} * words[k].x + Sum{key_of(position + kWordStep)} * words[k].y +
               Sum{key_of(position + 2 * kWordStep)} * words[k].z + Sum{key_of(position + 3 * kWordStep)} * words[k].w;
      }
    } else {
      for (int64_t at = first + threadIdx.x; at < first + kSumTile && 4 * at < bytes; at += kThreads)
        sum += Sum{key_of(position_of(at))} * load_word(data, at, bytes);
    }
  });
  add_sums(sums, current, sum);
}

Tensor zeros(const Tensor& like, int64_t n, cudaStream_t stream) {
  Tensor out = torch::stable::new_empty(like, {n}, ScalarType::Long);
  if (n > 0) DEFTX_CUDA_CHECK(cudaMemsetAsync(out.mutable_data_ptr(), 0, sizeof(int64_t) * n, stream));
  return out;
}

Tensor bit_checksum(std::vector<Tensor> tensors) {
  check_list(tensors, Device::kCuda, "tensors");
  DEFTX_CHECK(!tensors.empty(), "tensors must hold at least one tensor");
  with_size(tensors[0], "tensors", [](auto) {});
  const DeviceGuard guard(tensors[0].get_device_index());
  const cudaStream_t stream = current_stream(tensors[0]);
  Tensor out = zeros(tensors[0], static_cast<int64_t>(tensors.size()), stream);
  for_each_table(data_of(tensors), {}, sizes_of(tensors, tensors[0].element_size()), 4 * kSumTile,
                 [&](const Table& table, int64_t first) {
                   const unsigned blocks = blocks_for(sum_kernel, table.first[table.count] - table.first[0]);
                   sum_kernel<<<blocks, kThreads, 0, stream>>>(table,
                                                               static_cast<Sum*>(out.mutable_data_ptr()) + first);
                   DEFTX_LAUNCH_CHECK();
                 });
  return out;
}

template <typename T, typename Index>
__global__ void __launch_bounds__(kThreads)
    change_kernel(const int64_t* __restrict__ offsets, int64_t tensors,  // [tensors + 1]
                  const Index* __restrict__ indices, const T* __restrict__ mine, const T* __restrict__ theirs,
                  int64_t nnz,               // [nnz]
                  Sum* __restrict__ sums) {  // [tensors]
  // A warp takes entries that follow one another, so that it passes few tensors.
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32, warps = int64_t{gridDim.x} * kWarps;
  const int64_t steps = (nnz + 31) / 32, begin = steps * warp / warps * 32;
  const int64_t end = min(steps * (warp + 1) / warps * 32, nnz);
  if (begin >= end) return;
  int64_t tensor = find_row_by_warp(offsets, 0, tensors, begin);
  Sum sum = 0;
  for (int64_t entry = begin + threadIdx.x % 32; entry < end; entry += 32) {
    int64_t next = tensor;
    while (next + 1 < tensors && offsets[next + 1] <= entry) ++next;
    if (next != tensor) {
      if (sum != 0) atomicAdd(sums + tensor, sum);
      sum = 0;
      tensor = next;
    }
    sum += term_of<T>(indices[entry], mine[entry]) - term_of<T>(indices[entry], theirs[entry]);
  }
  add_sums(sums, tensor, sum);
}

Tensor bit_checksum_change(Tensor offsets, Tensor indices, Tensor before, Tensor after) {
  const FlatEntries entries = check_change(offsets, indices, before, after, Device::kCuda);
  const DeviceGuard guard(indices.get_device_index());
  const cudaStream_t stream = current_stream(indices);
  Tensor out = zeros(offsets, entries.tensors, stream);
  if (entries.nnz == 0) return out;
  with_types(entries, before, "old", [&](const auto* index, auto zero) {
    using T = decltype(zero);
    using Index = std::remove_const_t<std::remove_pointer_t<decltype(index)>>;
    const unsigned blocks = blocks_for(change_kernel<T, Index>, (entries.nnz + kThreads - 1) / kThreads);
    change_kernel<T, Index><<<blocks, kThreads, 0, stream>>>(
        entries.offsets, entries.tensors, index, static_cast<const T*>(after.const_data_ptr()),
        static_cast<const T*>(before.const_data_ptr()), entries.nnz, static_cast<Sum*>(out.mutable_data_ptr()));
    DEFTX_LAUNCH_CHECK();
  });
  return out;
}

// ---- set_bits ----

// A word of the marks, without bits before the first part and behind the last one; 0 behind the last word.
__device__ uint32_t marked_word(const Marks& marks, int64_t number) {
  if (number >= marks.count) return 0;
  return bits_within(marks.words[number], 32 * number, marks.starts[0], marks.starts[marks.parts]);
}

// Calls visit(tile, this lane's word of it), a warp to a tile.
template <typename Visit>
__device__ void for_each_marked_word(const Marks& marks, int64_t tiles, const Visit& visit) {
  for (int64_t tile = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; tile < tiles;
       tile += int64_t{gridDim.x} * kWarps)
    visit(tile, marked_word(marks, tile * (kTile / 32) + threadIdx.x % 32));
}

__global__ void __launch_bounds__(kThreads)
    count_marks_kernel(const Marks marks, int64_t* __restrict__ counts, int64_t tiles) {  // [tiles]
  for_each_marked_word(marks, tiles, [&](int64_t tile, uint32_t word) {
    const unsigned count = __reduce_add_sync(kFull, static_cast<unsigned>(__popc(word)));
    if (threadIdx.x % 32 == 0) counts[tile] = count;
  });
}

template <typename Index>
__global__ void __launch_bounds__(kThreads)
    emit_marks_kernel(const Marks marks, const int64_t* __restrict__ before, int64_t tiles,  // [tiles + 1]
                      Index* __restrict__ indices) {                                         // [nnz]
  for_each_marked_word(marks, tiles, [&](int64_t tile, uint32_t word) {
    int64_t out = before[tile];
    if (out == before[tile + 1]) return;
    out += rank_of_lane(__popc(word));
    const int64_t number = tile * kTile + threadIdx.x % 32 * 32;
    int64_t part = find_row_by_warp(marks.starts, 0, marks.parts, tile * kTile);
    for (; word != 0; word &= word - 1, ++out) {
      const int64_t at = number + __ffs(word) - 1;
      while (part + 1 < marks.parts && marks.starts[part + 1] <= at) ++part;
      indices[out] = static_cast<Index>(at - marks.starts[part]);
    }
  });
}

__global__ void mark_offsets_kernel(const Marks marks, const int64_t* __restrict__ before,  // [tiles + 1]
                                    int64_t* __restrict__ offsets) {                        // [parts + 1]
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i <= marks.parts;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t start = min(max(marks.starts[i], int64_t{0}), 32 * marks.count), tile = start / kTile;
    int64_t offset = before[tile];
    for (int64_t w = tile * (kTile / 32); 32 * w < start; ++w)
      offset += __popc(bits_within(marked_word(marks, w), 32 * w, 0, start));
    offsets[i] = offset;
  }
}

std::tuple<Tensor, Tensor> set_bits(Tensor words, Tensor starts) {
  const Marks marks = check_marks(words, starts, Device::kCuda);
  const DeviceGuard guard(words.get_device_index());
  const cudaStream_t stream = current_stream(words);
  const int64_t tiles = (32 * marks.count + kTile - 1) / kTile, parts = (tiles + kWarps - 1) / kWarps;
  Tensor offsets = torch::stable::new_empty(words, {marks.parts + 1}, ScalarType::Long);
  Tensor before = torch::stable::new_empty(words, {tiles + 1}, ScalarType::Long);
  auto* count = static_cast<int64_t*>(before.mutable_data_ptr());
  DEFTX_CUDA_CHECK(cudaMemsetAsync(count + tiles, 0, sizeof(int64_t), stream));
  if (tiles) {
    count_marks_kernel<<<blocks_for(count_marks_kernel, parts), kThreads, 0, stream>>>(marks, count, tiles);
    DEFTX_LAUNCH_CHECK();
  }
  const int64_t nnz = scan(count, tiles + 1, words, stream);
  Tensor indices = torch::stable::new_empty(words, {nnz}, marks.wide ? ScalarType::Long : ScalarType::Int);
  const auto emit = [&](auto* index) {
    using Index = std::remove_pointer_t<decltype(index)>;
    emit_marks_kernel<Index>
        <<<blocks_for(emit_marks_kernel<Index>, parts), kThreads, 0, stream>>>(marks, count, tiles, index);
    DEFTX_LAUNCH_CHECK();
  };
  void* index = indices.mutable_data_ptr();
  if (nnz) marks.wide ? emit(static_cast<int64_t*>(index)) : emit(static_cast<int32_t*>(index));
  const int64_t blocks = (marks.parts + kThreads) / kThreads;
  mark_offsets_kernel<<<blocks_for(mark_offsets_kernel, blocks), kThreads, 0, stream>>>(
      marks, count, static_cast<int64_t*>(offsets.mutable_data_ptr()));
  DEFTX_LAUNCH_CHECK();
  return {offsets, indices};
}

}  // namespace

DEFTX_CUDA_LIBRARY_IMPL(m) {
  m.impl("bit_diff", TORCH_BOX(&bit_diff));
  m.impl("flat_exchange_", TORCH_BOX(&flat_exchange_));
  m.impl("bit_checksum", TORCH_BOX(&bit_checksum));
  m.impl("bit_checksum_change", TORCH_BOX(&bit_checksum_change));
  m.impl("set_bits", TORCH_BOX(&set_bits));
}

}  // namespace deftx
