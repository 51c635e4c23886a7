// Reduction of a symmetric matrix to tridiagonal form by Householder reflections, A = Q T Q', and products with Q, on
// the CPU.
//
// No BLAS: LAPACK's eigensolvers are not thread-safe everywhere (one BLAS returned wrong vectors of 640 rows and more
// inside an OpenMP region), and one call after the other leaves threads idle. The matrix is stored
// by rows, of which the part up to the diagonal is used, and rows are eliminated from the last to the first: then every
// vector is contiguous. Reflections are gathered in panels (LAPACK's latrd): half of the work is a product with the
// matrix for each row, bound by memory, the other half an update of the whole matrix for each panel.
//
// Work is cut into pieces that depend on the size alone, so the result is the same for any number of threads.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "../stable.h"

namespace deftx {
namespace tridiagonal {

#if defined(__GNUC__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif
#define DEFTX_INLINE inline __attribute__((always_inline))  // into each clone of the caller
template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(32)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(32)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
#else
#define DEFTX_INLINE inline
template <typename T>
using Vector = T;
#endif

template <typename T>
constexpr int64_t kLanes = sizeof(Vector<T>) / sizeof(T);

constexpr int64_t kPanel = 32;    // reflections that are applied together
constexpr int64_t kPadding = 16;  // rows are a multiple of it long
constexpr int64_t kPieces = 8;    // of a product with the matrix
constexpr int kTile = 6;          // rows that are kept in registers, two vectors of each

template <typename T>
DEFTX_INLINE Vector<T> load(const T* x) {
  Vector<T> v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

template <typename T>
DEFTX_INLINE void store(T* x, const Vector<T>& v) {
  std::memcpy(x, &v, sizeof v);
}

template <typename T>
DEFTX_INLINE T sum(const Vector<T>& v) {
  T lanes[kLanes<T>], total = 0;
  std::memcpy(lanes, &v, sizeof v);
  for (int64_t i = 0; i < kLanes<T>; ++i) total += lanes[i];
  return total;
}

inline int64_t padded(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

// The distance of rows: an odd number of kPadding entries, since rows that are a power of two apart crowd into a few
// sets of a cache.
inline int64_t row_stride(int64_t n) { return (padded(n) / kPadding | 1) * kPadding; }

// Rows of vectors: row i at data + i * stride, zero from its length on up to a multiple of kPadding.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride, count;
  const T* operator[](int64_t i) const { return data + i * stride; }
};

// ---- kernels: lengths are rounded up to a multiple of kPadding, beyond which rows are zero ----

// out[p] = rows[p] . x
template <typename T>
DEFTX_WIDE_CLONES void dot_products(Rows<T> rows, const T* x, int64_t length, T* out) {
  int64_t p = 0;
  for (; p + 4 <= rows.count; p += 4) {
    Vector<T> sums[4] = {};
    for (int64_t j = 0; j < length; j += kLanes<T>) {
      const Vector<T> b = load(x + j);
      for (int q = 0; q < 4; ++q) sums[q] += load(rows[p + q] + j) * b;
    }
    for (int q = 0; q < 4; ++q) out[p + q] = sum<T>(sums[q]);
  }
  for (; p < rows.count; ++p) {
    Vector<T> sums[2] = {};
    for (int64_t j = 0; j < length; j += 2 * kLanes<T>)
      for (int q = 0; q < 2; ++q) sums[q] += load(rows[p] + j + q * kLanes<T>) * load(x + j + q * kLanes<T>);
    out[p] = sum<T>(sums[0] + sums[1]);
  }
}

// y -= sum of factor[p * step] * rows[p]
template <typename T>
DEFTX_WIDE_CLONES void subtract_rows(Rows<T> rows, const T* factor, int64_t step, T* y, int64_t length) {
  for (int64_t j = 0; j < length; j += 2 * kLanes<T>) {
    Vector<T> v[2];
    for (int q = 0; q < 2; ++q) v[q] = load(y + j + q * kLanes<T>);
    for (int64_t p = 0; p < rows.count; ++p) {
      const T f = factor[p * step];
      for (int q = 0; q < 2; ++q) v[q] -= f * load(rows[p] + j + q * kLanes<T>);
    }
    for (int q = 0; q < 2; ++q) store<T>(y + j + q * kLanes<T>, v[q]);
  }
}

// y += A x for the rows [first, last) of the lower triangle of A, and the columns that mirror them. y [last], x [last].
template <typename T>
DEFTX_WIDE_CLONES void multiply_symmetric(const T* a, int64_t stride, int64_t first, int64_t last, const T* x, T* y) {
  int64_t r = first;
  for (; r + 4 <= last; r += 4) {
    const T* row[4];
    Vector<T> sums[4] = {};
    T totals[4];
    for (int q = 0; q < 4; ++q) row[q] = a + (r + q) * stride;
    const int64_t whole = r / kLanes<T> * kLanes<T>;
    for (int64_t j = 0; j < whole; j += kLanes<T>) {
      const Vector<T> b = load(x + j);
      Vector<T> c = load(y + j);
      for (int q = 0; q < 4; ++q) {
        const Vector<T> v = load(row[q] + j);
        sums[q] += v * b;
        c += v * x[r + q];
      }
      store<T>(y + j, c);
    }
    for (int q = 0; q < 4; ++q) {
      totals[q] = sum<T>(sums[q]) + row[q][r + q] * x[r + q];
      for (int64_t j = whole; j < r + q; ++j) {
        totals[q] += row[q][j] * x[j];
        y[j] += row[q][j] * x[r + q];
      }
    }
    for (int q = 0; q < 4; ++q) y[r + q] += totals[q];
  }
  for (; r < last; ++r) {
    const T* row = a + r * stride;
    T total = row[r] * x[r];
    for (int64_t j = 0; j < r; ++j) {
      total += row[j] * x[j];
      y[j] += row[j] * x[r];
    }
    y[r] += total;
  }
}

// tile -= factor x', of two vectors of x.
template <int kRows, typename T>
DEFTX_INLINE void subtract_products(Vector<T> (&tile)[kRows][2], const T* factor, const T* x) {
  const Vector<T> first = load(x), second = load(x + kLanes<T>);
  for (int q = 0; q < kRows; ++q) {
    tile[q][0] -= factor[q] * first;
    tile[q][1] -= factor[q] * second;
  }
}

template <int kRows, typename T>
DEFTX_INLINE void subtract_pairs_of(T* a, int64_t stride, int64_t r, Rows<T> v, Rows<T> w) {
  for (int64_t j = 0; j < r + kRows; j += 2 * kLanes<T>) {
    Vector<T> tile[kRows][2];
    for (int q = 0; q < kRows; ++q)
      for (int s = 0; s < 2; ++s) tile[q][s] = load(a + (r + q) * stride + j + s * kLanes<T>);
    for (int64_t p = 0; p < v.count; ++p) {
      const T *x = v[p], *y = w[p];
      subtract_products(tile, x + r, y + j);
      subtract_products(tile, y + r, x + j);
    }
    for (int q = 0; q < kRows; ++q)
      for (int s = 0; s < 2; ++s) store<T>(a + (r + q) * stride + j + s * kLanes<T>, tile[q][s]);
  }
}

// A -= sum of v[p] w[p]' + w[p] v[p]', in the rows [first, last) of the lower triangle (what lies beyond the diagonal
// is lost).
template <typename T>
DEFTX_WIDE_CLONES void subtract_pairs(T* a, int64_t stride, int64_t first, int64_t last, Rows<T> v, Rows<T> w) {
  int64_t r = first;
  for (; r + kTile <= last; r += kTile) subtract_pairs_of<kTile>(a, stride, r, v, w);
  for (; r < last; ++r) subtract_pairs_of<1>(a, stride, r, v, w);
}

template <int kRows, typename T>
DEFTX_INLINE void reflect_rows_of(T* z, int64_t stride, Rows<T> v, const T* mix, int64_t length) {
  T products[kRows][kPanel], factors[kPanel][kRows];
  int64_t p = 0;
  for (; p + 2 <= v.count; p += 2) {
    Vector<T> sums[kRows][2] = {};
    for (int64_t j = 0; j < length; j += kLanes<T>) {
      const Vector<T> x = load(v[p] + j), y = load(v[p + 1] + j);
      for (int q = 0; q < kRows; ++q) {
        const Vector<T> row = load(z + q * stride + j);
        sums[q][0] += row * x;
        sums[q][1] += row * y;
      }
    }
    for (int q = 0; q < kRows; ++q)
      for (int s = 0; s < 2; ++s) products[q][p + s] = sum<T>(sums[q][s]);
  }
  for (; p < v.count; ++p) {
    Vector<T> sums[kRows] = {};
    for (int64_t j = 0; j < length; j += kLanes<T>) {
      const Vector<T> x = load(v[p] + j);
      for (int q = 0; q < kRows; ++q) sums[q] += load(z + q * stride + j) * x;
    }
    for (int q = 0; q < kRows; ++q) products[q][p] = sum<T>(sums[q]);
  }
  for (p = 0; p < v.count; ++p)
    for (int q = 0; q < kRows; ++q) {
      T total = 0;
      for (int64_t s = 0; s <= p; ++s) total += mix[p * kPanel + s] * products[q][s];
      factors[p][q] = total;
    }
  for (int64_t j = 0; j < length; j += 2 * kLanes<T>) {
    Vector<T> tile[kRows][2];
    for (int q = 0; q < kRows; ++q)
      for (int s = 0; s < 2; ++s) tile[q][s] = load(z + q * stride + j + s * kLanes<T>);
    for (p = 0; p < v.count; ++p) subtract_products(tile, factors[p], v[p] + j);
    for (int q = 0; q < kRows; ++q)
      for (int s = 0; s < 2; ++s) store<T>(z + q * stride + j + s * kLanes<T>, tile[q][s]);
  }
}

// z -= V' M V z of `count` vectors z, which lie in rows: V holds at most kPanel rows, M [kPanel, kPanel] is lower
// triangular.
template <typename T>
DEFTX_WIDE_CLONES void reflect_rows(T* z, int64_t stride, int64_t count, Rows<T> v, const T* mix, int64_t length) {
  int64_t r = 0;
  for (; r + kTile <= count; r += kTile) reflect_rows_of<kTile>(z + r * stride, stride, v, mix, length);
  for (; r < count; ++r) reflect_rows_of<1>(z + r * stride, stride, v, mix, length);
}

// ---- scheduling ----

// Calls work(i) for i < count: on this thread, or on all of them.
struct Scheduler {
  bool threaded;
  template <typename Work>
  void operator()(int64_t count, const Work& work) const {
    if (!threaded || count == 1) {
      for (int64_t i = 0; i < count; ++i) work(i);
    } else {
      torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) work(i);
      });
    }
  }
};

