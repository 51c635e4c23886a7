// Eigenvalues and eigenvectors of symmetric tridiagonal matrices, in float64: step 2 of eigh.cu. No step depends on the
// vectors before it, except within clusters of eigenvalues.
//
// A matrix falls apart where an off-diagonal entry is below the rounding of the reduction that made it; the parts are
// called blocks of rows. Index j of an eigenvalue counts the eigenvalues of the first block, then those of the second.
#pragma once

#include "tridiagonal.cuh"

namespace deftx {
namespace {

constexpr double kEpsilon = 2.2204460492503131e-16;
// Eigenvalues that are closer (of the largest) are a cluster. The overlaps of other vectors are about kEpsilon /
// kClose: below rounding of float32; in float64 a step of Newton's iteration squares them.
template <typename Real>
constexpr double kClose = sizeof(Real) == 4 ? 1e-8 : 1e-6;
constexpr int kIterations = 2;          // of inverse iteration
constexpr int kIterationThreads = 512;  // of a block, at most
constexpr int kTile = 48, kDepth = 16;  // of a product: rows and columns of a block's tile; rows at a time

// ---- eigenvalues by bisection ----

// How many eigenvalues of the rows from `begin` to `end` are below x.
template <typename Real>
__device__ int below(const Real* diagonal, const Real* squares, int begin, int end, Real x, Real smallest) {
  int count = 0;
  Real pivot = 1;
  for (int i = begin; i < end; ++i) {
    pivot = diagonal[i] - x - (i > begin ? squares[i - 1] / pivot : Real(0));
    if (fabs(pivot) < smallest) pivot = -smallest;
    count += pivot < 0;
  }
  return count;
}

// Eigenvalue `rank` of the rows from `begin` to `end` of a matrix of n rows.
template <typename Real>
__device__ Real bisect(const Real* diagonal, const Real* squares, int n, int begin, int end, int rank) {
  Real low = 0, high = 0, largest = 1, left = 0;  // Gershgorin's interval
  for (int i = 0; i < n; ++i) {
    const Real right = sqrt(squares[i]), radius = left + right;
    low = min(low, diagonal[i] - radius), high = max(high, diagonal[i] + radius), largest = max(largest, squares[i]);
    left = right;
  }
  constexpr Real kEps = cuda::std::numeric_limits<Real>::epsilon();
  // The tridiagonal form itself is wrong by about kEps of the norm.
  const Real rounding = kEps * max(-low, high), smallest = cuda::std::numeric_limits<Real>::min() * largest;
  low -= 4 * rounding, high += 4 * rounding;
  while (high - low > rounding / 4) {
    const Real middle = low + (high - low) / 2;
    if (middle <= low || middle >= high) break;
    (below(diagonal, squares, begin, end, middle, smallest) > rank ? high : low) = middle;
  }
  return low + (high - low) / 2;
}

// A tridiagonal matrix in shared memory; off-diagonal entries that are nothing are 0.
struct Matrix {
  double *diagonal, *off_diagonal;  // [n], [n]: the last is 0
  double norm;
  int n;

  // By the whole block. `room` [2 n]
  template <typename Real>
  __device__ static Matrix load(const Real* diagonal, const Real* off_diagonal, int n, double* room) {
    Matrix t{room, room + n, 0, n};
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      t.diagonal[i] = diagonal[i];
      t.off_diagonal[i] = i < n - 1 ? static_cast<double>(off_diagonal[i]) : 0.0;
    }
    __syncthreads();
    double left = 0;
    for (int i = 0; i < n; ++i) {
      const double right = fabs(t.off_diagonal[i]);
      t.norm = max(t.norm, fabs(t.diagonal[i]) + left + right);
      left = right;
    }
    __syncthreads();
    const double nothing = cuda::std::numeric_limits<Real>::epsilon() / 2 * t.norm;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      if (!(fabs(t.off_diagonal[i]) > nothing)) t.off_diagonal[i] = 0;
    }
    __syncthreads();
    return t;
  }

  // The block of rows that row i belongs to.
  __device__ int begin(int i) const {
    while (i > 0 && off_diagonal[i - 1] != 0) --i;
    return i;
  }
  __device__ int end(int i) const {
    while (off_diagonal[i] != 0) ++i;
    return i + 1;
  }
};

