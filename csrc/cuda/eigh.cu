// eigh and eigvalsh of batches of symmetric matrices: one block to a matrix, so that a batch keeps as many multiprocessors busy as
// it has matrices. torch.linalg's batch is a loop over the matrices for n > 32 up to torch 2.11, and Jacobi's method after that.
//
// 1. `tridiagonal_kernel`: Householder's reduction in panels (Dongarra, Hammarling & Sorensen 1989; LAPACK's latrd). Only the upper
//    triangle is read, once a column: a matrix of n rows moves about n^3 / 6 elements through the memory.
// 2. `bisection_kernel`: the eigenvalues, a thread to each (Kahan's count of sign changes); or `vectors_kernel`: implicit QL steps
//    (Wilkinson's shift). One warp finds the rotations of a step while the others apply those of the step before.
//
// Matrices are scaled by a power of 2 to a largest entry near 1. Every sum has one order: the same bits in every run.
#include <climits>
#include <cuda/std/limits>

#include "../stable.h"

namespace deftx {
namespace {

constexpr unsigned kFull = 0xffffffffu;
constexpr int kMaxWarps = 32;
constexpr int kRows = 4;       // of a matrix, that a warp takes at a time
constexpr int kMaxPanel = 16;  // columns whose update of the rest is put off
constexpr int kFewWarps = 8;   // a smaller panel makes room for so many
constexpr int kSteps = 30;     // QL steps for an eigenvalue, at most; it takes about 1.7

template <typename Real>
__device__ Real warp_sum(Real x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(kFull, x, d);
  return x;
}

// By the whole block.
template <typename Real>
__device__ Real block_sum(Real x, Real* partial) {  // [kMaxWarps], shared
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  x = warp_sum(x);
  __syncthreads();  // the sums of a call before this one have been read
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : Real(0));
}

// The matrix into `work`, scaled; returns what its eigenvalues are to be multiplied by, NaN if an entry is not finite.
template <typename Real>
__device__ Real copy_scaled(const Real* matrix, Real* work, int64_t size) {  // [n, n]
  __shared__ int exponents[kMaxWarps];
  int largest = INT_MIN;  // frexp's exponent; that of zero is 0, of what is not finite, anything
  bool finite = true;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
    const Real x = matrix[i];
    int exponent;
    frexp(x, &exponent);
    finite &= isfinite(x);
    if (x != 0) largest = max(largest, exponent);
  }
  largest = __reduce_max_sync(kFull, largest);
  if (threadIdx.x % 32 == 0) exponents[threadIdx.x / 32] = largest;
  finite = __syncthreads_and(finite);
  for (int w = 0; w < static_cast<int>(blockDim.x / 32); ++w) largest = max(largest, exponents[w]);
  const int exponent = !finite || largest == INT_MIN ? 0 : largest;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) work[i] = ldexp(matrix[i], -exponent);
  return finite ? ldexp(Real(1), exponent) : cuda::std::numeric_limits<Real>::quiet_NaN();
}

// ---- 1. tridiagonal form --------------------------------------------------------------------------------------------------

// A panel of columns whose reflectors I - tau v v' are made but not yet applied to the columns after it: the matrix stands for
// A - V W' - W V'. Shared memory.
template <typename Real>
struct Panel {
  Real *V, *W;  // [panel, n]: one reflector's vector to a row
  int n;

  __device__ Real pending(int t, int row, int column) const {
    return V[t * n + row] * W[t * n + column] + W[t * n + row] * V[t * n + column];
  }
};

// sums[warp] += A v by the rows that this warp takes, of the upper triangle from row and column `first` on. Lane c % 32 alone
// touches column c of its warp's sums.
template <typename Real>
__device__ void multiply(const Real* A, const Real* v, Real* sums, int first, int n) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  Real* own = sums + warp * n;
  for (int c = first / 32 * 32 + lane; c < n; c += 32) own[c] = 0;
  for (int top = first + warp * kRows; top < n; top += warps * kRows) {
    Real mine[kRows], dot[kRows];  // v and A v at these rows
#pragma unroll
    for (int r = 0; r < kRows; ++r) mine[r] = top + r < n ? v[top + r] : Real(0), dot[r] = 0;
    const Real* row = A + int64_t{top} * n;
#pragma unroll 2
    for (int c = top / 32 * 32 + lane; c < n; c += 32) {
      Real a[kRows], sum = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) a[r] = top + r <= c ? row[int64_t{r} * n + c] : Real(0);  // c < n
      const Real here = c >= first ? v[c] : Real(0);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        dot[r] += a[r] * here;
        if (top + r < c) sum += a[r] * mine[r];
      }
      own[c] += sum;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Real whole = warp_sum(dot[r]);
      if (top + r < n && lane == (top + r) % 32) own[top + r] += whole;
    }
  }
}

