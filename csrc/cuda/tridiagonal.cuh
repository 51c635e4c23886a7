// Symmetric matrices to tridiagonal form, a block to a matrix: step 1 of eigh.cu.
#pragma once

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

// A panel of columns whose reflectors I - tau v v' are made but not yet applied to the columns after it: the matrix
// stands for A - V W' - W V'. Shared memory.
template <typename Real>
struct Panel {
  Real *V, *W;  // [panel, n]: one reflector's vector to a row
  int n;

  __device__ Real pending(int t, int row, int column) const {
    return V[t * n + row] * W[t * n + column] + W[t * n + row] * V[t * n + column];
  }
};

// sums[warp] += A v by the rows that this warp takes, of the upper triangle from row and column `first` on. Lane c % 32
// alone touches column c of its warp's sums.
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
    // Below it, squares lose their digits, and the reflection would not be one. The matrix's largest entry is about 1.
    const bool nothing = square < cuda::std::numeric_limits<Real>::min() / cuda::std::numeric_limits<Real>::epsilon();
    const Real beta = nothing ? alpha : -copysign(sqrt(alpha * alpha + square), alpha);
    const Real tau = nothing ? Real(0) : (beta - alpha) / beta, scale = nothing ? Real(0) : 1 / (alpha - beta);
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

}  // namespace
}  // namespace deftx
