// csr_gather, csr_scatter_, csr_add_, csr_restore_ on the GPU.
//
// The entries of the mask are cut into tiles of kTile; a block takes every gridDim.x-th tile. It finds the tile's first
// and last row in crow_indices, puts where each of those rows lies into shared memory, and each thread searches that
// short list for the row of its entries. So reads of col_indices and of compact tensors are coalesced, and the work is
// even whatever the rows' lengths. The host never waits for the device: which entries belong to the tensors of a launch
// is read from crow_indices by the kernel.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../csr.h"
#include "rows.cuh"

namespace deftx {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = 8;  // entries per thread and tile
constexpr int kTile = kThreads * kItems;
constexpr int kRows = 512;     // rows of a tile that fit in shared memory; sparser tiles search crow_indices itself
constexpr int kTensors = 160;  // per launch

struct Table {
  void* data[kTensors];
  int64_t columns[kTensors];
  int64_t first_row[kTensors + 1];  // [count + 1], in the stacked matrix
  int count;
  int first_tensor;  // the tensor that data[0] is, of all
};
static_assert(sizeof(Table) <= 4000, "a kernel's parameters are limited to 4 KB");

// Where a row's entries lie: data of the row, and how many columns it has.
struct Row {
  void* data;
  int64_t columns;
};

__device__ Row locate(const Table& table, int64_t row, int element_size) {
  int low = 0, high = table.count;  // first_row[low] <= row < first_row[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first_row[middle] <= row ? low : high) = middle;
  }
  return {static_cast<char*>(table.data[low]) + (row - table.first_row[low]) * table.columns[low] * element_size,
          table.columns[low]};
}

// The tensor of this element. A linear search, for elements that other code has changed.
__device__ int tensor_of(const Table& table, const void* element, int element_size) {
  for (int t = 0; t < table.count; ++t) {
    const auto* begin = static_cast<const char*>(table.data[t]);
    const int64_t elements = (table.first_row[t + 1] - table.first_row[t]) * table.columns[t];
    if (element >= begin && element < begin + elements * element_size) return table.first_tensor + t;
  }
  return table.first_tensor;
}

// The four ops: what is read before (the compact value, the tensor's element) and what is done with both. `element` is
// null where the column lies outside the row. kCounts: `finish` returns whether the element is to be counted.
template <typename T>
struct Gather {
  using Element = T;
  using Value = T;
  static constexpr bool kLoadsValue = false, kLoadsElement = true, kCounts = false;
  T* values;  // [nnz]
  __device__ void finish(T* value, T, T*, T loaded) const { *value = loaded; }
};

template <typename T>
struct Scatter {
  using Element = T;
  using Value = T;
  static constexpr bool kLoadsValue = true, kLoadsElement = false, kCounts = false;
  T* values;  // [nnz]
  __device__ void finish(T*, T value, T* element, T) const {
    if (element) *element = value;
  }
};

__device__ float widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(__half x) { return __half2float(x); }
// Doubles by way of float, as PyTorch rounds them.
__device__ void narrow(double x, double& out) { out = x; }
__device__ void narrow(float x, float& out) { out = x; }
__device__ void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ void narrow(float x, __half& out) { out = __float2half_rn(x); }
template <typename T>
__device__ void narrow(double x, T& out) {
  narrow(__double2float_rn(x), out);
}

// Product and sum are rounded one by one, as the CPU library does: both devices give the same bits.
__device__ float sum_rn(float x, float alpha, float y) { return __fadd_rn(x, __fmul_rn(alpha, y)); }
__device__ double sum_rn(double x, double alpha, double y) { return __dadd_rn(x, __dmul_rn(alpha, y)); }

__device__ bool differs(float x, float y) { return __float_as_uint(x) != __float_as_uint(y); }
__device__ bool differs(double x, double y) { return __double_as_longlong(x) != __double_as_longlong(y); }
__device__ bool differs(__nv_bfloat16 x, __nv_bfloat16 y) { return __bfloat16_as_ushort(x) != __bfloat16_as_ushort(y); }
__device__ bool differs(__half x, __half y) { return __half_as_ushort(x) != __half_as_ushort(y); }