// A -= V W' + W V', of the upper triangle from row and column `first` on.
template <typename Real>
__device__ void update(Real* A, const Panel<Real>& panel, int panel_size, int first) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, n = panel.n;
  for (int top = first + warp * kRows; top < n; top += warps * kRows) {
    Real* row = A + int64_t{top} * n;
    for (int c = top / 32 * 32 + lane; c < n; c += 32) {
      Real a[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) a[r] = top + r <= c ? row[int64_t{r} * n + c] : Real(0);
      for (int t = 0; t < panel_size; ++t) {
        const Real *V = panel.V + t * n, *W = panel.W + t * n;
        const Real v = V[c], w = W[c];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int i = min(top + r, n - 1);
          a[r] -= V[i] * w + W[i] * v;
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (top + r <= c) row[int64_t{r} * n + c] = a[r];
      }
    }
  }
}

// Row j of the upper triangle of `work` becomes, right of the diagonal, the vector of reflector j.
template <typename Real>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    tridiagonal_kernel(const Real* __restrict__ matrices,  // [b, n, n]
                       Real* work,                         // [b, n, n]
                       Real* __restrict__ diagonal,        // [b, n]
                       Real* __restrict__ off_diagonal,    // [b, n]: the last of each is not used
                       Real* __restrict__ taus,            // [b, n], likewise
                       Real* __restrict__ unscale,         // [b]
                       int n, int panel_size) {
  extern __shared__ double shared[];
  __shared__ Real partial[kMaxWarps], dots[2 * kMaxPanel];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const Panel<Real> panel{reinterpret_cast<Real*>(shared), reinterpret_cast<Real*>(shared) + panel_size * n, n};
  Real* sums = panel.W + panel_size * n;  // [warps, n]
  const int64_t size = int64_t{n} * n;
  Real* A = work + blockIdx.x * size;
  diagonal += blockIdx.x * int64_t{n}, off_diagonal += blockIdx.x * int64_t{n}, taus += blockIdx.x * int64_t{n};
  const Real factor = copy_scaled(matrices + blockIdx.x * size, A, size);
  if (threadIdx.x == 0) unscale[blockIdx.x] = factor;
  __syncthreads();

  for (int j = 0; j < n; ++j) {
    const int k = j % panel_size;  // reflectors that are pending
    Real *v = panel.V + k * n, *w = panel.W + k * n, *row = A + int64_t{j} * n;
    Real square = 0;
    for (int c = j + threadIdx.x; c < n; c += blockDim.x) {
      Real a = row[c];
      for (int t = 0; t < k; ++t) a -= panel.pending(t, j, c);
      if (c == j) {
        diagonal[j] = a;
      } else {
        v[c] = a;
        if (c > j + 1) square += a * a;
      }
    }
    if (j == n - 1) break;
    square = block_sum(square, partial);
    const Real alpha = v[j + 1];
    const Real beta = square == 0 ? alpha : -copysign(sqrt(alpha * alpha + square), alpha);
    const Real tau = square == 0 ? Real(0) : (beta - alpha) / beta, scale = square == 0 ? Real(0) : 1 / (alpha - beta);
    __syncthreads();  // everyone has read alpha
    for (int c = j + 1 + threadIdx.x; c < n; c += blockDim.x) {
      v[c] = row[c] = c == j + 1 ? Real(1) : v[c] * scale;
      w[c] = 0;
    }
    if (threadIdx.x == 0) off_diagonal[j] = beta, taus[j] = tau;
    __syncthreads();
    if (tau != 0) {  // w = tau (p - tau/2 (p v) v) with p = (A - V W' - W V') v
      for (int q = warp; q < 2 * k; q += warps) {
        const Real* other = q < k ? panel.W + q * n : panel.V + (q - k) * n;
        Real dot = 0;
        for (int c = j + 1 + lane; c < n; c += 32) dot += other[c] * v[c];
        dot = warp_sum(dot);
        if (lane == 0) dots[q] = dot;
      }
      multiply(A, v, sums, j + 1, n);
      __syncthreads();
      Real dot = 0;
      for (int c = j + 1 + threadIdx.x; c < n; c += blockDim.x) {
        Real p = 0;
        for (int i = 0; i < warps; ++i) p += sums[i * n + c];
        for (int t = 0; t < k; ++t) p -= panel.V[t * n + c] * dots[t] + panel.W[t * n + c] * dots[k + t];
        w[c] = p *= tau;
        dot += p * v[c];
      }
      dot = block_sum(dot, partial);
      for (int c = j + 1 + threadIdx.x; c < n; c += blockDim.x) w[c] -= tau / 2 * dot * v[c];
    }
    __syncthreads();
    if (k == panel_size - 1) {
      update(A, panel, panel_size, j + 1);
      __syncthreads();
    }
  }
}

