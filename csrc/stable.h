// Shared by every source file: LibTorch's stable ABI (target 2.10), argument checks, and where device ops are
// registered.
//
// A file defines its ops in an anonymous namespace and registers them at its end:
//     STABLE_TORCH_LIBRARY_IMPL(deftx, CPU, m)  { m.impl("op", TORCH_BOX(&op)); }     csrc/cpu/*.cpp
//     DEFTX_CUDA_LIBRARY_IMPL(m)                { m.impl("op", TORCH_BOX(&op)); }     csrc/cuda/*.cu
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// An emulated build runs the CUDA sources on CPU tensors, in a namespace of their own, beside the CPU library's ops.
#ifdef DEFTX_EMULATED
#define DEFTX_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(deftx_emulated, CPU, m)
#else
#define DEFTX_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(deftx, CUDA, m)
#endif

// As STD_TORCH_CHECK, without this file's path in the message. Never throw inside parallel_for: at target 2.10 the text
// is lost.
#define DEFTX_CHECK(condition, ...)                                                    \
  do {                                                                                 \
    if (!(condition)) throw std::runtime_error(::deftx::detail::message(__VA_ARGS__)); \
  } while (0)

// For plain loops over small arrays: compiled for AVX2 too, chosen when the library is loaded, so that the binary stays
// portable. (Lambdas and callees are compiled for AVX2 only where they are inlined.)
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define DEFTX_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define DEFTX_CLONES
#endif

// As DEFTX_CLONES, for AVX-512 and fused multiplication and addition, too; CMakeLists.txt lets the compiler fuse them.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define DEFTX_WIDE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DEFTX_WIDE_CLONES
#endif

namespace deftx {

using torch::stable::Tensor;

namespace detail {
template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  return text.str();
}
}  // namespace detail

// Choices that operators take as integers: SCOPES, OPERATIONS and ELECTIONS of deftx_kernels/ops/schemas.py. They are
// not strings, since at ABI 2.10 each call with a string leaks a copy of it, and leaked blocks keep the heap around
// them from shrinking.
enum class Scope : int64_t { kGlobal, kTensor, kRow };
enum class Operation : int64_t { kAnd, kOr, kSub };
enum class Election : int64_t { kNone, kTotal, kFrequency };

inline Scope scope_of(int64_t code) {
  DEFTX_CHECK(code >= 0 && code <= 2, "scope must be 0 (global), 1 (tensor) or 2 (row), got ", code);
  return static_cast<Scope>(code);
}

inline Operation operation_of(int64_t code) {
  DEFTX_CHECK(code >= 0 && code <= 2, "operation must be 0 (and), 1 (or) or 2 (sub), got ", code);
  return static_cast<Operation>(code);
}

inline Election election_of(int64_t code) {
  DEFTX_CHECK(code >= 0 && code <= 2, "election must be 0 (none), 1 (total) or 2 (frequency), got ", code);
  return static_cast<Election>(code);
}

// True for tensors that a file of csrc/cuda serves.
inline bool is_device_tensor(const Tensor& t) {
#ifdef DEFTX_EMULATED
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

// LibTorch's own number of a dtype: Tensor::scalar_type() throws for dtypes that this ABI version has no name for.
inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

inline bool is_strided(const Tensor& t) {
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  return layout == aoti_torch_layout_strided();
}

// The matrix that a tensor stands for in a CSRMask: fewer than two dimensions are one row, more are (shape[0], the
// rest).
inline int64_t rows_of(const Tensor& t) { return t.dim() < 2 ? 1 : t.size(0); }
inline int64_t columns_of(const Tensor& t) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  int64_t columns = 1;  // kMost where the product is larger, which only a tensor without elements can have
  for (int64_t d = t.dim() < 2 ? 0 : 1; d < t.dim(); ++d)
    columns = t.size(d) > 0 && columns > kMost / t.size(d) ? kMost : columns * t.size(d);
  return columns;
}

// The rows of a list of tensors. Tensors without columns can have any number of rows, also more than an int64 counts.
inline int64_t add_rows(int64_t rows, int64_t more) {
  DEFTX_CHECK(more <= std::numeric_limits<int64_t>::max() - 1 - rows, "the tensors have more than 2**63 - 2 rows");
  return rows + more;
}

// One tensor among the stacked rows.
struct Slice {
  void* data;         // [its rows, columns]
  int64_t first_row;  // in the stacked matrix
  int64_t columns;
};

