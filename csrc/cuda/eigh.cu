// eigh and eigvalsh of batches of symmetric matrices: one block to a matrix, so that a batch keeps as many
// multiprocessors busy as it has matrices. torch.linalg's batch is a loop over the matrices for n > 32 up to
// torch 2.11, and Jacobi's method after that.
//
// 1. `tridiagonal_kernel` (tridiagonal.cuh): Householder's reduction in panels (Dongarra, Hammarling & Sorensen 1989;
//    latrd of LAPACK). Only the upper triangle is read, once a column: a matrix of n rows moves about n^3 / 6 elements
//    through the memory.
// 2. `bisection_kernel`: the eigenvalues, a thread to each (Kahan's count of sign changes).
// 3. For vectors (tridiagonal_vectors.cuh): bisection in float64, a thread to each eigenvalue; inverse iteration, a
//    thread to each vector; in float64 a step towards the nearest orthogonal matrix, which is two products; and the
//    product with the reflectors.
//
// Matrices are scaled by a power of 2 to a largest entry near 1. Every sum has one order: the same bits in every run.
#include "tridiagonal_vectors.cuh"

namespace deftx {
namespace {

template <typename Real>
__global__ void __launch_bounds__(128) bisection_kernel(const Real* __restrict__ diagonal,      // [b, n]
                                                        const Real* __restrict__ off_diagonal,  // [b, n]
                                                        const Real* __restrict__ unscale,       // [b]
                                                        Real* __restrict__ values,              // [b, n], ascending
                                                        int n, int blocks_each) {
  extern __shared__ __align__(16) double shared[];
  Real *d = reinterpret_cast<Real*>(shared), *squares = d + n;
  const int64_t matrix = blockIdx.x / blocks_each;
  diagonal += matrix * n, off_diagonal += matrix * n;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    d[i] = diagonal[i];
    squares[i] = i < n - 1 ? off_diagonal[i] * off_diagonal[i] : Real(0);
  }
  __syncthreads();
  const int rank = static_cast<int>(blockIdx.x % blocks_each) * blockDim.x + threadIdx.x;
  if (rank < n) values[matrix * n + rank] = bisect(d, squares, n, 0, n, rank) * unscale[matrix];
}

// ---- on the host ----

// One kernel's block: panel_size and warps, whose vectors of n elements fit in shared memory.
struct Shape {
  int panel_size, warps, bytes;
};

int most_shared() {  // bytes of a block
  int device = 0, bytes = 0;
  DEFTX_CUDA_CHECK(cudaGetDevice(&device));
  DEFTX_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

Shape shape_of(int64_t n, int64_t element_size) {
  const int64_t padded = padded_rows(static_cast<int>(n)), row_bytes = padded * element_size;
  const int64_t vectors = (most_shared() - 2048) / row_bytes;  // beside the kernel's own arrays
  int64_t panel_size = kMaxPanel;
  while (panel_size > 1 && vectors - 2 * panel_size < kFewWarps) panel_size /= 2;
  const int64_t wanted = (padded + 2 * kRows - 1) / (2 * kRows);  // two turns to a warp, of the whole matrix
  const int64_t warps = std::min({vectors - 2 * panel_size, std::max<int64_t>(wanted, 2), int64_t{kMaxWarps}});
  DEFTX_CHECK(warps >= 2, "eigh: matrices of ", n, " rows do not fit in a multiprocessor's shared memory");
  const int64_t bytes = (2 * panel_size + warps) * row_bytes;
  return {static_cast<int>(panel_size), static_cast<int>(warps), static_cast<int>(bytes)};
}

struct Tridiagonal {
  Tensor work, diagonal, off_diagonal, taus, unscale;
  Shape shape;
};

void check_matrices(const Tensor& matrices) {
  check_tensor(matrices, Device::kCuda, "matrices");
  DEFTX_CHECK(matrices.dim() == 3 && matrices.size(1) == matrices.size(2), "matrices must have shape [b, n, n]");
  const int32_t dtype = dtype_of(matrices);
  DEFTX_CHECK(dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_float64(),
              "matrices must be float32 or float64");
  DEFTX_CHECK(matrices.size(0) < (int64_t{1} << 24), "eigh: too many matrices: ", matrices.size(0));
}

template <typename Real>
Real* data_of(const Tensor& t) {
  return static_cast<Real*>(const_cast<void*>(t.const_data_ptr()));
}

template <typename Kernel>
void allow_shared(Kernel* kernel, int64_t bytes) {
  DEFTX_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

template <typename Real>
Tridiagonal tridiagonal(const Tensor& matrices, cudaStream_t stream) {
  using torch::stable::new_empty;
  const int64_t b = matrices.size(0), n = matrices.size(1), padded = padded_rows(static_cast<int>(n));
  Tridiagonal t{new_empty(matrices, {b, padded, padded}),
                new_empty(matrices, {b, n}),
                new_empty(matrices, {b, n}),
                new_empty(matrices, {b, n}),
                new_empty(matrices, {b}),
                shape_of(n, sizeof(Real))};
  allow_shared(tridiagonal_kernel<Real>, t.shape.bytes);
  tridiagonal_kernel<Real><<<static_cast<unsigned>(b), 32 * t.shape.warps, t.shape.bytes, stream>>>(
      data_of<Real>(matrices), data_of<Real>(t.work), data_of<Real>(t.diagonal), data_of<Real>(t.off_diagonal),
      data_of<Real>(t.taus), data_of<Real>(t.unscale), static_cast<int>(n), t.shape.panel_size);
  DEFTX_LAUNCH_CHECK();
  return t;
}

template <typename Real>
void find_values(const Tensor& matrices, const Tensor& values, cudaStream_t stream) {
  constexpr int kThreads = 128;
  const Tridiagonal t = tridiagonal<Real>(matrices, stream);
  const int64_t b = values.size(0), n = values.size(1), blocks_each = (n + kThreads - 1) / kThreads,
                bytes = 2 * n * sizeof(Real);
  allow_shared(bisection_kernel<Real>, bytes);
  bisection_kernel<Real><<<static_cast<unsigned>(b * blocks_each), kThreads, bytes, stream>>>(
      data_of<Real>(t.diagonal), data_of<Real>(t.off_diagonal), data_of<Real>(t.unscale), data_of<Real>(values),
      static_cast<int>(n), static_cast<int>(blocks_each));
  DEFTX_LAUNCH_CHECK();
}

// The vectors, one to a row, of `count` matrices from `first` on. scratch [4, count, n, n]
template <typename Real>
void find_some_vectors(const Tridiagonal& t, const Tensor& found, Real* values, Real* vectors, double* scratch,
                       int64_t first, int64_t count, int64_t n, cudaStream_t stream) {
  const int64_t size = count * n * n, padded = padded_rows(static_cast<int>(n)), iteration_bytes = 36 * n;
  const auto b = static_cast<unsigned>(count);
  const int rows = static_cast<int>(n);
  double *x = scratch, *rest = scratch + size;
  const int threads = static_cast<int>(std::min<int64_t>((n + 31) / 32 * 32, kIterationThreads));
  allow_shared(inverse_iteration_kernel<Real>, iteration_bytes);
  inverse_iteration_kernel<Real><<<b, threads, iteration_bytes, stream>>>(
      data_of<Real>(t.diagonal) + first * n, data_of<Real>(t.off_diagonal) + first * n,
      data_of<double>(found) + first * n, x, rest, rows);
  DEFTX_LAUNCH_CHECK();
  if (sizeof(Real) == 8) {
    const int tiles = (rows + kTile - 1) / kTile;
    polish_kernel<false><<<b * tiles * tiles, kTile * kTile / 16, 0, stream>>>(x, x, rest, rows, tiles);
    DEFTX_LAUNCH_CHECK();
    polish_kernel<true><<<b * tiles * tiles, kTile * kTile / 16, 0, stream>>>(x, rest, rest + size, rows, tiles);
    DEFTX_LAUNCH_CHECK();
    x = rest + size;
  }
  const int64_t warp_bytes = kRows * n * sizeof(Real);
  const int64_t warps = std::clamp<int64_t>(most_shared() / warp_bytes, 1, kVectorWarps);
  const int64_t blocks_each = (n + kRows * warps - 1) / (kRows * warps);
  allow_shared(reflect_kernel<Real>, warps * warp_bytes);
  reflect_kernel<Real><<<static_cast<unsigned>(b * blocks_each), 32 * warps, warps * warp_bytes, stream>>>(
      x, data_of<double>(found) + first * n, data_of<Real>(t.work) + first * padded * padded,
      data_of<Real>(t.taus) + first * n, data_of<Real>(t.unscale) + first, values + first * n, vectors + first * n * n,
      rows, static_cast<int>(blocks_each));
  DEFTX_LAUNCH_CHECK();
}

// Returns the vectors, one to a row.
template <typename Real>
Tensor find_vectors(const Tensor& matrices, const Tensor& values, cudaStream_t stream) {
  constexpr int64_t kScratch = 1 << 30;  // bytes, or what one matrix needs
  constexpr int kThreads = 128;
  const Tridiagonal t = tridiagonal<Real>(matrices, stream);
  const int64_t b = values.size(0), n = values.size(1), blocks_each = (n + kThreads - 1) / kThreads,
                bytes = 2 * n * sizeof(double), some = std::clamp<int64_t>(kScratch / (32 * n * n), 1, b);
  const auto float64 = torch::headeronly::ScalarType::Double;
  const Tensor vectors = torch::stable::new_empty(matrices, {b, n, n}),
               found = torch::stable::new_empty(matrices, {b, n}, float64),
               scratch = torch::stable::new_empty(matrices, {4, some, n, n}, float64);
  allow_shared(block_values_kernel<Real>, bytes);
  block_values_kernel<Real><<<static_cast<unsigned>(b * blocks_each), kThreads, bytes, stream>>>(
      data_of<Real>(t.diagonal), data_of<Real>(t.off_diagonal), data_of<double>(found), static_cast<int>(n),
      static_cast<int>(blocks_each));
  DEFTX_LAUNCH_CHECK();
  for (int64_t first = 0; first < b; first += some) {
    find_some_vectors(t, found, data_of<Real>(values), data_of<Real>(vectors), data_of<double>(scratch), first,
                      std::min(some, b - first), n, stream);
  }
  return vectors;
}

Tensor eigvalsh(Tensor matrices) {
  check_matrices(matrices);
  const DeviceGuard guard(matrices.get_device_index());
  const cudaStream_t stream = current_stream(matrices);
  const Tensor values = torch::stable::new_empty(matrices, {matrices.size(0), matrices.size(1)});
  if (matrices.numel() == 0) return values;
  const bool wide = dtype_of(matrices) == aoti_torch_dtype_float64();
  wide ? find_values<double>(matrices, values, stream) : find_values<float>(matrices, values, stream);
  return values;
}

// All vectors, whatever the cut: they are found together.
std::tuple<Tensor, Tensor> eigh(Tensor matrices, int64_t, double, double) {
  check_matrices(matrices);
  const DeviceGuard guard(matrices.get_device_index());
  const cudaStream_t stream = current_stream(matrices);
  const int64_t b = matrices.size(0), n = matrices.size(1);
  const Tensor values = torch::stable::new_empty(matrices, {b, n});
  if (matrices.numel() == 0) return {values, torch::stable::new_empty(matrices, {b, n, n})};
  const bool wide = dtype_of(matrices) == aoti_torch_dtype_float64();
  const Tensor rows =
      wide ? find_vectors<double>(matrices, values, stream) : find_vectors<float>(matrices, values, stream);
  return {values, torch::stable::transpose(rows, 1, 2)};
}

}  // namespace

DEFTX_CUDA_LIBRARY_IMPL(m) {
  m.impl("eigh", TORCH_BOX(&eigh));
  m.impl("eigvalsh", TORCH_BOX(&eigvalsh));
}

}  // namespace deftx
