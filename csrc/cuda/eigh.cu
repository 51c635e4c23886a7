// eigh and eigvalsh of batches of symmetric matrices: one block to a matrix, so that a batch keeps as many
// multiprocessors busy as it has matrices. torch.linalg's batch is a loop over the matrices for n > 32 up to
// torch 2.11, and Jacobi's method after that.
//
// 1. `tridiagonal_kernel` (tridiagonal.cuh): Householder's reduction in panels (Dongarra, Hammarling & Sorensen 1989;
//    latrd of LAPACK). Only the upper triangle is read, once a column: a matrix of n rows moves about n^3 / 6 elements
//    through the memory.
// 2. `bisection_kernel`: the eigenvalues, a thread to each (Kahan's count of sign changes); or `vectors_kernel`:
//    implicit QL steps (Wilkinson's shift). One warp finds the rotations of a step while the others apply those of the
//    step before.
//
// Matrices are scaled by a power of 2 to a largest entry near 1. Every sum has one order: the same bits in every run.
#include "tridiagonal.cuh"

namespace deftx {
namespace {

constexpr int kSteps = 30;  // QL steps for an eigenvalue, at most; it takes about 1.7

// ---- 2. eigenvalues alone ----

// How many eigenvalues of the tridiagonal matrix are below x.
template <typename Real>
__device__ int below(const Real* diagonal, const Real* squares, int n, Real x, Real smallest) {
  int count = 0;
  Real pivot = 1;
  for (int i = 0; i < n; ++i) {
    pivot = diagonal[i] - x - (i > 0 ? squares[i - 1] / pivot : Real(0));
    if (fabs(pivot) < smallest) pivot = -smallest;
    count += pivot < 0;
  }
  return count;
}

template <typename Real>
__global__ void __launch_bounds__(128) bisection_kernel(const Real* __restrict__ diagonal,      // [b, n]
                                                        const Real* __restrict__ off_diagonal,  // [b, n]
                                                        const Real* __restrict__ unscale,       // [b]
                                                        Real* __restrict__ values,              // [b, n], ascending
                                                        int n, int blocks_each) {
  extern __shared__ double shared[];
  Real *d = reinterpret_cast<Real*>(shared), *squares = d + n;
  const int64_t matrix = blockIdx.x / blocks_each;
  diagonal += matrix * n, off_diagonal += matrix * n;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    d[i] = diagonal[i];
    squares[i] = i < n - 1 ? off_diagonal[i] * off_diagonal[i] : Real(0);
  }
  __syncthreads();
  const int rank = static_cast<int>(blockIdx.x % blocks_each) * blockDim.x + threadIdx.x;
  if (rank >= n) return;
  Real low = 0, high = 0, largest = 1, left = 0;  // Gershgorin's interval
  for (int i = 0; i < n; ++i) {
    const Real right = sqrt(squares[i]), radius = left + right;
    low = min(low, d[i] - radius), high = max(high, d[i] + radius), largest = max(largest, squares[i]);
    left = right;
  }
  constexpr Real kEps = cuda::std::numeric_limits<Real>::epsilon();
  // The tridiagonal form itself is wrong by about kEps of the norm.
  const Real rounding = kEps * max(-low, high), smallest = cuda::std::numeric_limits<Real>::min() * largest;
  low -= 4 * rounding, high += 4 * rounding;
  while (high - low > rounding / 4) {
    const Real middle = low + (high - low) / 2;
    if (middle <= low || middle >= high) break;
    (below(d, squares, n, middle, smallest) > rank ? high : low) = middle;
  }
  values[matrix * n + rank] = (low + (high - low) / 2) * unscale[matrix];
}

// ---- 2. eigenvalues and eigenvectors ----

// Rotations of rows i and i + 1 for i = from, from - 1, ..., to.
template <typename Real>
struct Step {
  Real *cosines, *sines;  // [n]
  int from, to;
};

// Where the QL iteration is: the eigenvalues before `l` are found.
struct Progress {
  int l, steps;
  bool failed;
};

// By one warp: the rotations of the next step, and what they make of the tridiagonal matrix. Returns whether there is
// one.
template <typename Real>
__device__ bool next_step(Real* d, Real* e, int n, Progress& at, Step<Real>& step) {  // [n], [n]
  constexpr Real kEps = cuda::std::numeric_limits<Real>::epsilon() / 2;
  const int lane = threadIdx.x % 32;
  while (at.l < n) {
    const int l = at.l;
    int m = n - 1;  // the first from l on that is not joined with the next
    for (int base = l; base < n - 1; base += 32) {
      const int i = base + lane;
      const unsigned apart =
          __ballot_sync(kFull, i < n - 1 && fabs(e[i]) <= kEps * (fabs(d[i]) + fabs(d[i + 1])) + kEps * kEps);
      if (apart) {
        m = base + __ffs(apart) - 1;
        break;
      }
    }
    if (m == l) {
      ++at.l, at.steps = 0;
      continue;
    }
    if (at.steps++ == kSteps) {
      at.failed = true;
      return false;
    }
    int i = m - 1;
    if (lane == 0) {
      Real g = (d[l + 1] - d[l]) / (2 * e[l]), r = hypot(g, Real(1));
      g = d[m] - d[l] + e[l] / (g + copysign(r, g));
      Real s = 1, c = 1, p = 0;
      for (; i >= l; --i) {
        const Real f = s * e[i], b = c * e[i];
        r = hypot(f, g);
        e[i + 1] = r;
        if (r == 0) break;  // the matrix has come apart here
        s = f / r, c = g / r;
        step.cosines[i] = c, step.sines[i] = s;
        g = d[i + 1] - p;
        r = (d[i] - g) * s + 2 * c * b;
        p = s * r;
        d[i + 1] = g + p;
        g = c * r - b;
      }
      d[i + 1] -= p;  // i + 1 = l if all went through
      if (i < l) e[l] = g;
      e[m] = 0;
    }
    i = __shfl_sync(kFull, i, 0);
    __syncwarp();
    step.from = m - 1, step.to = i + 1;
    if (step.from >= step.to) return true;
  }
  return false;
}

// By the block's warps but the first: vector by vector, a thread to each of their components.
template <typename Real>
__device__ void rotate(Real* vectors,  // [n, n]: one vector to a row
                       int n, const Step<Real>& step) {
  constexpr int kAhead = 4;  // loads that do not wait for one another
  for (int r = threadIdx.x - 32; r < n; r += blockDim.x - 32) {
    Real* z = vectors + r;
    Real carried = z[int64_t{step.from + 1} * n];
    for (int i = step.from; i >= step.to; i -= kAhead) {
      Real next[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) next[a] = i - a >= step.to ? z[int64_t{i - a} * n] : Real(0);
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (i - a < step.to) break;
        const Real c = step.cosines[i - a], s = step.sines[i - a];
        z[int64_t{i - a + 1} * n] = s * next[a] + c * carried;
        carried = c * next[a] - s * carried;
      }
    }
    z[int64_t{step.to} * n] = carried;
  }
}