template <typename T, typename V>
struct Add {
  using Element = T;
  using Value = V;
  using Compute = std::conditional_t<sizeof(T) == 8 || sizeof(V) == 8, double, float>;
  static constexpr bool kLoadsValue = true, kLoadsElement = true, kCounts = false;
  V* values;  // [nnz]
  T* former;  // null, or [nnz]
  Compute alpha;
  __device__ void finish(V* at, V value, T* element, T loaded) const {
    if (former) former[at - values] = loaded;
    if (!element) return;
    const Compute x = widen(loaded), y = widen(value);
    narrow(sum_rn(x, alpha, y), *element);
  }
};

template <typename T, typename V>
struct Restore {
  using Element = T;
  using Value = V;
  using Compute = typename Add<T, V>::Compute;
  static constexpr bool kLoadsValue = true, kLoadsElement = true, kCounts = true;
  V* values;                    // [nnz]
  const T* former;              // [nnz]
  unsigned long long* changed;  // [tensors]
  Compute alpha;
  __device__ bool finish(V* at, V value, T* element, T loaded) const {
    if (!element) return false;
    const T before = former[at - values];
    const Compute x = widen(before), y = widen(value);
    T sum;
    narrow(sum_rn(x, alpha, y), sum);
    *element = before;
    return differs(sum, loaded);
  }
};

// The rows of a tile, in shared memory.
struct Tile {
  int64_t ends[2];    // the rows of its first and of its last entry
  int offset[kRows];  // where a row's entries begin, counted from the tile's first entry
  Row rows[kRows];
};

// By the whole block: fills `tile` for the entries [begin, end). Returns its number of rows, which may be more than
// fit.
__device__ int64_t prepare_tile(Tile& tile, const Table& table, const int64_t* __restrict__ crow, int64_t begin,
                                int64_t end, int element_size) {
  __syncthreads();  // the tile before this one has been read
  if (threadIdx.x < 64) {
    const int which = threadIdx.x / 32;
    const int64_t row =
        find_row_by_warp(crow, table.first_row[0], table.first_row[table.count], which ? end - 1 : begin);
    if (threadIdx.x % 32 == 0) tile.ends[which] = row;
  }
  __syncthreads();
  const int64_t first = tile.ends[0],
                count = max(tile.ends[1] - first + 1, int64_t{1});  // less only if crow_indices descend
  if (count <= kRows) {
    for (int r = threadIdx.x; r < count; r += kThreads) {
      tile.offset[r] = static_cast<int>(min(max(crow[first + r], begin - 1), end) - begin);
      tile.rows[r] = locate(table, first + r, element_size);
    }
    __syncthreads();
  }
  return count;
}

template <typename Op, typename Column>
__global__ void __launch_bounds__(kThreads, 2)
    csr_kernel(const __grid_constant__ Table table, const int64_t* __restrict__ crow,  // [rows + 1]
               const Column* __restrict__ col,                                         // [nnz]
               int64_t nnz, int64_t rows, Op op) {
  using Element = typename Op::Element;
  __shared__ Tile tile;
  // Whatever crow_indices hold, all launches together have each entry at least once, and what is gathered is never left
  // as it was.
  const int64_t first_row = table.first_row[0], last_row = table.first_row[table.count];
  const int64_t first_entry = first_row == 0 ? 0 : max(crow[first_row], int64_t{0});
  const int64_t last_entry = last_row == rows ? nnz : min(crow[last_row], nnz);
  for (int64_t t = first_entry / kTile + blockIdx.x; t * kTile < last_entry; t += gridDim.x) {
    const int64_t begin = max(t * kTile, first_entry), end = min((t + 1) * kTile, last_entry);
    const int64_t count = prepare_tile(tile, table, crow, begin, end, sizeof(Element));
    int column[kItems];
    Element* element[kItems];
    typename Op::Value value[kItems];
    Element loaded[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t i = t * kTile + k * kThreads + threadIdx.x;
      if (i < begin || i >= end) continue;
      column[k] = col[i];
      if constexpr (Op::kLoadsValue) value[k] = op.values[i];
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t i = t * kTile + k * kThreads + threadIdx.x;
      if (i < begin || i >= end) continue;
      const Row row = count <= kRows
                          ? tile.rows[find_row<int>(tile.offset, 0, count, static_cast<int>(i - begin))]
                          : locate(table, find_row<int64_t>(crow, tile.ends[0], tile.ends[1] + 1, i), sizeof(Element));
      // CSRMask has checked the columns; this keeps a wrong one from touching other memory.
      element[k] = column[k] >= 0 && column[k] < row.columns ? static_cast<Element*>(row.data) + column[k] : nullptr;
    }
    if constexpr (Op::kLoadsElement) {
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        const int64_t i = t * kTile + k * kThreads + threadIdx.x;
        if (i >= begin && i < end) loaded[k] = element[k] ? *element[k] : Element{};
      }
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t i = t * kTile + k * kThreads + threadIdx.x;
      if (i < begin || i >= end) continue;
      if constexpr (Op::kCounts) {
        if (op.finish(op.values + i, value[k], element[k], loaded[k]))
          atomicAdd(op.changed + tensor_of(table, element[k], sizeof(Element)), 1ull);
      } else {
        op.finish(op.values + i, value[k], element[k], loaded[k]);
      }
    }
  }
}

