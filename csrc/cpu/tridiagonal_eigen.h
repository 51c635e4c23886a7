// Eigenvalues and eigenvectors of a symmetric tridiagonal matrix T, in float64, on the CPU.
//
// Eigenvalues: the QL iteration without square roots (Reinsch 1973; LAPACK's sterf). Eigenvectors: inverse iteration
// (LAPACK's stein), four at a time in the lanes of a vector. T is cut where an off-diagonal entry is below the rounding
// of the reduction that made it, so that equal eigenvalues of different blocks need no care; eigenvectors of
// eigenvalues that are close within a block are orthogonalised. For a matrix that is wanted in float32, float64 keeps
// those apart whose distance is 1e-8 of the largest.
#pragma once

#include <cmath>
#include <limits>
#include <numeric>

#include "tridiagonal.h"

namespace deftx {
namespace tridiagonal {

// ---- eigenvalues ----

// Replaces d [n] by the eigenvalues of the matrix with diagonal d and squared off-diagonal e [n - 1], in no order; e is
// lost. False if the iteration does not end.
inline bool eigenvalues(double* d, double* e, int64_t n) {
  constexpr double kEpsilon = std::numeric_limits<double>::epsilon() / 2;
  if (n > 1 && std::abs(d[n - 1]) < std::abs(d[0])) {  // small entries first: QL works from the top
    std::reverse(d, d + n);
    std::reverse(e, e + n - 1);
  }
  int64_t left = 50 * n;
  for (int64_t l = 0; l < n;) {
    int64_t m = l;
    while (m < n - 1 && !(std::abs(e[m]) <= kEpsilon * kEpsilon * std::abs(d[m] * d[m + 1]))) ++m;
    if (m < n - 1) e[m] = 0;
    if (m == l) {
      ++l;
      continue;
    }
    if (left-- == 0) return false;
    const double root = std::sqrt(e[l]);
    double sigma = (d[l + 1] - d[l]) / (2 * root);
    sigma = d[l] - root / (sigma + std::copysign(std::sqrt(sigma * sigma + 1), sigma));
    double c = 1, s = 0, gamma = d[m] - sigma, p = gamma * gamma;
    for (int64_t i = m - 1; i >= l; --i) {
      const double b = e[i], r = p + b;
      if (i != m - 1) e[i + 1] = s * r;
      const double old_c = c, old_gamma = gamma;
      c = p / r;
      s = b / r;
      const double alpha = d[i];
      gamma = c * (alpha - sigma) - s * old_gamma;
      d[i + 1] = old_gamma + (alpha - gamma);
      p = c != 0 ? gamma * gamma / c : old_c * b;
    }
    e[l] = s * p;
    d[l] = sigma + gamma;
  }
  return true;
}

// ---- inverse iteration ----

#if defined(__GNUC__)
typedef double Wide __attribute__((vector_size(32)));  // a number of one system of equations in each lane
typedef int64_t WideMask __attribute__((vector_size(32)));
constexpr int64_t kSystems = 4;
#else
using Wide = double;
using WideMask = bool;
constexpr int64_t kSystems = 1;
#endif

// The i-th Wide (or WideMask) of an array; memory need not be aligned.
template <typename W, typename Number>
DEFTX_INLINE W get(const Number* x, int64_t i) {
  W v;
  std::memcpy(&v, x + i * kSystems, sizeof v);
  return v;
}

template <typename W, typename Number>
DEFTX_INLINE void put(Number* x, int64_t i, const W& v) {
  std::memcpy(x + i * kSystems, &v, sizeof v);
}

DEFTX_INLINE Wide size_of(const Wide& x) { return x < 0 ? -x : x; }

// T - shift = P L U with row interchanges, for kSystems shifts; each [n, kSystems]: 1 / U's diagonal, its two other
// diagonals, L's multipliers, and which rows were interchanged.
struct Factors {
  std::vector<double> inverse, first, second, multiplier;
  std::vector<int64_t> swapped;
  explicit Factors(int64_t n)
      : inverse(n * kSystems),
        first(n * kSystems),
        second(n * kSystems),
        multiplier(n * kSystems),
        swapped(n * kSystems) {}
};

// Pivots smaller than `tiny` are replaced by it: T - shift is almost singular on purpose. shifts [kSystems].
DEFTX_WIDE_CLONES inline void factorise(const double* d, const double* e, int64_t n, const double* shifts, double tiny,
                                        Factors& f) {
  const Wide shift = get<Wide>(shifts, 0);
  Wide pivot = d[0] - shift, right = n > 1 ? Wide{} + e[0] : Wide{};
  for (int64_t i = 0; i < n; ++i) {
    const bool last = i == n - 1;
    const Wide below = last ? Wide{} : Wide{} + e[i], next = last ? Wide{} : d[i + 1] - shift,
               next_right = i + 2 < n ? Wide{} + e[i + 1] : Wide{};
    const WideMask swap = size_of(pivot) < size_of(below);
    Wide diagonal = swap ? below : pivot;
    diagonal = size_of(diagonal) < tiny ? Wide{} + tiny : diagonal;
    const Wide inverse = 1 / diagonal, multiplier = (swap ? pivot : below) * inverse;
    put(f.inverse.data(), i, inverse);
    put(f.first.data(), i, swap ? next : right);
    put(f.second.data(), i, swap ? next_right : Wide{});
    put(f.multiplier.data(), i, multiplier);
    put(f.swapped.data(), i, swap);
    pivot = swap ? right - multiplier * next : next - multiplier * right;
    right = swap ? -multiplier * next_right : next_right;
  }
}

// x = (T - shift)^-1 x, times a number that makes its norm 1. x [n, kSystems]
DEFTX_WIDE_CLONES inline void solve(const Factors& f, int64_t n, double* x) {
  Wide top = get<Wide>(x, 0);
  for (int64_t i = 0; i + 1 < n; ++i) {
    const WideMask swap = get<WideMask>(f.swapped.data(), i);
    const Wide below = get<Wide>(x, i + 1), upper = swap ? below : top;
    put(x, i, upper);
    top = (swap ? top : below) - get<Wide>(f.multiplier.data(), i) * upper;
  }
  put(x, n - 1, top);
  Wide one{}, two{}, squares{};
  for (int64_t i = n - 1; i >= 0; --i) {
    const Wide rest = get<Wide>(x, i) - get<Wide>(f.first.data(), i) * one - get<Wide>(f.second.data(), i) * two;
    two = one;
    one = rest * get<Wide>(f.inverse.data(), i);
    put(x, i, one);
    squares += one * one;
  }
  double sums[kSystems];
  put(sums, 0, squares);
  for (double& sum : sums) sum = 1 / std::sqrt(sum);
  const Wide scale = get<Wide>(sums, 0);
  for (int64_t i = 0; i < n; ++i) put(x, i, Wide(get<Wide>(x, i) * scale));
}

// A number in (-1, 1) that looks random (the finaliser of MurmurHash3).
inline double scrambled(uint64_t x) {
  x = (x ^ x >> 33) * 0xff51afd7ed558ccdu;
  x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53u;
  return static_cast<double>(static_cast<int64_t>(x ^ x >> 33)) * 0x1p-63;
}

// Eigenvectors of one tridiagonal matrix, for a result in T.
template <typename T>
class Eigenvectors {
 public:
  // rows [n]: the row of the result for the vector of each eigenvalue, in the order of the blocks. In a block rows
  // ascend. Vectors whose row is not in [0, count) are not wanted.
  Eigenvectors(const std::vector<double>& diagonal, const std::vector<double>& off_diagonal, double norm, int64_t count,
               const std::vector<int64_t>& rows)
      : d_(diagonal),
        e_(off_diagonal),
        norm_(norm),
        count_(count),
        rows_(rows),
        // Vectors of eigenvalues farther apart are orthogonal to rounding of float64 over that distance without further
        // care: to 1e-8 for float32; to 2e-13 for float64, or 2e-14 where it costs little.
        close_((sizeof(T) == 4           ? 1e-8
                : diagonal.size() <= 256 ? 1e-2
                                         : 1e-3) *
               norm) {}

