// csr_gather, csr_scatter_, csr_add_, csr_restore_, csr_square_sum on the CPU.
//
// The entries of the mask are cut into pieces of equal length, whatever rows or tensors they fall into, one per thread.
// Each entry is read and written by one thread alone, so the result does not depend on the number of threads.
#include "../csr.h"

#include <atomic>
#include <type_traits>

#include "rows.h"

namespace deftx {
namespace {

constexpr int64_t kBlock = 128;

template <typename T, typename Column>
void gather(const Csr& csr, T* out) {  // out [nnz]
  const auto* col = static_cast<const Column*>(csr.col);
  torch::stable::parallel_for(0, csr.nnz, kGrain, [&](int64_t begin, int64_t end) {
    for_each_run(csr, begin, end, [&](const Run& run) {
      const T* row = row_of<T>(csr, run);
      for (int64_t j = run.begin; j < run.end; ++j) out[j] = row[col[j]];
    });
  });
}

template <typename T, typename Column>
void scatter(const Csr& csr, const T* values) {  // values [nnz]
  const auto* col = static_cast<const Column*>(csr.col);
  torch::stable::parallel_for(0, csr.nnz, kGrain, [&](int64_t begin, int64_t end) {
    for_each_run(csr, begin, end, [&](const Run& run) {
      T* row = row_of<T>(csr, run);
      for (int64_t j = run.begin; j < run.end; ++j) row[col[j]] = values[j];
    });
  });
}

// Product and sum are rounded one by one (-ffp-contract=off), as the CUDA kernel does: both devices give the same bits.
template <typename Compute, typename T, typename Value>
DEFTX_CLONES void add_scaled(T* __restrict__ elements, const Value* __restrict__ values, int64_t n, Compute alpha) {
  for (int64_t k = 0; k < n; ++k)
    elements[k] = static_cast<T>(static_cast<Compute>(elements[k]) + alpha * static_cast<Compute>(values[k]));
}

// In blocks, so that the conversions of 16-bit types are vector instructions: they, not memory, bound an element-wise
// loop (15 M entries of bfloat16 at density 0.3, one Sapphire Rapids core: 25 ms rather than 42).
template <typename T, typename Value, typename Column>
void add(const Csr& csr, const Value* values, double alpha, T* former) {  // values, former or null [nnz]
  using Compute = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<Value, double>, double, float>;
  const auto* col = static_cast<const Column*>(csr.col);
  const auto scale = static_cast<Compute>(alpha);
  torch::stable::parallel_for(0, csr.nnz, kGrain, [&](int64_t begin, int64_t end) {
    T block[kBlock];
    for_each_run(csr, begin, end, [&](const Run& run) {
      T* row = row_of<T>(csr, run);
      for (int64_t i = run.begin; i < run.end; i += kBlock) {
        const int64_t n = std::min(kBlock, run.end - i);
        for (int64_t k = 0; k < n; ++k) block[k] = row[col[i + k]];
        if (former) std::copy_n(block, n, former + i);
        add_scaled<Compute>(block, values + i, n, scale);
        for (int64_t k = 0; k < n; ++k) row[col[i + k]] = block[k];
      }
    });
  });
}

constexpr int64_t kSums = 8;  // partial sums of a piece, so that additions need not wait for one another

template <typename T>
DEFTX_CLONES void add_squares(const T* __restrict__ elements, int64_t n, double* __restrict__ sums) {
  for (int64_t k = 0; k < n; ++k) {
    const auto x = static_cast<double>(elements[k]);
    sums[k % kSums] += x * x;
  }
}

// Pieces of kGrain entries are summed up one by one, and then their sums in order: the result is the same for any
// number of threads.
template <typename T, typename Column>
double square_sum(const Csr& csr) {
  static_assert(kBlock % kSums == 0 && kGrain % kBlock == 0);
  const auto* col = static_cast<const Column*>(csr.col);
  std::vector<double> pieces((csr.nnz + kGrain - 1) / kGrain);
  torch::stable::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      double sums[kSums] = {};
      T block[kBlock];
      int64_t filled = 0;
      for_each_run(csr, piece * kGrain, std::min((piece + 1) * kGrain, csr.nnz), [&](const Run& run) {
        const T* row = row_of<T>(csr, run);
        for (int64_t i = run.begin; i < run.end;) {
          const int64_t n = std::min(kBlock - filled, run.end - i);
          for (int64_t k = 0; k < n; ++k) block[filled + k] = row[col[i + k]];
          i += n;
          filled += n;
          if (filled == kBlock) {
            add_squares(block, kBlock, sums);
            filled = 0;
          }
        }
      });
      add_squares(block, filled, sums);
      for (const double sum : sums) pieces[piece] += sum;
    }
  });
  double total = 0;
  for (const double piece : pieces) total += piece;
  return total;
}

