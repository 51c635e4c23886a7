// Symmetric matrices to tridiagonal form, a block to a matrix: step 1 of eigh.cu.
#pragma once

#include <climits>
#include <cuda/std/limits>

#include "../stable.h"

namespace deftx {
namespace {

constexpr unsigned kFull = 0xffffffffu;
constexpr int kMaxWarps = 32;
constexpr int kRows = 4;       // of a matrix, that a warp takes at a time; the rows in memory are padded to a multiple
constexpr int kMaxPanel = 16;  // columns whose update of the rest is put off
constexpr int kFewWarps = 8;   // a smaller panel makes room for so many

__host__ __device__ constexpr int padded_rows(int n) { return (n + kRows - 1) / kRows * kRows; }

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

// The sum over the warp of x[i], for each i: in the lanes from 8 i to 8 i + 7.
template <typename Real>
__device__ Real warp_sum_of_four(const Real (&x)[4]) {
  const int lane = threadIdx.x % 32;
  const bool second = lane & 16, odd = lane & 8;
  Real low = second ? x[2] : x[0], high = second ? x[3] : x[1];
  low += __shfl_xor_sync(kFull, second ? x[0] : x[2], 16);
  high += __shfl_xor_sync(kFull, second ? x[1] : x[3], 16);
  Real sum = odd ? high : low;
  sum += __shfl_xor_sync(kFull, odd ? low : high, 8);
#pragma unroll
  for (int d = 4; d > 0; d /= 2) sum += __shfl_xor_sync(kFull, sum, d);
  return sum;
}

// Neighbours that one instruction loads or stores.
template <typename Real>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(Real);
  Real x[kSize];
  __device__ Real& operator[](int i) { return x[i]; }
  __device__ const Real& operator[](int i) const { return x[i]; }
};

template <typename Real>
__device__ Pack<Real>& pack_at(Real* x) {
  return *reinterpret_cast<Pack<Real>*>(x);
}

template <typename Real>
__device__ const Pack<Real>& pack_at(const Real* x) {
  return *reinterpret_cast<const Pack<Real>*>(x);
}

// kRows neighbours.
template <typename Real>
__device__ void load_rows(const Real* from, Real (&to)[kRows]) {
  constexpr int kSize = Pack<Real>::kSize;
#pragma unroll
  for (int i = 0; i < kRows; i += kSize) {
    const Pack<Real> pack = pack_at(from + i);
#pragma unroll
    for (int k = 0; k < kSize; ++k) to[i + k] = pack[k];
  }
}

// The matrix into `work`, scaled and padded with zeros; returns what its eigenvalues are to be multiplied by, NaN if an
// entry is not finite. Only the upper triangle is used; the tiles on the diagonal become symmetric.
template <typename Real>
__device__ Real copy_scaled(const Real* matrix, Real* work, int n, int padded) {  // [n, n], [padded, padded]
  __shared__ int exponents[kMaxWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int largest = INT_MIN;  // frexp's exponent; that of zero is 0, of what is not finite, anything
  bool finite = true;
  const int64_t size = int64_t{n} * n;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
    const Real x = matrix[i];
    int exponent;
    frexp(x, &exponent);
    finite &= isfinite(x);
    if (x != 0) largest = max(largest, exponent);
  }
  largest = __reduce_max_sync(kFull, largest);
  if (lane == 0) exponents[warp] = largest;
  finite = __syncthreads_and(finite);
  for (int w = 0; w < warps; ++w) largest = max(largest, exponents[w]);
  const int exponent = !finite || largest == INT_MIN ? 0 : largest;
  for (int r = warp; r < padded; r += warps) {
    for (int c = r / kRows * kRows + lane; c < padded; c += 32) {
      const int64_t from = c < r ? int64_t{c} * n + r : int64_t{r} * n + c;
      work[int64_t{r} * padded + c] = max(r, c) < n ? ldexp(matrix[from], -exponent) : Real(0);
    }
  }
  return finite ? ldexp(Real(1), exponent) : cuda::std::numeric_limits<Real>::quiet_NaN();
}

// A panel of columns whose reflectors I - tau v v' are made but not yet applied to the columns after it: the matrix
// stands for A - V W' - W V'. Shared memory.
template <typename Real>
struct Panel {
  Real *V, *W;  // [panel, padded]: one reflector's vector to a row
  int padded;