template <typename Real>
__global__ void __launch_bounds__(128) block_values_kernel(const Real* __restrict__ diagonal,      // [b, n]
                                                           const Real* __restrict__ off_diagonal,  // [b, n]
                                                           double* __restrict__ values,            // [b, n]
                                                           int n, int blocks_each) {
  extern __shared__ __align__(16) double shared[];
  const int64_t offset = int64_t{blockIdx.x / blocks_each} * n;
  const Matrix t = Matrix::load(diagonal + offset, off_diagonal + offset, n, shared);
  const int j = static_cast<int>(blockIdx.x % blocks_each) * blockDim.x + threadIdx.x;
  const int begin = j < n ? t.begin(j) : 0, end = j < n ? t.end(j) : 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) t.off_diagonal[i] *= t.off_diagonal[i];
  __syncthreads();
  if (j < n) values[offset + j] = bisect(t.diagonal, t.off_diagonal, n, begin, end, j - begin);
}

// ---- eigenvectors by inverse iteration ----

// A number in (-1, 1) that looks random (the finaliser of MurmurHash3).
__device__ double scrambled(uint64_t x) {
  x = (x ^ x >> 33) * 0xff51afd7ed558ccdu;
  x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53u;
  return static_cast<double>(static_cast<int64_t>(x ^ x >> 33)) * 0x1p-63;
}

// Column j of x: the solution for the shift, times a number that makes its norm 1, by Gaussian elimination with row
// interchanges (LAPACK's stein). Pivots smaller than `tiny` are replaced by it: t - shift is almost singular on
// purpose. x, inverse, first, second [n, n]: the last three are for U, 1 / its diagonal and its other diagonals.
__device__ void solve(const Matrix& t, int begin, int end, double shift, double tiny, double* x, double* inverse,
                      double* first, double* second) {  // each at its column j
  const int64_t n = t.n;
  double pivot = t.diagonal[begin] - shift, right = t.off_diagonal[begin], top = x[begin * n];
  double ahead = x[(begin + 1) * n];  // loaded a step before it is needed; a block has two rows or more
  for (int i = begin; i < end; ++i) {
    const bool last = i == end - 1;
    const double under = t.off_diagonal[i], next = last ? 0.0 : t.diagonal[i + 1] - shift,
                 next_right = last ? 0.0 : t.off_diagonal[i + 1], lower = last ? 0.0 : ahead;
    ahead = x[min(i + 2, end - 1) * n];
    const bool swap = fabs(pivot) < fabs(under);
    double diagonal = swap ? under : pivot;
    if (fabs(diagonal) < tiny) diagonal = tiny;
    const double one_over = 1 / diagonal, multiplier = (swap ? pivot : under) * one_over, upper = swap ? lower : top;
    inverse[i * n] = one_over, first[i * n] = swap ? next : right, second[i * n] = swap ? next_right : 0.0;
    x[i * n] = upper;
    top = (swap ? top : lower) - multiplier * upper;
    pivot = swap ? right - multiplier * next : next - multiplier * right;
    right = swap ? -multiplier * next_right : next_right;
  }
  double one = 0, two = 0, squares = 0;
  double own = x[(end - 1) * n], reciprocal = inverse[(end - 1) * n], beside = 0, beyond = 0;
  for (int i = end - 1; i >= begin; --i) {
    const int64_t next = max(i - 1, begin) * n;
    const double next_own = x[next], next_reciprocal = inverse[next], next_beside = first[next],
                 next_beyond = second[next];
    const double rest = own - beside * one - beyond * two;
    two = one, one = rest * reciprocal;
    x[i * n] = one;
    squares += one * one;
    own = next_own, reciprocal = next_reciprocal, beside = next_beside, beyond = next_beyond;
  }
  const double scale = 1 / sqrt(squares);
  for (int i = begin; i < end; ++i) x[i * n] *= scale;
}