template <typename Column>
double square_sum_typed(const Csr& csr) {
  check_contents<Column>(csr);
  double sum = 0;
  with_dtype(csr.dtype, "csr_square_sum: tensors", [&](auto zero) { sum = square_sum<decltype(zero), Column>(csr); });
  return sum;
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

// The number of elements whose bits are not those of the sum. The comparison has no early exit, so that it is made of
// vector instructions.
template <typename T>
DEFTX_CLONES int64_t count_different(const T* __restrict__ elements, const T* __restrict__ sums, int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  const auto* one = reinterpret_cast<const Bits*>(elements);
  const auto* other = reinterpret_cast<const Bits*>(sums);
  int64_t count = 0;
  for (int64_t k = 0; k < n; ++k) count += one[k] != other[k];
  return count;
}

using Counts = std::vector<std::atomic<int64_t>>;  // [tensors]

template <typename T, typename Value, typename Column>
void restore(const Csr& csr, const T* former, const Value* values, double alpha, Counts& changed) {
  using Compute = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<Value, double>, double, float>;
  const auto* col = static_cast<const Column*>(csr.col);
  const auto scale = static_cast<Compute>(alpha);
  torch::stable::parallel_for(0, csr.nnz, kGrain, [&](int64_t begin, int64_t end) {
    T block[kBlock], sums[kBlock];
    for_each_run(csr, begin, end, [&](const Run& run) {
      T* row = row_of<T>(csr, run);
      for (int64_t i = run.begin; i < run.end; i += kBlock) {
        const int64_t n = std::min(kBlock, run.end - i);
        std::copy_n(former + i, n, sums);
        add_scaled<Compute>(sums, values + i, n, scale);
        for (int64_t k = 0; k < n; ++k) {
          T& element = row[col[i + k]];
          block[k] = element;
          element = former[i + k];
        }
        if (const int64_t count = count_different(block, sums, n))
          changed[run.tensor].fetch_add(count, std::memory_order_relaxed);
      }
    });
  });
}

// Calls f(T*, const Value*) with the types of the tensors and of `values`: theirs, float or double.
template <typename F>
void with_values(const Csr& csr, const Tensor& values, const char* name, const F& f) {
  const void* given = values.const_data_ptr();
  const int32_t dtype = dtype_of(values);
  with_dtype(csr.dtype, name, [&](auto zero) {
    using T = decltype(zero);
    T* none = nullptr;
    if (dtype == csr.dtype) return f(none, static_cast<const T*>(given));
    if (dtype == aoti_torch_dtype_float32()) return f(none, static_cast<const float*>(given));
    f(none, static_cast<const double*>(given));
  });
}

template <typename Column>
void add_typed(const Csr& csr, const Tensor& values, double alpha, void* former) {
  check_contents<Column>(csr);
  with_values(csr, values, "csr_add_: tensors", [&](auto* type, const auto* given) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Value = std::remove_cv_t<std::remove_pointer_t<decltype(given)>>;
    add<T, Value, Column>(csr, given, alpha, static_cast<T*>(former));
  });
}

template <typename Column>
void restore_typed(const Csr& csr, const Tensor& former, const Tensor& values, double alpha, Counts& changed) {
  check_contents<Column>(csr);
  with_values(csr, values, "csr_restore_: tensors", [&](auto* type, const auto* given) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Value = std::remove_cv_t<std::remove_pointer_t<decltype(given)>>;
    restore<T, Value, Column>(csr, static_cast<const T*>(former.const_data_ptr()), given, alpha, changed);
  });
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
  csr.wide ? scatter_sized<int32_t>(csr, values.const_data_ptr())
           : scatter_sized<uint16_t>(csr, values.const_data_ptr());
}

void csr_add_(std::vector<Tensor> tensors, Tensor crow_indices, Tensor col_indices, Tensor values, double alpha,
              std::optional<Tensor> former,  // [nnz]
              std::optional<Tensor> done) {  // bool []
  const Csr csr = check_csr(tensors, Access::kWrite, crow_indices, col_indices, Device::kCpu);
  check_add(csr, tensors, col_indices, values, former, done, Device::kCpu);
  void* out = former ? former->mutable_data_ptr() : nullptr;
  csr.wide ? add_typed<int32_t>(csr, values, alpha, out) : add_typed<uint16_t>(csr, values, alpha, out);
  if (done) *static_cast<bool*>(done->mutable_data_ptr()) = true;
}

Tensor csr_restore_(std::vector<Tensor> tensors, Tensor crow_indices, Tensor col_indices,
                    Tensor former,  // [nnz]
                    Tensor values,  // [nnz]
                    double alpha) {
  const Csr csr = check_csr(tensors, Access::kWrite, crow_indices, col_indices, Device::kCpu);
  check_restore(csr, tensors, col_indices, former, values, Device::kCpu);
  Counts changed(tensors.size());
  csr.wide ? restore_typed<int32_t>(csr, former, values, alpha, changed)
           : restore_typed<uint16_t>(csr, former, values, alpha, changed);
  Tensor out = torch::stable::new_empty(crow_indices, {static_cast<int64_t>(tensors.size())});
  std::copy(changed.begin(), changed.end(), static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

Tensor csr_square_sum(std::vector<Tensor> tensors, Tensor crow_indices, Tensor col_indices) {
  const Csr csr = check_csr(tensors, Access::kRead, crow_indices, col_indices, Device::kCpu);
  Tensor out = torch::stable::new_empty(col_indices, {}, torch::headeronly::ScalarType::Double);
  *static_cast<double*>(out.mutable_data_ptr()) =
      csr.wide ? square_sum_typed<int32_t>(csr) : square_sum_typed<uint16_t>(csr);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deftx, CPU, m) {
  m.impl("csr_gather", TORCH_BOX(&csr_gather));
  m.impl("csr_scatter_", TORCH_BOX(&csr_scatter_));
  m.impl("csr_add_", TORCH_BOX(&csr_add_));
  m.impl("csr_restore_", TORCH_BOX(&csr_restore_));
  m.impl("csr_square_sum", TORCH_BOX(&csr_square_sum));
}

}  // namespace deftx