  __device__ Real pending(int t, int row, int column) const {
    return V[t * padded + row] * W[t * padded + column] + W[t * padded + row] * V[t * padded + column];
  }
};

// The lane's first pack of columns from `first` on. A lane has the same columns of each strip of 32 packs, whatever
// `first` is.
template <typename Real>
__device__ int first_column(int first) {
  constexpr int kSize = Pack<Real>::kSize, kStrip = 32 * kSize;
  const int c = first / kStrip * kStrip + threadIdx.x % 32 * kSize;
  return c < first ? c + kStrip : c;
}

// The product A v is dots + the sum of `sums` over the warps: of the upper triangle from row and column `first` on. A
// lane has a tile of kRows rows and one pack of columns, whose entries serve both a row's dot product and a column's
// sum; of the symmetric tiles on the diagonal, whole, only the dot products count. v is zero before `first` and after
// n.
template <typename Real>
__device__ void multiply(const Real* A, const Real* v, Real* dots, Real* sums, int first, int padded) {
  constexpr int kSize = Pack<Real>::kSize, kStrip = 32 * kSize;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  Real* own = sums + warp * padded;  // always the same lane to a column
  for (int c = first_column<Real>(first / kRows * kRows); c < padded; c += kStrip) pack_at(own + c) = Pack<Real>{};
  for (int top = first / kRows * kRows + warp * kRows; top < padded; top += warps * kRows) {
    Real mine[kRows], dot[kRows] = {};  // v and A v at these rows
    load_rows(v + top, mine);
#pragma unroll 1
    for (int c = first_column<Real>(top); c < padded; c += kStrip) {
      Pack<Real> a[kRows], sum = pack_at(own + c);
      const Pack<Real> here = pack_at(v + c);
#pragma unroll
      for (int r = 0; r < kRows; ++r) a[r] = pack_at(A + ((top + r) * padded + c));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) dot[r] += a[r][k] * here[k], sum[k] += a[r][k] * mine[r];
      }
      if (c >= top + kRows) pack_at(own + c) = sum;
    }
    const Real whole = warp_sum_of_four(dot);
    if (lane % 8 == 0) dots[top + lane / 8] = whole;
  }
}

// A -= V W' + W V', of the upper triangle from row and column `first` on, and of the tiles on the diagonal.
template <typename Real>
__device__ void update(Real* A, const Panel<Real>& panel, int panel_size, int first) {
  constexpr int kSize = Pack<Real>::kSize, kStrip = 32 * kSize;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, padded = panel.padded;
  for (int top = first / kRows * kRows + warp * kRows; top < padded; top += warps * kRows) {
    for (int c = first_column<Real>(top); c < padded; c += kStrip) {
      Pack<Real> a[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) a[r] = pack_at(A + ((top + r) * padded + c));
#pragma unroll 1
      for (int t = 0; t < panel_size; ++t) {
        const Real *V = panel.V + t * padded, *W = panel.W + t * padded;
        const Pack<Real> v = pack_at(V + c), w = pack_at(W + c);
        Real left_v[kRows], left_w[kRows];
        load_rows(V + top, left_v), load_rows(W + top, left_w);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int k = 0; k < kSize; ++k) {
            a[r][k] -= left_v[r] * w[k];
            a[r][k] -= left_w[r] * v[k];
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (top + r >= first) pack_at(A + ((top + r) * padded + c)) = a[r];  // above are vectors of reflectors
      }
    }
  }
}

