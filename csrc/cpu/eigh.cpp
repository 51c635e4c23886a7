// eigh and eigvalsh on the CPU: reduction to tridiagonal form (tridiagonal.h), the eigenvalues and eigenvectors of that
// (tridiagonal_eigen.h), and the product with the reflections. A matrix for each thread while there are enough; all
// threads on one matrix for the rest. Either way gives the same bits.
//
// A matrix that is not finite, and an iteration that does not end, give NaN.
#include "tridiagonal_eigen.h"

namespace deftx {
namespace {

using tridiagonal::Scheduler;

// The power of 2 that brings the largest entry of the lower triangle near 1; NaN if one is not finite.
template <typename T>
T scale_of(const T* matrix, int64_t n) {
  T largest = 0, bad = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      largest = std::max(largest, std::abs(matrix[i * n + j]));
      bad += 0 * matrix[i * n + j];
    }
  constexpr int kMost = std::numeric_limits<T>::max_exponent - 2;
  return bad + (largest == 0 ? T(1) : std::ldexp(T(1), std::clamp(-std::ilogb(largest), -kMost, kMost)));
}

// Where a truncation cuts the singular values, whose squares are the eigenvalues: by at most one of the three, which is
// above 0.
struct Cut {
  int64_t rank = 0;
  double energy = 0, median = 0;

  // How many of the largest eigenvalues it keeps; values [n] ascending.
  template <typename T>
  int64_t kept(const T* values, int64_t n) const {
    const auto value = [&](int64_t i) { return std::max(static_cast<double>(values[i]), 0.0); };
    if (energy > 0) {
      double total = 0, sum = 0;
      for (int64_t i = n - 1; i >= 0; --i) total += value(i);
      int64_t count = 0;
      while (count < n && (count == 0 || sum < energy * total)) sum += value(n - ++count);
      return count;
    }
    if (median > 0) {
      const double bound = median * (std::sqrt(value(n / 2)) + std::sqrt(value((n - 1) / 2))) / 2;
      int64_t count = 0;
      while (count < n && std::sqrt(value(n - 1 - count)) > bound) ++count;
      return count;
    }
    return rank;
  }

  // The eigenvectors [first, last) that a truncation needs: those of the eigenvalues that are kept or of the others,
  // whichever are fewer, and some beyond, which its accuracy may rest on; all without a cut, and where it is near the
  // middle.
  template <typename T>
  std::pair<int64_t, int64_t> needed(const T* values, int64_t n) const {
    constexpr int64_t kBeyond = 16;
    if (rank == 0 && !(energy > 0) && !(median > 0)) return {0, n};
    const int64_t cut = n - kept(values, n);
    if (std::abs(n - 2 * cut) <= 2 * kBeyond) return {0, n};
    return 2 * cut < n ? std::pair{int64_t{0}, std::min(cut + kBeyond, n)}
                       : std::pair{std::max(cut - kBeyond, int64_t{0}), n};
  }
};

// values [n] ascending, and the eigenvectors in rows [n, n] (those that the cut does not need are zero), or null.
template <typename T>
void decompose(const T* matrix, int64_t n, const Cut& cut, T* values, T* vectors, Scheduler schedule) {
  const auto fail = [&] {
    std::fill(values, values + n, std::numeric_limits<T>::quiet_NaN());
    if (vectors) std::fill(vectors, vectors + n * n, std::numeric_limits<T>::quiet_NaN());
  };
  const T scale = scale_of(matrix, n);
  if (std::isnan(scale)) return fail();
  const tridiagonal::Reduction<T> reduction(matrix, n, scale, schedule);
  const auto &d = reduction.diagonal, &e = reduction.off_diagonal;
  double norm = 0;
  for (int64_t i = 0; i < n; ++i) norm = std::max(norm, std::abs(d[i]) + std::abs(e[i]) + (i ? std::abs(e[i - 1]) : 0));

  const auto blocks = tridiagonal::Eigenvectors<T>::blocks(e, norm);
  std::vector<double> found(d), squares(n);
  for (int64_t i = 0; i < n; ++i) squares[i] = e[i] * e[i];
  for (size_t b = 0; b + 1 < blocks.size(); ++b) {
    double* const first = found.data() + blocks[b];
    if (!tridiagonal::eigenvalues(first, squares.data() + blocks[b], blocks[b + 1] - blocks[b])) return fail();
    if (!std::all_of(first, found.data() + blocks[b + 1], [](double x) { return std::isfinite(x); })) return fail();
    std::sort(first, found.data() + blocks[b + 1]);
  }
  std::vector<int64_t> order(n);  // of the eigenvalues of all blocks
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return found[i] < found[j]; });
  for (int64_t i = 0; i < n; ++i) values[i] = static_cast<T>(found[order[i]] / static_cast<double>(scale));
  if (!vectors) return;

  const auto [first, last] = cut.needed(values, n);
  std::vector<int64_t> row(n);  // of the eigenvalues of all blocks: where their vectors go
  for (int64_t i = 0; i < n; ++i) row[order[i]] = i - first;
  const int64_t stride = tridiagonal::row_stride(n);
  const std::unique_ptr<T[]> rows(new T[(last - first) * stride]());
  const tridiagonal::Eigenvectors<T> eigenvectors(d, e, norm, last - first, row);
  for (size_t b = 0; b + 1 < blocks.size(); ++b)
    eigenvectors.block(blocks[b], blocks[b + 1], found.data() + blocks[b], rows.get(), stride, schedule);
  reduction.multiply_by_q(rows.get(), last - first);
  std::fill(vectors, vectors + first * n, T(0));
  for (int64_t i = first; i < last; ++i) std::copy_n(rows.get() + (i - first) * stride, n, vectors + i * n);
  std::fill(vectors + last * n, vectors + n * n, T(0));
}