template <typename Op, typename Column>
void launch(const Csr& csr, Op op, cudaStream_t stream) {
  const int64_t blocks = std::min(resident_blocks(csr_kernel<Op, Column>, kThreads), (csr.nnz + kTile - 1) / kTile);
  for (size_t at = 0; at < csr.slices.size(); at += kTensors) {
    Table table;
    table.count = static_cast<int>(std::min<size_t>(kTensors, csr.slices.size() - at));
    table.first_tensor = static_cast<int>(at);
    for (int i = 0; i < table.count; ++i) {
      table.data[i] = csr.slices[at + i].data;
      table.columns[i] = csr.slices[at + i].columns;
      table.first_row[i] = csr.slices[at + i].first_row;
    }
    table.first_row[table.count] =
        at + table.count < csr.slices.size() ? csr.slices[at + table.count].first_row : csr.rows;
    if (table.first_row[0] == table.first_row[table.count]) continue;  // no rows, and none that an entry could be in
    csr_kernel<Op, Column><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
        table, csr.crow, static_cast<const Column*>(csr.col), csr.nnz, csr.rows, op);
    DEFTX_LAUNCH_CHECK();
  }
}

// Runs the op on the current stream of the mask's device.
template <typename Op>
void run(const Csr& csr, const Tensor& mask, Op op) {
  if (csr.nnz == 0 || csr.slices.empty()) return;
  const DeviceGuard guard(mask.get_device_index());
  const cudaStream_t stream = current_stream(mask);
  csr.wide ? launch<Op, int32_t>(csr, op, stream) : launch<Op, uint16_t>(csr, op, stream);
}

template <template <typename> class Op>
void run_sized(const Csr& csr, const Tensor& mask, void* values, const char* name) {
  switch (csr.element_size) {
    case 1:
      return run(csr, mask, Op<uint8_t>{static_cast<uint8_t*>(values)});
    case 2:
      return run(csr, mask, Op<uint16_t>{static_cast<uint16_t*>(values)});
    case 4:
      return run(csr, mask, Op<uint32_t>{static_cast<uint32_t*>(values)});
    case 8:
      return run(csr, mask, Op<uint64_t>{static_cast<uint64_t*>(values)});
    default:
      DEFTX_CHECK(false, name, ": elements of ", csr.element_size, " bytes are not supported");
  }
}

// Calls f(T*, V*) with the types of the tensors and of `values`: theirs, float or double.
template <typename T, typename F>
void with_values(const Csr& csr, const Tensor& values, const F& f) {
  void* given = const_cast<void*>(values.const_data_ptr());
  const int32_t dtype = dtype_of(values);
  T* none = nullptr;
  if (dtype == csr.dtype) return f(none, static_cast<T*>(given));
  if (dtype == aoti_torch_dtype_float32()) return f(none, static_cast<float*>(given));
  f(none, static_cast<double*>(given));
}