// Row j of the upper triangle of `work` becomes, right of the diagonal, the vector of reflector j.
template <typename Real>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    tridiagonal_kernel(const Real* __restrict__ matrices,  // [b, n, n]
                       Real* work,                         // [b, padded, padded]
                       Real* __restrict__ diagonal,        // [b, n]
                       Real* __restrict__ off_diagonal,    // [b, n]: the last of each is not used
                       Real* __restrict__ taus,            // [b, n], likewise
                       Real* __restrict__ unscale,         // [b]
                       int n, int panel_size) {            // panel_size: a power of 2
  extern __shared__ __align__(16) double shared[];
  __shared__ Real partial[kMaxWarps], dots[2 * kMaxPanel];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int padded = padded_rows(n);
  Real* const first_row = reinterpret_cast<Real*>(shared);
  const Panel<Real> panel{first_row, first_row + panel_size * padded, padded};
  Real *sums = panel.W + panel_size * padded,
       *A = work + blockIdx.x * int64_t{padded} * padded;  // sums [warps, padded]
  const int64_t offset = blockIdx.x * int64_t{n};
  const Real factor = copy_scaled(matrices + blockIdx.x * int64_t{n} * n, A, n, padded);
  if (threadIdx.x == 0) unscale[blockIdx.x] = factor;
  __syncthreads();

  for (int j = 0; j < n; ++j) {
    const int k = j & (panel_size - 1);  // reflectors that are pending
    Real *v = panel.V + k * padded, *w = panel.W + k * padded, *row = A + int64_t{j} * padded;
    Real square = 0;
    for (int c = j + threadIdx.x; c < n; c += blockDim.x) {
      Real a = row[c];
#pragma unroll 4
      for (int t = 0; t < k; ++t) a -= panel.pending(t, j, c);
      if (c == j) {
        diagonal[offset + j] = a;
      } else {
        v[c] = a;
        if (c > j + 1) square += a * a;
      }
    }
    if (j == n - 1) break;
    square = block_sum(square, partial);
    const Real alpha = v[j + 1];
    // Below it, squares lose their digits, and the reflection would not be one. The matrix's largest entry is about 1.
    const bool nothing = square < cuda::std::numeric_limits<Real>::min() / cuda::std::numeric_limits<Real>::epsilon();
    const Real beta = nothing ? alpha : -copysign(sqrt(alpha * alpha + square), alpha);
    const Real tau = nothing ? Real(0) : (beta - alpha) / beta, scale = nothing ? Real(0) : 1 / (alpha - beta);
    __syncthreads();  // everyone has read alpha
    for (int c = (j + 1) / kRows * kRows + threadIdx.x; c < padded; c += blockDim.x) {
      const bool inside = c > j && c < n;
      v[c] = !inside ? Real(0) : c == j + 1 ? Real(1) : v[c] * scale;
      if (inside) row[c] = v[c];
      w[c] = 0;
    }
    if (threadIdx.x == 0) off_diagonal[offset + j] = beta, taus[offset + j] = tau;
    __syncthreads();
    if (tau != 0) {  // w = tau (p - tau/2 (p v) v) with p = (A - V W' - W V') v
      for (int q = warp; q < 2 * k; q += warps) {
        const Real* other = q < k ? panel.W + q * padded : panel.V + (q - k) * padded;
        Real dot = 0;
        for (int c = j + 1 + lane; c < n; c += 32) dot += other[c] * v[c];
        dot = warp_sum(dot);
        if (lane == 0) dots[q] = dot;
      }
      multiply(A, v, w, sums, j + 1, padded);
      __syncthreads();
      Real dot = 0;
      for (int c = (j + 1) / kRows * kRows + threadIdx.x; c < n; c += blockDim.x) {
        Real p = w[c];
        for (int i = 0; i < warps; ++i) p += sums[i * padded + c];
#pragma unroll 4
        for (int t = 0; t < k; ++t) p -= panel.V[t * padded + c] * dots[t] + panel.W[t * padded + c] * dots[k + t];
        w[c] = p *= c > j ? tau : Real(0);
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

}  // namespace
}  // namespace deftx