template <typename T>
void decompose_all(const Tensor& matrices, const Cut& cut, T* values, T* vectors) {
  const auto* in = static_cast<const T*>(matrices.const_data_ptr());
  const int64_t count = matrices.size(0), n = matrices.size(1);
  const int64_t threads = torch::stable::get_num_threads(), together = count / threads * threads;
  const auto one = [&](int64_t i, Scheduler schedule) {
    decompose(in + i * n * n, n, cut, values + i * n, vectors ? vectors + i * n * n : nullptr, schedule);
  };
  torch::stable::parallel_for(0, together, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) one(i, {false});
  });
  constexpr int64_t kSmall = 256;  // rows, below which threads that wait for each other cost more than they save
  if (n >= kSmall) {
    for (int64_t i = together; i < count; ++i) one(i, {true});
  } else {
    torch::stable::parallel_for(together, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) one(i, {false});
    });
  }
}

std::pair<Tensor, Tensor> run(const Tensor& matrices, bool with_vectors, const Cut& cut = {}) {
  check_tensor(matrices, Device::kCpu, "matrices");
  DEFTX_CHECK(matrices.dim() == 3 && matrices.size(1) == matrices.size(2), "matrices must have shape [b, n, n]");
  const int32_t dtype = dtype_of(matrices);
  const bool wide = dtype == aoti_torch_dtype_float64();
  DEFTX_CHECK(wide || dtype == aoti_torch_dtype_float32(), "matrices must be float32 or float64");
  const int64_t count = matrices.size(0), n = matrices.size(1);
  Tensor values = torch::stable::new_empty(matrices, {count, n});
  Tensor vectors = torch::stable::new_empty(matrices, {with_vectors ? count : 0, n, n});
  DEFTX_CHECK(cut.rank >= 0 && cut.rank <= n, "rank must be from 0 to ", n, ", got ", cut.rank);
  DEFTX_CHECK(cut.energy >= 0 && cut.energy <= 1, "energy must be from 0 to 1, got ", cut.energy);
  DEFTX_CHECK(cut.median >= 0 && cut.median <= 1e30, "median must be from 0 to 1e30, got ", cut.median);
  DEFTX_CHECK((cut.rank > 0) + (cut.energy > 0) + (cut.median > 0) <= 1,
              "at most one of rank, energy and median may be above 0");
  if (count == 0 || n == 0) return {values, vectors};
  const auto decompose_as = [&](auto zero) {
    using T = decltype(zero);
    decompose_all(matrices, cut, static_cast<T*>(values.mutable_data_ptr()),
                  with_vectors ? static_cast<T*>(vectors.mutable_data_ptr()) : nullptr);
  };
  wide ? decompose_as(double{}) : decompose_as(float{});
  return {values, vectors};
}

std::tuple<Tensor, Tensor> eigh(Tensor matrices, int64_t rank, double energy, double median) {  // [b, n, n]
  const auto [values, vectors] = run(matrices, true, {rank, energy, median});
  return {values, torch::stable::transpose(vectors, 1, 2)};
}

Tensor eigvalsh(Tensor matrices) { return run(matrices, false).first; }  // [b, n, n]

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deftx, CPU, m) {
  m.impl("eigh", TORCH_BOX(&eigh));
  m.impl("eigvalsh", TORCH_BOX(&eigvalsh));
}

}  // namespace deftx