template <typename F>
void with_types(const Csr& csr, const Tensor& values, const char* name, const F& f) {
  if (csr.dtype == aoti_torch_dtype_float32()) return with_values<float>(csr, values, f);
  if (csr.dtype == aoti_torch_dtype_bfloat16()) return with_values<__nv_bfloat16>(csr, values, f);
  if (csr.dtype == aoti_torch_dtype_float16()) return with_values<__half>(csr, values, f);
  DEFTX_CHECK(csr.dtype == aoti_torch_dtype_float64(), name, ": tensors must be float32, float64, bfloat16 or float16");
  with_values<double>(csr, values, f);
}

Tensor csr_gather(std::vector<Tensor> tensors, Tensor crow_indices, Tensor col_indices) {
  const Csr csr = check_csr(tensors, Access::kRead, crow_indices, col_indices, Device::kCuda);
  Tensor out = tensors.empty() ? torch::stable::new_empty(col_indices, {csr.nnz}, torch::headeronly::ScalarType::Float)
                               : torch::stable::new_empty(tensors[0], {csr.nnz});
  run_sized<Gather>(csr, col_indices, out.mutable_data_ptr(), "csr_gather");
  return out;
}

void csr_scatter_(std::vector<Tensor> tensors, Tensor crow_indices, Tensor col_indices, Tensor values) {
  const Csr csr = check_csr(tensors, Access::kWrite, crow_indices, col_indices, Device::kCuda);
  check_compact(values, Device::kCuda, col_indices, csr.nnz, "values");
  DEFTX_CHECK(tensors.empty() || dtype_of(values) == csr.dtype, "csr_scatter_: values must have the tensors' dtype");
  run_sized<Scatter>(csr, col_indices, const_cast<void*>(values.const_data_ptr()), "csr_scatter_");
}

void csr_add_(std::vector<Tensor> tensors, Tensor crow_indices, Tensor col_indices, Tensor values, double alpha,
              std::optional<Tensor> former,  // [nnz]
              std::optional<Tensor> done) {  // bool []
  const Csr csr = check_csr(tensors, Access::kWrite, crow_indices, col_indices, Device::kCuda);
  check_add(csr, tensors, col_indices, values, former, done, Device::kCuda);
  void* out = former ? former->mutable_data_ptr() : nullptr;
  with_types(csr, values, "csr_add_", [&](auto* type, auto* given) {
    using Op = Add<std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(given)>>;
    const auto scale = static_cast<typename Op::Compute>(alpha);
    run(csr, col_indices, Op{given, static_cast<decltype(type)>(out), scale});
  });
  if (!done) return;
  const DeviceGuard guard(col_indices.get_device_index());
  DEFTX_CUDA_CHECK(cudaMemsetAsync(done->mutable_data_ptr(), 1, sizeof(bool), current_stream(col_indices)));
}

Tensor csr_restore_(std::vector<Tensor> tensors, Tensor crow_indices, Tensor col_indices,
                    Tensor former,  // [nnz]
                    Tensor values,  // [nnz]
                    double alpha) {
  const Csr csr = check_csr(tensors, Access::kWrite, crow_indices, col_indices, Device::kCuda);
  check_restore(csr, tensors, col_indices, former, values, Device::kCuda);
  Tensor changed = torch::stable::new_empty(crow_indices, {static_cast<int64_t>(tensors.size())});
  if (tensors.empty()) return changed;
  const DeviceGuard guard(col_indices.get_device_index());
  auto* counts = static_cast<unsigned long long*>(changed.mutable_data_ptr());
  DEFTX_CUDA_CHECK(cudaMemsetAsync(counts, 0, sizeof(*counts) * tensors.size(), current_stream(col_indices)));
  with_types(csr, values, "csr_restore_", [&](auto* type, auto* given) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Op = Restore<T, std::remove_pointer_t<decltype(given)>>;
    const auto scale = static_cast<typename Op::Compute>(alpha);
    run(csr, col_indices, Op{given, static_cast<const T*>(former.const_data_ptr()), counts, scale});
  });
  return changed;
}

}  // namespace

DEFTX_CUDA_LIBRARY_IMPL(m) {
  m.impl("csr_gather", TORCH_BOX(&csr_gather));
  m.impl("csr_scatter_", TORCH_BOX(&csr_scatter_));
  m.impl("csr_add_", TORCH_BOX(&csr_add_));
  m.impl("csr_restore_", TORCH_BOX(&csr_restore_));
}

}  // namespace deftx