template <typename Real>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    vectors_kernel(Real* reflectors,                       // [b, padded, padded]: from tridiagonal_kernel; overwritten
                   Real* vectors,                          // [b, n, n]: the eigenvectors, in rows
                   const Real* __restrict__ diagonal,      // [b, n]
                   const Real* __restrict__ off_diagonal,  // [b, n]
                   const Real* __restrict__ taus,          // [b, n]
                   const Real* __restrict__ unscale,       // [b]
                   Real* __restrict__ values,              // [b, n], ascending
                   int n) {
  extern __shared__ double shared[];
  __shared__ bool more[2];
  __shared__ int range[2][2];  // from, to
  __shared__ bool failed;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  Real *d = reinterpret_cast<Real*>(shared), *e = d + n, *rotations = e + n;  // rotations [2, 2, n]
  const int64_t matrix = blockIdx.x;
  const int padded = padded_rows(n);
  reflectors += matrix * padded * padded, vectors += matrix * n * n, taus += matrix * n;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    d[i] = diagonal[matrix * n + i];
    e[i] = i < n - 1 ? off_diagonal[matrix * n + i] : Real(0);
  }
  // Column c of the product of all reflectors, by one warp, as row c: reflectors from c on leave the unit vector as it
  // is.
  for (int c = warp; c < n; c += warps) {
    Real* z = vectors + int64_t{c} * n;
    for (int r = lane; r < n; r += 32) z[r] = r == c;
    for (int j = c - 1; j >= 0; --j) {
      const Real tau = taus[j], *v = reflectors + int64_t{j} * padded;
      const int first = (j + 1) / 32 * 32 + lane;  // each lane meets the rows that it wrote
      Real dot = 0;
      for (int r = first; r < n; r += 32) dot += r > j ? v[r] * z[r] : Real(0);
      dot = tau * warp_sum(dot);
      for (int r = first; r < n; r += 32) {
        if (r > j) z[r] -= dot * v[r];
      }
    }
  }
  __syncthreads();

  const auto step_of = [&](int i) {
    return Step<Real>{rotations + i * 2 * n, rotations + i * 2 * n + n, range[i][0], range[i][1]};
  };
  Progress at{0, 0, false};  // of the first warp
  for (int round = 0;; ++round) {
    const int i = round % 2;
    if (warp == 0) {
      Step<Real> step = step_of(i);
      const bool found = next_step(d, e, n, at, step);
      if (lane == 0) more[i] = found, range[i][0] = step.from, range[i][1] = step.to, failed = at.failed;
    } else if (round > 0) {
      rotate(vectors, n, step_of(1 - i));
    }
    __syncthreads();
    if (!more[i]) break;
  }

  int* const places = reinterpret_cast<int*>(rotations);  // of each, when sorted
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    int place = failed ? i : 0;
    for (int other = 0; other < n && !failed; ++other) place += d[other] < d[i] || (d[other] == d[i] && other < i);
    places[i] = place;
    values[matrix * n + place] = failed ? cuda::std::numeric_limits<Real>::quiet_NaN() : d[i] * unscale[matrix];
  }
  for (int i = warp; i < n; i += warps) {
    for (int r = lane; r < n; r += 32) reflectors[int64_t{i} * padded + r] = vectors[int64_t{i} * n + r];
  }
  __syncthreads();
  for (int i = warp; i < n; i += warps) {
    for (int r = lane; r < n; r += 32) vectors[int64_t{places[i]} * n + r] = reflectors[int64_t{i} * padded + r];
  }
}