  // Where the matrix falls apart: the first row of each block, and n.
  static std::vector<int64_t> blocks(const std::vector<double>& off_diagonal, double norm) {
    const auto n = static_cast<int64_t>(off_diagonal.size());
    std::vector<int64_t> found{0};
    for (int64_t i = 0; i + 1 < n; ++i)
      if (!(std::abs(off_diagonal[i]) > std::numeric_limits<T>::epsilon() / 2 * norm)) found.push_back(i + 1);
    found.push_back(n);
    return found;
  }

  // Of the block [begin, end) with ascending eigenvalues `values`: rows of out (stride apart), which are zero outside
  // the block.
  void block(int64_t begin, int64_t end, const double* values, T* out, int64_t stride, Scheduler schedule) const {
    const int64_t size = end - begin;
    int64_t from = 0, to = size;  // those that are wanted
    while (from < size && rows_[begin + from] < 0) ++from;
    while (to > from && rows_[begin + to - 1] >= count_) --to;
    if (from == to) return;
    if (size == 1) {
      out[rows_[begin] * stride + begin] = 1;
      return;
    }
    // Shifts a little apart, since equal ones would give equal vectors.
    std::vector<double> shifts(values, values + size);
    const double apart = 4 * std::numeric_limits<double>::epsilon() * norm_;
    for (int64_t i = 1; i < size; ++i) shifts[i] = std::max(shifts[i], shifts[i - 1] + apart);
    std::vector<int64_t> cluster(size, from), tasks{from};  // cluster: the first eigenvalue of each one's
    for (int64_t i = from + 1; i < to; ++i) {
      const bool joins = values[i] - values[i - 1] <= close_;
      cluster[i] = joins ? cluster[i - 1] : i;
      if (!joins && i - tasks.back() >= 4 * kSystems) tasks.push_back(i);
    }
    tasks.push_back(to);
    schedule(static_cast<int64_t>(tasks.size()) - 1, [&](int64_t t) {
      const int64_t first = tasks[t], last = tasks[t + 1], length = padded(size);
      bool clustered = false;
      for (int64_t i = first; i < last; ++i) clustered |= cluster[i] < i;
      Factors factors(size);
      std::vector<double> x(size * kSystems), rows(clustered ? (last - first) * length : 0);
      for (int64_t i = first; i < last; i += kSystems)
        group(begin, size, shifts.data(), cluster.data(), i, std::min(i + kSystems, last), factors, x.data(),
              clustered ? rows.data() - first * length : nullptr, out, stride);
    });
  }