// The structure of a mask over a list of tensors, after check_csr.
struct Csr {
  std::vector<Slice> slices;
  const int64_t* crow;  // [rows + 1]
  const void* col;      // [nnz] uint16_t, or int32_t where `wide`
  bool wide;
  int64_t rows, nnz;
  int32_t dtype;  // of the tensors (float32 where there are none)
  int64_t element_size;
};

enum class Device { kCpu, kCuda };
enum class Access { kRead, kWrite };

inline void check_tensor(const Tensor& t, Device device, const char* name) {
  DEFTX_CHECK(device == Device::kCpu ? t.is_cpu() : is_device_tensor(t), name, " must be on the ",
              device == Device::kCpu ? "CPU" : "GPU");
  DEFTX_CHECK(is_strided(t) && t.is_contiguous(), name, " must be contiguous");
  if (t.numel() == 0) return;
  int64_t bytes = 0, offset = 0;  // a storage may have been emptied (untyped_storage().resize_(0)) under a tensor
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
  DEFTX_CHECK(offset + t.numel() <= bytes / static_cast<int64_t>(t.element_size()), name, " has no memory of its size");
}

inline void check_compact(const Tensor& t, Device device, const Tensor& mask, int64_t nnz, const char* name) {
  check_tensor(t, device, name);
  DEFTX_CHECK(t.get_device_index() == mask.get_device_index(), name, " is on another device than the mask");
  DEFTX_CHECK(t.dim() == 1 && t.numel() == nnz, name, " must have shape [", nnz,
              "], one element per entry of the mask");
}

// What memory safety needs and the host knows without reading the arrays. Contents: check_contents of csrc/cpu/rows.h;
// a CUDA kernel guards each access itself, since the host may not wait for it.
inline Csr check_mask(const Tensor& crow_indices,  // int64 [rows + 1]
                      const Tensor& col_indices,   // uint16 or int32 [nnz]
                      Device device, const std::string& crow_name = "crow_indices",
                      const std::string& col_name = "col_indices") {
  check_tensor(crow_indices, device, crow_name.c_str());
  check_tensor(col_indices, device, col_name.c_str());
  DEFTX_CHECK(crow_indices.dim() == 1 && dtype_of(crow_indices) == aoti_torch_dtype_int64(), crow_name,
              " must be int64 [rows + 1]");
  const int32_t col_dtype = dtype_of(col_indices);
  DEFTX_CHECK(
      col_indices.dim() == 1 && (col_dtype == aoti_torch_dtype_uint16() || col_dtype == aoti_torch_dtype_int32()),
      col_name, " must be uint16 or int32 [nnz]");
  DEFTX_CHECK(crow_indices.get_device_index() == col_indices.get_device_index(), crow_name, " and ", col_name,
              " are on different devices");
  Csr csr;
  csr.wide = col_dtype == aoti_torch_dtype_int32();
  csr.nnz = col_indices.numel();
  csr.rows = crow_indices.numel() - 1;
  csr.crow = static_cast<const int64_t*>(crow_indices.const_data_ptr());
  csr.col = col_indices.const_data_ptr();
  csr.dtype = aoti_torch_dtype_float32();
  csr.element_size = 4;
  return csr;
}

// Throws if two of the tensors share memory: two threads would write it.
inline void check_apart(const std::vector<Tensor>& tensors, const char* names) {
  std::vector<std::pair<uintptr_t, uintptr_t>> spans;
  spans.reserve(tensors.size());
  for (const Tensor& t : tensors) {
    const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    if (t.numel() > 0) spans.emplace_back(begin, begin + static_cast<uintptr_t>(t.numel()) * t.element_size());
  }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i)
    DEFTX_CHECK(spans[i - 1].second <= spans[i].first, "two of ", names, ", which are written, share memory");
}