// ---- the reduction ----

// T, and the reflections that make Q: row i of `a` holds v[i], zero from entry i on, of I - tau[i] v v', the one that
// came (n - i)th.
template <typename T>
class Reduction {
 public:
  // Of a symmetric matrix [n, n] times `scale`, which makes its largest entry about 1.
  Reduction(const T* matrix, int64_t n, T scale, Scheduler schedule)
      : diagonal(n),
        off_diagonal(n),
        n_(n),
        stride_(row_stride(n)),
        a_(new T[n * stride_]),
        w_(new T[kPanel * stride_]()),
        partial_(new T[kPieces * stride_]),
        tau_(n, T(0)),
        schedule_(schedule) {
    for (int64_t i = 0; i < n; ++i) {
      T* row = a_.get() + i * stride_;
      for (int64_t j = 0; j <= i; ++j) row[j] = scale * matrix[i * n + j];
      std::fill(row + i + 1, row + stride_, T(0));
    }
    reduce();
  }

  std::vector<double> diagonal, off_diagonal;  // [n], the latter with a 0 at the end

  // The vectors Q z of `count` vectors z, which lie in rows [count, row_stride(n)].
  void multiply_by_q(T* z, int64_t count) const {
    const int64_t panels = (n_ - 1 + kPanel - 1) / kPanel;
    const std::unique_ptr<T[]> mixes(new T[panels * kPanel * kPanel]);
    const auto panel = [&](int64_t p) {
      const int64_t first = 1 + p * kPanel;
      return Rows<T>{a_.get() + first * stride_, stride_, std::min(kPanel, n_ - first)};
    };
    const auto length = [&](int64_t p) { return padded(std::min(1 + (p + 1) * kPanel, n_)); };
    schedule_(panels, [&](int64_t p) {
      combine(panel(p), tau_.data() + 1 + p * kPanel, length(p), mixes.get() + p * kPanel * kPanel);
    });
    constexpr int64_t kRows = 8 * kTile;  // that stay in a cache while all panels are applied
    schedule_((count + kRows - 1) / kRows, [&](int64_t i) {
      for (int64_t p = 0; p < panels; ++p)
        reflect_rows(z + i * kRows * stride_, stride_, std::min(kRows, count - i * kRows), panel(p),
                     mixes.get() + p * kPanel * kPanel, length(p));
    });
  }