 private:
  // The eigenvectors first ... last - 1 of a block. x [size, kSystems]; rows [., padded(size)], of vectors in clusters,
  // in float64: inverse iteration makes them almost parallel, and what sets them apart must not be rounding.
  void group(int64_t begin, int64_t size, const double* shifts, const int64_t* cluster, int64_t first, int64_t last,
             Factors& factors, double* x, double* rows, T* out, int64_t stride) const {
    double shift[kSystems];
    for (int64_t k = 0; k < kSystems; ++k) shift[k] = shifts[std::min(first + k, last - 1)];
    const double tiny = std::numeric_limits<double>::epsilon() * norm_;
    factorise(d_.data() + begin, e_.data() + begin, size, shift, tiny, factors);
    for (int64_t i = 0; i < size; ++i)
      for (int64_t k = 0; k < kSystems; ++k)
        x[i * kSystems + k] = scrambled(static_cast<uint64_t>((first + k) * size + i + 1));
    const int64_t length = padded(size);
    for (int iteration = 0; iteration < 2; ++iteration) {
      solve(factors, size, x);
      for (int64_t i = first; rows && i < last; ++i) {
        double* const row = rows + i * length;
        for (int64_t j = 0; j < size; ++j) row[j] = x[j * kSystems + i - first];
        if (cluster[i] == i) continue;
        orthogonalise(rows, length, i, cluster[i]);
        for (int64_t j = 0; j < size; ++j) x[j * kSystems + i - first] = row[j];
      }
    }
    for (int64_t i = first; i < last; ++i)
      for (int64_t j = 0; j < size; ++j)
        out[rows_[begin + i] * stride + begin + j] = static_cast<T>(x[j * kSystems + i - first]);
  }

  // Makes row i orthogonal to the rows [first, i), and its norm 1.
  static void orthogonalise(double* rows, int64_t length, int64_t i, int64_t first) {
    double* const row = rows + i * length;
    double squares = 0;
    for (int pass = 0; pass < 3 && squares < 0.5; ++pass) {  // once more where most of it was taken away
      for (int64_t p = first; p < i; p += kPanel) {
        double overlaps[kPanel];
        const Rows<double> others{rows + p * length, length, std::min(kPanel, i - p)};
        dot_products(others, row, length, overlaps);
        subtract_rows(others, overlaps, 1, row, length);
      }
      dot_products(Rows<double>{row, length, 1}, row, length, &squares);
      const double scale = 1 / std::sqrt(squares);
      for (int64_t j = 0; j < length; ++j) row[j] *= scale;
    }
  }

  const std::vector<double>&d_, &e_;
  double norm_;
  int64_t count_;
  const std::vector<int64_t>& rows_;
  double close_;
};

}  // namespace tridiagonal
}  // namespace deftx