// By the whole block: makes columns j of x that are not the first of their clusters orthogonal to those before them, by
// Gram-Schmidt, more than once where most of a column was taken away.
__device__ void orthogonalise(double* x, int n, const int* cluster, double* overlaps, double* partial) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int j = 1; j < n; ++j) {
    const int first = cluster[j];
    if (first == j) continue;
    double squares = 0;
    for (int pass = 0; pass < 3 && squares < 0.5; ++pass) {
      for (int p = first + warp; p < j; p += warps) {
        double dot = 0;
        for (int i = lane; i < n; i += 32) dot += x[int64_t{i} * n + p] * x[int64_t{i} * n + j];
        dot = warp_sum(dot);
        if (lane == 0) overlaps[p] = dot;
      }
      __syncthreads();
      squares = 0;
      for (int i = threadIdx.x; i < n; i += blockDim.x) {
        double* const row = x + int64_t{i} * n;
        double rest = row[j];
        for (int p = first; p < j; ++p) rest -= overlaps[p] * row[p];
        row[j] = rest;
        squares += rest * rest;
      }
      squares = block_sum(squares, partial);
      const double scale = 1 / sqrt(squares);
      for (int i = threadIdx.x; i < n; i += blockDim.x) x[int64_t{i} * n + j] *= scale;
      __syncthreads();
    }
  }
}

// Column j of x: the eigenvector of values[j]. Those of a cluster are orthogonal.
template <typename Real>
__global__ void __launch_bounds__(kIterationThreads, 1)
    inverse_iteration_kernel(const Real* __restrict__ diagonal,      // [b, n]
                             const Real* __restrict__ off_diagonal,  // [b, n]
                             const double* __restrict__ values,      // [b, n], ascending in each block of rows
                             double* x,                              // [b, n, n]
                             double* scratch,                        // [b, 3, n, n]
                             int n) {
  extern __shared__ __align__(16) double shared[];
  __shared__ double partial[kMaxWarps];
  const int64_t offset = int64_t{blockIdx.x} * n, size = int64_t{n} * n;
  const Matrix t = Matrix::load(diagonal + offset, off_diagonal + offset, n, shared);
  double *shifts = shared + 2 * n, *overlaps = shifts + n;
  int* cluster = reinterpret_cast<int*>(overlaps + n);  // the first eigenvalue of each one's
  values += offset, x += blockIdx.x * size, scratch += blockIdx.x * 3 * size;
  // Shifts a little apart, since equal ones would give equal vectors.
  const double apart = 4 * kEpsilon * t.norm, close = kClose<Real> * t.norm;
  for (int j = threadIdx.x; j < n; j += blockDim.x) {
    const int begin = t.begin(j), end = t.end(j);
    double shift = values[j];
    for (int i = begin; i < j; ++i) shift = max(shift, values[i] + (j - i) * apart);
    int first = j;
    while (first > begin && values[first] - values[first - 1] <= close) --first;
    shifts[j] = shift, cluster[j] = first;
    for (int i = 0; i < n; ++i) {
      const bool inside = i >= begin && i < end;
      x[int64_t{i} * n + j] = !inside ? 0.0 : end - begin == 1 ? 1.0 : scrambled(int64_t{j} * n + i + 1);
    }
  }
  for (int iteration = 0; iteration < kIterations; ++iteration) {
    for (int j = threadIdx.x; j < n; j += blockDim.x) {
      const int begin = t.begin(j), end = t.end(j);
      if (end - begin == 1) continue;
      solve(t, begin, end, shifts[j], kEpsilon * t.norm, x + j, scratch + j, scratch + size + j,
            scratch + 2 * size + j);
    }
    __syncthreads();
    orthogonalise(x, n, cluster, overlaps, partial);
  }
}

// ---- orthogonal to rounding ----

// gram = x' x or, with it, other = x (3 - gram) / 2: a step of Newton's iteration for the nearest orthogonal matrix
// (Higham 1986), whose error is the square of the error before. A block has a tile of the result, a thread 4 x 4 of it.
template <bool kIsStep>
__global__ void __launch_bounds__(kTile* kTile / 16) polish_kernel(const double* __restrict__ x,      // [b, n, n]
                                                                   const double* __restrict__ right,  // x, or gram
                                                                   double* __restrict__ result,       // gram, or other
                                                                   int n, int tiles) {
  __shared__ __align__(16) double a[kDepth][kTile + 2], b[kDepth][kTile + 2];
  const int64_t offset = int64_t{blockIdx.x / (tiles * tiles)} * n * n;
  const int tile = blockIdx.x % (tiles * tiles), top = tile / tiles * kTile, from = tile % tiles * kTile;
  const int row = threadIdx.x / (kTile / 4) * 4, column = threadIdx.x % (kTile / 4) * 4;
  x += offset, right += offset, result += offset;
  double sums[4][4] = {};
  for (int k = 0; k < n; k += kDepth) {
    for (int i = threadIdx.x; i < kTile * kDepth; i += blockDim.x) {
      if (kIsStep) {
        const int d = i % kDepth, r = i / kDepth;
        a[d][r] = k + d < n && top + r < n ? x[int64_t{top + r} * n + k + d] : 0.0;
      } else {
        const int d = i / kTile, r = i % kTile;
        a[d][r] = k + d < n && top + r < n ? x[int64_t{k + d} * n + top + r] : 0.0;
      }
      const int d = i / kTile, c = i % kTile;
      b[d][c] = k + d < n && from + c < n ? right[int64_t{k + d} * n + from + c] : 0.0;
    }
    __syncthreads();
#pragma unroll 4
    for (int d = 0; d < kDepth; ++d) {
      double left[4], here[4];
      load_rows(&a[d][row], left), load_rows(&b[d][column], here);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[r][c] += left[r] * here[c];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t at = int64_t{top + row + r} * n + from + column + c;
      if (top + row + r < n && from + column + c < n)
        result[at] = kIsStep ? 1.5 * x[at] - 0.5 * sums[r][c] : sums[r][c];
    }
  }
}