 private:
  void reduce() {
    int64_t pending = 0;  // reflections of the panel, not applied to the matrix yet
    for (int64_t i = n_ - 1; i >= 0; --i) {
      T* row = a_.get() + i * stride_;
      const Rows<T> v{a_.get() + (i + pending) * stride_, -stride_, pending}, w{w_.get(), stride_, pending};
      if (pending) {
        subtract_rows(w, v.data + i, -stride_, row, padded(i + 1));
        subtract_rows(v, w.data + i, stride_, row, padded(i + 1));
      }
      diagonal[i] = static_cast<double>(row[i]);
      if (i == 0) break;
      std::fill(row + i, row + stride_, T(0));
      tau_[i] = reflection(row, i);
      product(row, i, v, w, w_.get() + pending * stride_);
      if (++pending == kPanel && i > 1) {
        const Rows<T> all_v{a_.get() + (i + pending - 1) * stride_, -stride_, pending},
            all_w{w_.get(), stride_, pending};
        constexpr int64_t kRows = 8 * kTile;
        schedule_((i + kRows - 1) / kRows, [&](int64_t k) {
          subtract_pairs(a_.get(), stride_, k * kRows, std::min((k + 1) * kRows, i), all_v, all_w);
        });
        pending = 0;
      }
    }
  }