// A mask and the tensors that it stands for.
inline Csr check_csr(const std::vector<Tensor>& tensors, Access access,
                     const Tensor& crow_indices,  // int64 [rows + 1]
                     const Tensor& col_indices,   // uint16 or int32 [nnz]
                     Device device) {
  Csr csr = check_mask(crow_indices, col_indices, device);
  csr.dtype = tensors.empty() ? aoti_torch_dtype_float32() : dtype_of(tensors[0]);
  csr.element_size = static_cast<int64_t>(aoti_torch_dtype_element_size(csr.dtype));
  csr.rows = 0;
  csr.slices.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    check_tensor(t, device, "every tensor");
    DEFTX_CHECK(t.get_device_index() == col_indices.get_device_index(), "tensor ", i,
                " is on another device than the mask");
    DEFTX_CHECK(dtype_of(t) == csr.dtype, "tensor ", i, " has another dtype than tensor 0");
    void* data = access == Access::kWrite ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
    csr.slices.push_back({data, csr.rows, columns_of(t)});
    csr.rows = add_rows(csr.rows, rows_of(t));
  }
  if (access == Access::kWrite) check_apart(tensors, "tensors");
  DEFTX_CHECK(crow_indices.numel() == csr.rows + 1, "crow_indices has ", crow_indices.numel(),
              " elements; the tensors have ", csr.rows, " rows, which need ", csr.rows + 1);
  DEFTX_CHECK(csr.rows > 0 || csr.nnz == 0, "col_indices has ", csr.nnz, " entries, but the tensors have no rows");
  return csr;
}

// The arguments of magnitude_histogram: the 16 bits from `shift` on are counted, of the scores whose earlier ones are
// `prefix`.
inline void check_digit(int64_t prefix, int64_t shift, int64_t element_size) {
  const int64_t bits = 8 * element_size;
  DEFTX_CHECK(shift >= 0 && shift % 16 == 0 && shift < bits, "shift must be a multiple of 16 in [0, ", bits, "), got ",
              shift);
  DEFTX_CHECK(prefix >= 0 && prefix < int64_t{1} << (bits - 16 - shift), "prefix must be the first ", bits - 16 - shift,
              " bits of a score, got ", prefix);
}

// The arguments of threshold_mask: the mask cannot have more ties than entries, and no magnitude has its highest bit
// set.
inline void check_ties(const std::vector<int64_t>& ties, const std::vector<Tensor>& scores) {
  DEFTX_CHECK(ties.size() == scores.size(), "ties must have one number for each tensor, got ", ties.size(), " for ",
              scores.size());
  for (size_t i = 0; i < ties.size(); ++i)
    DEFTX_CHECK(ties[i] >= 0 && ties[i] <= scores[i].numel(), "ties must be from 0 to the ", scores[i].numel(),
                " entries of tensor ", i, ", got ", ties[i]);
}
inline void check_threshold(int64_t threshold, int64_t element_size) {
  const int64_t most = std::numeric_limits<int64_t>::max() >> (64 - 8 * element_size);
  DEFTX_CHECK(threshold >= 0 && threshold <= most, "threshold must be the bits of a magnitude, from 0 to ", most,
              ", got ", threshold);
}

// Two masks over the same rows.
inline std::pair<Csr, Csr> check_combine(const Tensor& crow_indices, const Tensor& col_indices,  // of the one mask
                                         const Tensor& other_crow_indices,
                                         const Tensor& other_col_indices,  // of the other
                                         Device device) {
  const Csr mine = check_mask(crow_indices, col_indices, device);
  const Csr theirs =
      check_mask(other_crow_indices, other_col_indices, device, "other_crow_indices", "other_col_indices");
  DEFTX_CHECK(crow_indices.get_device_index() == other_crow_indices.get_device_index(),
              "the masks are on different devices");
  DEFTX_CHECK(mine.rows >= 0 && mine.rows == theirs.rows, "crow_indices has ", mine.rows + 1,
              " elements and other_crow_indices has ", theirs.rows + 1, "; both must have one per row and one more");
  DEFTX_CHECK(mine.wide == theirs.wide, "col_indices and other_col_indices must have the same dtype");
  DEFTX_CHECK(mine.rows > 0 || mine.nnz + theirs.nnz == 0, "a mask without rows must have no entries, col_indices has ",
              mine.nnz, " and other_col_indices has ", theirs.nnz);
  return {mine, theirs};
}

// One mask of a csr_sum and its compact tensor.
struct Summand {
  Csr csr;
  const void* values;  // [csr.nnz]
  int32_t dtype;       // of values
  double weight;
};

constexpr size_t kSummands = 64;  // MAX_SUMMED_MASKS of deftx_kernels/ops/schemas.py