// ---- the product with the reflectors ----

constexpr int kVectorWarps = 4;  // of a block, at most

// Vectors of the matrix in rows, in the order of the eigenvalues: kRows of them by one warp.
template <typename Real>
__global__ void __launch_bounds__(32 * kVectorWarps)
    reflect_kernel(const double* __restrict__ x,         // [b, n, n]
                   const double* __restrict__ found,     // [b, n]
                   const Real* __restrict__ reflectors,  // [b, padded, padded]: from tridiagonal_kernel
                   const Real* __restrict__ taus,        // [b, n]
                   const Real* __restrict__ unscale,     // [b]
                   Real* __restrict__ values,            // [b, n], ascending
                   Real* __restrict__ vectors,           // [b, n, n]
                   int n, int blocks_each) {
  extern __shared__ __align__(16) double shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int padded = padded_rows(n);
  const int64_t matrix = blockIdx.x / blocks_each, size = int64_t{n} * n;
  const int first = (static_cast<int>(blockIdx.x % blocks_each) * warps + warp) * kRows;
  Real* const z = reinterpret_cast<Real*>(shared) + warp * kRows * n;  // [n, kRows]; each lane has its own rows
  x += matrix * size, vectors += matrix * size, reflectors += matrix * padded * padded;
  found += matrix * n, taus += matrix * n, values += matrix * n;
  if (first >= n) return;
  for (int i = lane; i < n; i += 32) {
    for (int r = 0; r < kRows; ++r) {
      z[i * kRows + r] = first + r < n ? static_cast<Real>(x[int64_t{i} * n + first + r]) : Real(0);
    }
  }
  for (int j = n - 2; j >= 0; --j) {
    const Real tau = taus[j], *v = reflectors + int64_t{j} * padded;
    if (tau == 0) continue;
    const int start = (j + 1) / 32 * 32 + lane;
    Real dots[kRows] = {};
    for (int i = start; i < n; i += 32) {
      const Real factor = i > j ? v[i] : Real(0);
      Real own[kRows];
      load_rows(z + i * kRows, own);
#pragma unroll
      for (int r = 0; r < kRows; ++r) dots[r] += factor * own[r];
    }
    const Real sum = tau * warp_sum_of_four(dots);
#pragma unroll
    for (int r = 0; r < kRows; ++r) dots[r] = __shfl_sync(kFull, sum, 8 * r);
    for (int i = start; i < n; i += 32) {
      const Real factor = i > j ? v[i] : Real(0);
#pragma unroll
      for (int r = 0; r < kRows; ++r) z[i * kRows + r] -= dots[r] * factor;
    }
  }
  for (int r = 0; r < kRows && first + r < n; ++r) {
    const double value = found[first + r];
    int place = 0;
    for (int other = lane; other < n; other += 32) {
      const bool before = isnan(unscale[matrix]) ? other < first + r : found[other] < value;
      place += before || (found[other] == value && other < first + r);
    }
    place = __reduce_add_sync(kFull, place);
    if (lane == 0) values[place] = static_cast<Real>(value * static_cast<double>(unscale[matrix]));
    for (int i = lane; i < n; i += 32) vectors[int64_t{place} * n + i] = z[i * kRows + r];
  }
}

}  // namespace
}  // namespace deftx