// ---- 2. eigenvalues alone -------------------------------------------------------------------------------------------------

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

// ---- 2. eigenvalues and eigenvectors --------------------------------------------------------------------------------------

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

// By one warp: the rotations of the next step, and what they make of the tridiagonal matrix. Returns whether there is one.
template <typename Real>
__device__ bool next_step(Real* d, Real* e, int n, Progress& at, Step<Real>& step) {  // [n], [n]
  constexpr Real kEps = cuda::std::numeric_limits<Real>::epsilon() / 2;
  const int lane = threadIdx.x % 32;
  while (at.l < n) {
    const int l = at.l;
    int m = n - 1;  // the first from l on that is not joined with the next
    for (int base = l; base < n - 1; base += 32) {
      const int i = base + lane;
      const unsigned apart = __ballot_sync(kFull, i < n - 1 && fabs(e[i]) <= kEps * (fabs(d[i]) + fabs(d[i + 1])) + kEps * kEps);
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

// By the block's warps but the first: column by column of the vectors, a thread to each row of them.
template <typename Real>
__device__ void rotate(Real* vectors, int n, const Step<Real>& step) {  // [n, n]: one vector to a row
  constexpr int kAhead = 4;                                             // loads that do not wait for one another
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
    vectors_kernel(Real* reflectors,                   // [b, n, n]: from tridiagonal_kernel; at the end the eigenvectors, in rows
                   Real* vectors,                      // [b, n, n]
                   const Real* __restrict__ diagonal,  // [b, n]
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
  reflectors += matrix * n * n, vectors += matrix * n * n, taus += matrix * n;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    d[i] = diagonal[matrix * n + i];
    e[i] = i < n - 1 ? off_diagonal[matrix * n + i] : Real(0);
  }
  // Column c of the product of all reflectors, by one warp, as row c: reflectors from c on leave the unit vector as it is.
  for (int c = warp; c < n; c += warps) {
    Real* z = vectors + int64_t{c} * n;
    for (int r = lane; r < n; r += 32) z[r] = r == c;
    for (int j = c - 1; j >= 0; --j) {
      const Real tau = taus[j], *v = reflectors + int64_t{j} * n;
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

  for (int i = threadIdx.x; i < n; i += blockDim.x) {  // sorted, the place of each
    int place = failed ? i : 0;
    for (int other = 0; other < n && !failed; ++other) place += d[other] < d[i] || (d[other] == d[i] && other < i);
    reinterpret_cast<int*>(rotations)[i] = place;
    values[matrix * n + place] = failed ? cuda::std::numeric_limits<Real>::quiet_NaN() : d[i] * unscale[matrix];
  }
  __syncthreads();
  for (int i = warp; i < n; i += warps) {
    const int place = reinterpret_cast<const int*>(rotations)[i];
    for (int r = lane; r < n; r += 32) reflectors[int64_t{place} * n + r] = vectors[int64_t{i} * n + r];
  }
}

// ---- on the host ----------------------------------------------------------------------------------------------------------

// One kernel's block: panel_size and warps, whose vectors of n elements fit in shared memory.
struct Shape {
  int panel_size, warps, bytes;
};

Shape shape_of(int64_t n, int64_t element_size) {
  int device = 0, most_shared = 0;
  DEFTX_CUDA_CHECK(cudaGetDevice(&device));
  DEFTX_CUDA_CHECK(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const int64_t vectors = (most_shared - 2048) / (n * element_size);  // beside the kernel's own arrays
  int64_t panel_size = kMaxPanel;
  while (panel_size > 1 && vectors - 2 * panel_size < kFewWarps) panel_size /= 2;
  const int64_t wanted = (n + 2 * kRows - 1) / (2 * kRows);  // two turns to a warp, of the whole matrix
  const int64_t warps = std::min({vectors - 2 * panel_size, std::max<int64_t>(wanted, 2), int64_t{kMaxWarps}});
  DEFTX_CHECK(warps >= 2, "eigh: matrices of ", n, " rows do not fit in a multiprocessor's shared memory");
  const int64_t bytes = (2 * panel_size + warps) * n * element_size;
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
  DEFTX_CHECK(dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_float64(), "matrices must be float32 or float64");
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
  const int64_t b = matrices.size(0), n = matrices.size(1);
  Tridiagonal t{new_empty(matrices, {b, n, n}), new_empty(matrices, {b, n}), new_empty(matrices, {b, n}),
                new_empty(matrices, {b, n}),    new_empty(matrices, {b}),    shape_of(n, sizeof(Real))};
  allow_shared(tridiagonal_kernel<Real>, t.shape.bytes);
  tridiagonal_kernel<Real><<<static_cast<unsigned>(b), 32 * t.shape.warps, t.shape.bytes, stream>>>(
      data_of<Real>(matrices), data_of<Real>(t.work), data_of<Real>(t.diagonal), data_of<Real>(t.off_diagonal),
      data_of<Real>(t.taus), data_of<Real>(t.unscale), static_cast<int>(n), t.shape.panel_size);
  DEFTX_LAUNCH_CHECK();
  return t;
}

template <typename Real>
void bisect(const Tridiagonal& t, const Tensor& values, cudaStream_t stream) {
  constexpr int kThreads = 128;
  const int64_t b = values.size(0), n = values.size(1), blocks_each = (n + kThreads - 1) / kThreads, bytes = 2 * n * sizeof(Real);
  allow_shared(bisection_kernel<Real>, bytes);
  bisection_kernel<Real><<<static_cast<unsigned>(b * blocks_each), kThreads, bytes, stream>>>(
      data_of<Real>(t.diagonal), data_of<Real>(t.off_diagonal), data_of<Real>(t.unscale), data_of<Real>(values),
      static_cast<int>(n), static_cast<int>(blocks_each));
  DEFTX_LAUNCH_CHECK();
}

template <typename Real>
void find_vectors(const Tridiagonal& t, const Tensor& values, cudaStream_t stream) {
  const int64_t b = values.size(0), n = values.size(1), bytes = 6 * n * sizeof(Real);
  const Tensor vectors = torch::stable::new_empty(t.work, {b, n, n});
  allow_shared(vectors_kernel<Real>, bytes);
  vectors_kernel<Real><<<static_cast<unsigned>(b), 32 * std::max(t.shape.warps, 2), bytes, stream>>>(
      data_of<Real>(t.work), data_of<Real>(vectors), data_of<Real>(t.diagonal), data_of<Real>(t.off_diagonal),
      data_of<Real>(t.taus), data_of<Real>(t.unscale), data_of<Real>(values), static_cast<int>(n));
  DEFTX_LAUNCH_CHECK();
}

Tensor eigvalsh(Tensor matrices) {
  check_matrices(matrices);
  const DeviceGuard guard(matrices.get_device_index());
  const cudaStream_t stream = current_stream(matrices);
  const Tensor values = torch::stable::new_empty(matrices, {matrices.size(0), matrices.size(1)});
  if (matrices.numel() == 0) return values;
  if (dtype_of(matrices) == aoti_torch_dtype_float64()) {
    bisect<double>(tridiagonal<double>(matrices, stream), values, stream);
  } else {
    bisect<float>(tridiagonal<float>(matrices, stream), values, stream);
  }
  return values;
}

std::tuple<Tensor, Tensor> eigh(Tensor matrices) {
  check_matrices(matrices);
  const DeviceGuard guard(matrices.get_device_index());
  const cudaStream_t stream = current_stream(matrices);
  const Tensor values = torch::stable::new_empty(matrices, {matrices.size(0), matrices.size(1)});
  Tensor vectors = matrices;
  if (matrices.numel() == 0) {
    vectors = torch::stable::new_empty(matrices, {matrices.size(0), matrices.size(1), matrices.size(1)});
  } else if (dtype_of(matrices) == aoti_torch_dtype_float64()) {
    const Tridiagonal t = tridiagonal<double>(matrices, stream);
    find_vectors<double>(t, values, stream);
    vectors = t.work;
  } else {
    const Tridiagonal t = tridiagonal<float>(matrices, stream);
    find_vectors<float>(t, values, stream);
    vectors = t.work;
  }
  return {values, torch::stable::transpose(vectors, 1, 2)};
}

}  // namespace

DEFTX_CUDA_LIBRARY_IMPL(m) {
  m.impl("eigh", TORCH_BOX(&eigh));
  m.impl("eigvalsh", TORCH_BOX(&eigvalsh));
}

}  // namespace deftx
