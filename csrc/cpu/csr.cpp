// csr_gather, csr_scatter_, csr_add_ on the CPU.
//
// The entries of the mask are cut into pieces of equal length, whatever rows or tensors they fall into, one per thread. Each entry
// is read and written by one thread alone, so the result does not depend on the number of threads.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <atomic>

#include "../stable.h"

namespace deftx {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kGrain = 16384;  // entries; below about 50 us of work a second thread costs more than it brings
constexpr int64_t kBlock = 128;

// Calls visit(data of the row, columns of the row, first entry, last entry + 1, entry at which the row begins) for each stretch of
// entries [begin, end) that lies in one row.
template <typename T, typename Visit>
void for_each_run(const Csr& csr, int64_t begin, int64_t end, const Visit& visit) {
  if (begin >= end) return;
  const int64_t* crow = csr.crow;
  int64_t row = std::upper_bound(crow, crow + csr.rows + 1, begin) - crow - 1;
  auto slice =
      std::upper_bound(csr.slices.begin(), csr.slices.end(), row, [](int64_t r, const Slice& s) { return r < s.first_row; }) - 1;
  for (int64_t i = begin; i < end; ++row) {
    while (slice + 1 != csr.slices.end() && row >= slice[1].first_row) ++slice;
    const int64_t stop = std::min(crow[row + 1], end);
    if (i < stop)
      visit(static_cast<T*>(slice->data) + (row - slice->first_row) * slice->columns, slice->columns, i, stop, crow[row]);
    i = std::max(i, stop);
  }
}

// True unless col [n] ascends strictly.
template <typename Column>
bool any_descent(const Column* col, int64_t n) {
  Column found = 0;
  for (int64_t j = 1; j < n; ++j) found |= col[j - 1] >= col[j];
  return found != 0;
}

// Throws unless crow_indices ascends from 0 to nnz and each row's columns ascend strictly and stay inside the row. Strictly,
// because two threads must not meet in one element.
template <typename Column>
void check_contents(const Csr& csr) {
  const int64_t* crow = csr.crow;
  DEFTX_CHECK(crow[0] == 0 && crow[csr.rows] == csr.nnz, "crow_indices must run from 0 to nnz = ", csr.nnz, ", got ", crow[0],
              " to ", crow[csr.rows]);
  std::atomic<bool> bad{false};
  torch::stable::parallel_for(0, csr.rows, kGrain, [&](int64_t begin, int64_t end) {
    bool wrong = false;
    for (int64_t r = begin; r < end; ++r) wrong |= crow[r] > crow[r + 1];
    if (wrong) bad = true;
  });
  DEFTX_CHECK(!bad, "crow_indices must not descend");
  const auto* col = static_cast<const Column*>(csr.col);
  torch::stable::parallel_for(0, csr.nnz, kGrain, [&](int64_t begin, int64_t end) {
    bool wrong = false;
    for_each_run<char>(csr, begin, end, [&](char*, int64_t columns, int64_t i, int64_t stop, int64_t first) {
      const int64_t from = std::max(i - 1, first);  // the entry before the piece, if it is of this row
      wrong |= any_descent(col + from, stop - from) || col[i] < 0 || col[stop - 1] >= columns;
    });
    if (wrong) bad = true;
  });
  DEFTX_CHECK(!bad, "col_indices must ascend strictly within each row and be less than the row's number of columns");
}

template <typename T, typename Column>
void gather(const Csr& csr, T* out) {  // out [nnz]
  const auto* col = static_cast<const Column*>(csr.col);
  torch::stable::parallel_for(0, csr.nnz, kGrain, [&](int64_t begin, int64_t end) {
    for_each_run<T>(csr, begin, end, [&](const T* row, int64_t, int64_t i, int64_t stop, int64_t) {
      for (int64_t j = i; j < stop; ++j) out[j] = row[col[j]];
    });
  });
}

template <typename T, typename Column>
void scatter(const Csr& csr, const T* values) {  // values [nnz]
  const auto* col = static_cast<const Column*>(csr.col);
  torch::stable::parallel_for(0, csr.nnz, kGrain, [&](int64_t begin, int64_t end) {
    for_each_run<T>(csr, begin, end, [&](T* row, int64_t, int64_t i, int64_t stop, int64_t) {
      for (int64_t j = i; j < stop; ++j) row[col[j]] = values[j];
    });
  });
}

// Product and sum are rounded one by one (-ffp-contract=off), as the CUDA kernel does: both devices give the same bits.
template <typename Compute, typename T, typename Value>
DEFTX_CLONES void add_scaled(T* __restrict__ elements, const Value* __restrict__ values, int64_t n, Compute alpha) {
  for (int64_t k = 0; k < n; ++k)
    elements[k] = static_cast<T>(static_cast<Compute>(elements[k]) + alpha * static_cast<Compute>(values[k]));
}

// In blocks, so that the conversions of 16-bit types are vector instructions: they, not memory, bound an element-wise loop
// (15 M entries of bfloat16 at density 0.3, one Sapphire Rapids core: 25 ms rather than 42).
template <typename T, typename Value, typename Compute, typename Column>
void add(const Csr& csr, const Value* values, double alpha) {  // values [nnz]
  const auto* col = static_cast<const Column*>(csr.col);
  const auto scale = static_cast<Compute>(alpha);
  torch::stable::parallel_for(0, csr.nnz, kGrain, [&](int64_t begin, int64_t end) {
    T block[kBlock];
    for_each_run<T>(csr, begin, end, [&](T* row, int64_t, int64_t i, int64_t stop, int64_t) {
      for (; i < stop; i += kBlock) {
        const int64_t n = std::min(kBlock, stop - i);
        for (int64_t k = 0; k < n; ++k) block[k] = row[col[i + k]];
        add_scaled<Compute>(block, values + i, n, scale);
        for (int64_t k = 0; k < n; ++k) row[col[i + k]] = block[k];
      }
    });
  });
}

template <typename Column>
void gather_sized(const Csr& csr, void* out) {
  check_contents<Column>(csr);
  switch (csr.element_size) {
    case 1:
      return gather<uint8_t, Column>(csr, static_cast<uint8_t*>(out));
    case 2:
      return gather<uint16_t, Column>(csr, static_cast<uint16_t*>(out));
    case 4:
      return gather<uint32_t, Column>(csr, static_cast<uint32_t*>(out));
    case 8:
      return gather<uint64_t, Column>(csr, static_cast<uint64_t*>(out));
    default:
      DEFTX_CHECK(false, "csr_gather: elements of ", csr.element_size, " bytes are not supported");
  }
}

template <typename Column>
void scatter_sized(const Csr& csr, const void* values) {
  check_contents<Column>(csr);
  switch (csr.element_size) {
    case 1:
      return scatter<uint8_t, Column>(csr, static_cast<const uint8_t*>(values));
    case 2:
      return scatter<uint16_t, Column>(csr, static_cast<const uint16_t*>(values));
    case 4:
      return scatter<uint32_t, Column>(csr, static_cast<const uint32_t*>(values));
    case 8:
      return scatter<uint64_t, Column>(csr, static_cast<const uint64_t*>(values));
    default:
      DEFTX_CHECK(false, "csr_scatter_: elements of ", csr.element_size, " bytes are not supported");
  }
}

template <typename T, typename Compute, typename Column>
void add_valued(const Csr& csr, const void* values, bool float_values, double alpha) {
  if (float_values) return add<T, float, Compute, Column>(csr, static_cast<const float*>(values), alpha);
  return add<T, T, Compute, Column>(csr, static_cast<const T*>(values), alpha);
}

template <typename Column>
void add_typed(const Csr& csr, const void* values, bool float_values, double alpha) {
  check_contents<Column>(csr);
  if (csr.dtype == aoti_torch_dtype_float32()) return add_valued<float, float, Column>(csr, values, float_values, alpha);
  if (csr.dtype == aoti_torch_dtype_bfloat16()) return add_valued<BFloat16, float, Column>(csr, values, float_values, alpha);
  if (csr.dtype == aoti_torch_dtype_float16()) return add_valued<Half, float, Column>(csr, values, float_values, alpha);
  if (csr.dtype == aoti_torch_dtype_float64()) return add_valued<double, double, Column>(csr, values, float_values, alpha);
  DEFTX_CHECK(false, "csr_add_: tensors must be float32, float64, bfloat16 or float16");
}

Tensor csr_gather(std::vector<Tensor> tensors, Tensor crow_indices, Tensor col_indices) {
  const Csr csr = check_csr(tensors, Access::kRead, crow_indices, col_indices, Device::kCpu);
  Tensor out = tensors.empty() ? torch::stable::new_empty(col_indices, {csr.nnz}, torch::headeronly::ScalarType::Float)
                               : torch::stable::new_empty(tensors[0], {csr.nnz});
  csr.wide ? gather_sized<int32_t>(csr, out.mutable_data_ptr()) : gather_sized<uint16_t>(csr, out.mutable_data_ptr());
  return out;
}

void csr_scatter_(std::vector<Tensor> tensors, Tensor crow_indices, Tensor col_indices, Tensor values) {
  const Csr csr = check_csr(tensors, Access::kWrite, crow_indices, col_indices, Device::kCpu);
  check_compact(values, Device::kCpu, col_indices, csr.nnz, "values");
  DEFTX_CHECK(tensors.empty() || dtype_of(values) == csr.dtype, "csr_scatter_: values must have the tensors' dtype");
  csr.wide ? scatter_sized<int32_t>(csr, values.const_data_ptr()) : scatter_sized<uint16_t>(csr, values.const_data_ptr());
}

void csr_add_(std::vector<Tensor> tensors, Tensor crow_indices, Tensor col_indices, Tensor values, double alpha) {
  const Csr csr = check_csr(tensors, Access::kWrite, crow_indices, col_indices, Device::kCpu);
  check_compact(values, Device::kCpu, col_indices, csr.nnz, "values");
  const bool float_values = dtype_of(values) == aoti_torch_dtype_float32();
  DEFTX_CHECK(tensors.empty() || float_values || dtype_of(values) == csr.dtype,
              "csr_add_: values must be float32 or have the tensors' dtype");
  csr.wide ? add_typed<int32_t>(csr, values.const_data_ptr(), float_values, alpha)
           : add_typed<uint16_t>(csr, values.const_data_ptr(), float_values, alpha);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deftx, CPU, m) {
  m.impl("csr_gather", TORCH_BOX(&csr_gather));
  m.impl("csr_scatter_", TORCH_BOX(&csr_scatter_));
  m.impl("csr_add_", TORCH_BOX(&csr_add_));
}

}  // namespace deftx