inline Csr check_entries_of_sum(const Tensor& crow_indices,  // int64 [rows + 1]
                                const Tensor& col_indices,   // uint16 or int32 [nnz]
                                torch::headeronly::ScalarType dtype, Device device) {
  const Csr csr = check_mask(crow_indices, col_indices, device);
  DEFTX_CHECK(csr.rows >= 0, "crow_indices has 0 elements; it must have one per row and one more");
  DEFTX_CHECK(csr.rows > 0 || csr.nnz == 0, "a mask without rows must have no entries, col_indices has ", csr.nnz);
  DEFTX_CHECK(dtype == torch::headeronly::ScalarType::Float || dtype == torch::headeronly::ScalarType::Double,
              "dtype must be float32 or float64");
  return csr;
}

inline std::vector<Summand> check_summands(const Csr& entries, const Tensor& col_indices,  // of the result
                                           const std::vector<Tensor>& other_crow_indices,
                                           const std::vector<Tensor>& other_col_indices,
                                           const std::vector<Tensor>& values, const std::vector<double>& weights,
                                           Device device) {
  const size_t count = values.size();
  DEFTX_CHECK(other_crow_indices.size() == count && other_col_indices.size() == count && weights.size() == count,
              "other_crow_indices, other_col_indices, values and weights must have one element for each mask, got ",
              other_crow_indices.size(), ", ", other_col_indices.size(), ", ", count, ", ", weights.size());
  DEFTX_CHECK(count <= kSummands, "values must be of at most ", kSummands, " masks, got ", count);
  std::vector<Summand> summands;
  summands.reserve(count);
  for (size_t j = 0; j < count; ++j) {
    const std::string number = "[" + std::to_string(j) + "]", crow = "other_crow_indices" + number,
                      col = "other_col_indices" + number, value = "values" + number;
    const Csr csr = check_mask(other_crow_indices[j], other_col_indices[j], device, crow, col);
    DEFTX_CHECK(other_col_indices[j].get_device_index() == col_indices.get_device_index(), col,
                " is on another device than col_indices");
    DEFTX_CHECK(csr.wide == entries.wide, col, " must have the dtype of col_indices");
    DEFTX_CHECK(csr.rows == entries.rows, crow, " has ", csr.rows + 1, " elements; ", entries.rows, " rows need ",
                entries.rows + 1);
    DEFTX_CHECK(csr.rows > 0 || csr.nnz == 0, "a mask without rows must have no entries, ", col, " has ", csr.nnz);
    check_compact(values[j], device, other_col_indices[j], csr.nnz, value.c_str());
    const int32_t dtype = dtype_of(values[j]);
    DEFTX_CHECK(dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_float64() ||
                    dtype == aoti_torch_dtype_bfloat16() || dtype == aoti_torch_dtype_float16(),
                value, " must be float32, float64, bfloat16 or float16");
    summands.push_back({csr, values[j].const_data_ptr(), dtype, weights[j]});
  }
  return summands;
}

}  // namespace deftx

// ---- CUDA sources only ----
#ifdef __CUDACC__
#include <cuda_runtime.h>

#define DEFTX_CUDA_CHECK(call)                                                                                \
  do {                                                                                                        \
    const cudaError_t deftx_error = (call);                                                                   \
    DEFTX_CHECK(deftx_error == cudaSuccess, "CUDA error in deftx_kernels: ", cudaGetErrorString(deftx_error), \
                " in " #call);                                                                                \
  } while (0)
#define DEFTX_LAUNCH_CHECK() DEFTX_CUDA_CHECK(cudaGetLastError())

namespace deftx {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// For operators that copy from or to the host's memory and wait for it: a captured copy would use that memory again,
// long freed, at each replay.
inline void refuse_capture(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  DEFTX_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  DEFTX_CHECK(
      status == cudaStreamCaptureStatusNone,
      "this operator of deftx_kernels exchanges data with the host and cannot be captured in a CUDA graph: call "
      "it before the capture");
}

// How many blocks of this kernel the current device holds at once: the grid of a grid-stride kernel.
template <typename Kernel>
int64_t resident_blocks(Kernel* kernel, int threads, size_t shared_bytes = 0) {
  int device = 0, processors = 0, per_processor = 0;
  DEFTX_CUDA_CHECK(cudaGetDevice(&device));
  DEFTX_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  DEFTX_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared_bytes));
  return static_cast<int64_t>(processors) * std::max(per_processor, 1);
}

}  // namespace deftx
#endif