  // Makes row [length] the vector of a reflection that leaves its last entry alone, which is put into off_diagonal.
  // Returns tau.
  T reflection(T* row, int64_t length) {
    const T alpha = row[length - 1];
    row[length - 1] = 0;
    T squares;
    dot_products(Rows<T>{row, stride_, 1}, row, padded(length), &squares);
    row[length - 1] = 1;
    off_diagonal[length - 1] = static_cast<double>(alpha);
    // Below it, squares lose their digits, and the reflection would not be one. The matrix's largest entry is about 1.
    constexpr T kNothing = std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();
    if (squares < kNothing) return 0;
    const T beta = -std::copysign(std::sqrt(alpha * alpha + squares), alpha), inverse = 1 / (alpha - beta);
    for (int64_t j = 0; j < length - 1; ++j) row[j] *= inverse;
    off_diagonal[length - 1] = static_cast<double>(beta);
    return (beta - alpha) / beta;
  }

  // w of the update A - v w' - w v' that the reflection I - tau x x' makes; v, w: those of the panel before it.
  void product(const T* x, int64_t length, Rows<T> v, Rows<T> w, T* y) {
    const T tau = tau_[length];
    std::fill(y, y + stride_, T(0));
    if (tau == 0) return;
    const int64_t pieces = std::clamp<int64_t>(length / 128, 1, kPieces);
    const auto first_row = [&](int64_t piece) {  // about as many entries in each piece
      const double share = std::sqrt(static_cast<double>(piece) / static_cast<double>(pieces));
      return piece == pieces ? length : static_cast<int64_t>(share * static_cast<double>(length)) / 8 * 8;
    };
    schedule_(pieces, [&](int64_t piece) {
      T* out = piece == pieces - 1 ? y : partial_.get() + piece * stride_;
      const int64_t end = first_row(piece + 1);
      std::fill(out, out + end, T(0));
      multiply_symmetric(a_.get(), stride_, first_row(piece), end, x, out);
    });
    for (int64_t piece = 0; piece < pieces - 1; ++piece)
      for (int64_t j = 0; j < first_row(piece + 1); ++j) y[j] += partial_[piece * stride_ + j];
    const int64_t end = padded(length);
    if (v.count) {
      T factors[kPanel];
      dot_products(w, x, end, factors);
      subtract_rows(v, factors, 1, y, end);
      dot_products(v, x, end, factors);
      subtract_rows(w, factors, 1, y, end);
    }
    T overlap;
    dot_products(Rows<T>{x, stride_, 1}, y, end, &overlap);
    const T half = tau * tau * overlap / 2;
    for (int64_t j = 0; j < length; ++j) y[j] = tau * y[j] - half * x[j];
    std::fill(y + length, y + stride_, T(0));
  }

  // M of I - V' M V = H[count - 1] ... H[0] (Schreiber and Van Loan 1989).
  static void combine(Rows<T> v, const T* tau, int64_t length, T* mix) {
    for (int64_t p = 0; p < v.count; ++p) {
      T overlaps[kPanel];
      dot_products(Rows<T>{v.data, v.stride, p}, v[p], length, overlaps);
      for (int64_t s = 0; s < p; ++s) {
        T total = 0;
        for (int64_t q = s; q < p; ++q) total += overlaps[q] * mix[q * kPanel + s];
        mix[p * kPanel + s] = -tau[p] * total;
      }
      mix[p * kPanel + p] = tau[p];
    }
  }

  int64_t n_, stride_;
  std::unique_ptr<T[]> a_, w_, partial_;
  std::vector<T> tau_;
  Scheduler schedule_;
};

}  // namespace tridiagonal
}  // namespace deftx