// ---- on the host ----

// One kernel's block: panel_size and warps, whose vectors of n elements fit in shared memory.
struct Shape {
  int panel_size, warps, bytes;
};

Shape shape_of(int64_t n, int64_t element_size) {
  int device = 0, most_shared = 0;
  DEFTX_CUDA_CHECK(cudaGetDevice(&device));
  DEFTX_CUDA_CHECK(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const int64_t padded = padded_rows(static_cast<int>(n)), row_bytes = padded * element_size;
  const int64_t vectors = (most_shared - 2048) / row_bytes;  // beside the kernel's own arrays
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

// Returns the vectors, one to a row.
template <typename Real>
Tensor find_vectors(const Tensor& matrices, const Tensor& values, cudaStream_t stream) {
  const Tridiagonal t = tridiagonal<Real>(matrices, stream);
  const int64_t b = values.size(0), n = values.size(1), bytes = 6 * n * sizeof(Real);
  const Tensor vectors = torch::stable::new_empty(matrices, {b, n, n});
  allow_shared(vectors_kernel<Real>, bytes);
  vectors_kernel<Real><<<static_cast<unsigned>(b), 32 * t.shape.warps, bytes, stream>>>(
      data_of<Real>(t.work), data_of<Real>(vectors), data_of<Real>(t.diagonal), data_of<Real>(t.off_diagonal),
      data_of<Real>(t.taus), data_of<Real>(t.unscale), data_of<Real>(values), static_cast<int>(n));
  DEFTX_LAUNCH_CHECK();
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
