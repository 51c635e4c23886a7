// Walking the entries of a mask on the CPU, row by row, and the types of their tensors.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <atomic>

#include "../stable.h"

namespace deftx {

using c10::BFloat16;
using c10::Half;

// Calls f(T{}) for the type T of a dtype's elements.
template <typename F>
void with_dtype(int32_t dtype, const char* name, const F& f) {
  if (dtype == aoti_torch_dtype_float32()) return f(float{});
  if (dtype == aoti_torch_dtype_bfloat16()) return f(BFloat16{});
  if (dtype == aoti_torch_dtype_float16()) return f(Half{});
  DEFTX_CHECK(dtype == aoti_torch_dtype_float64(), name, " must be float32, float64, bfloat16 or float16");
  f(double{});
}

constexpr int64_t kGrain = 16384;  // entries; below about 50 us of work a second thread costs more than it saves

// A stretch of entries [begin, end) that lies in one row.
struct Run {
  int64_t tensor;      // the row's tensor
  int64_t offset;      // of the row in the tensor, in elements
  int64_t begin, end;  // entries of the mask
  int64_t row_begin;   // the row's first entry
};

// The row's elements. T: the tensors' type.
template <typename T>
T* row_of(const Csr& csr, const Run& run) {
  return static_cast<T*>(csr.slices[run.tensor].data) + run.offset;
}

// Calls visit(row, i, stop) for the stretches [i, stop) of the entries [begin, end) that lie in one row, in ascending
// order.
template <typename Visit>
void for_each_row(const int64_t* crow, int64_t rows, int64_t begin, int64_t end, const Visit& visit) {
  if (begin >= end) return;
  int64_t row = std::upper_bound(crow, crow + rows + 1, begin) - crow - 1;
  for (int64_t i = begin, stop; i < end; ++row) {
    stop = std::min(crow[row + 1], end);
    if (i >= stop) continue;
    visit(row, i, stop);
    i = stop;
  }
}

// Calls visit(run) for the runs of the entries [begin, end), in ascending order.
template <typename Visit>
void for_each_run(const Csr& csr, int64_t begin, int64_t end, const Visit& visit) {
  if (begin >= end) return;  // there may be no slices
  auto slice = csr.slices.begin();
  const auto last = csr.slices.end() - 1;
  for_each_row(csr.crow, csr.rows, begin, end, [&](int64_t row, int64_t i, int64_t stop) {
    if (i == begin)
      slice = std::upper_bound(csr.slices.begin(), csr.slices.end(), row,
                               [](int64_t r, const Slice& s) { return r < s.first_row; }) -
              1;
    while (slice != last && row >= slice[1].first_row) ++slice;
    visit(Run{slice - csr.slices.begin(), (row - slice->first_row) * slice->columns, i, stop, csr.crow[row]});
  });
}

// How many of the n indices are below the one before them, or equal to it if `strict`.
template <typename Index>
DEFTX_CLONES int64_t count_descents(const Index* index, int64_t n, bool strict) {
  int64_t count = 0;
  for (int64_t first = 0; first < n; first += 4096) {  // short sums, of which a vector holds many
    int32_t part = 0;
    const int64_t last = std::min(first + 4096, n);
    if (strict)
      for (int64_t j = first; j < last; ++j) part += index[j - 1] >= index[j];
    else
      for (int64_t j = first; j < last; ++j) part += index[j - 1] > index[j];
    count += part;
  }
  return count;
}

// Throws unless crow_indices ascends from 0 to nnz.
inline void check_crow(const int64_t* crow, int64_t rows, int64_t nnz, const char* name) {
  DEFTX_CHECK(crow[0] == 0 && crow[rows] == nnz, name, " must run from 0 to nnz = ", nnz, ", got ", crow[0], " to ",
              crow[rows]);
  std::atomic<bool> bad{false};
  torch::stable::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
    if (count_descents(crow + begin + 1, end - begin, false)) bad = true;
  });
  DEFTX_CHECK(!bad, name, " must not descend");
}

// Throws unless crow_indices ascends from 0 to nnz and each row's columns ascend strictly and stay inside the row.
// Strictly, because two threads must not meet in one element.
template <typename Column>
void check_contents(const Csr& csr) {
  check_crow(csr.crow, csr.rows, csr.nnz, "crow_indices");
  std::atomic<bool> bad{false};
  const auto* col = static_cast<const Column*>(csr.col);
  torch::stable::parallel_for(0, csr.nnz, kGrain, [&](int64_t begin, int64_t end) {
    // A column may descend where a row begins, and nowhere else.
    bool wrong = false;
    const int64_t from = std::max<int64_t>(begin, 1);
    int64_t descents = count_descents(col + from, end - from, true);
    for_each_run(csr, begin, end, [&](const Run& run) {
      const bool begins = run.begin == run.row_begin && run.begin > 0;
      descents -= begins && col[run.begin - begins] >= col[run.begin];
      wrong |= col[run.begin] < 0 || col[run.end - 1] >= csr.slices[run.tensor].columns;
    });
    wrong |= descents != 0;
    if (wrong) bad = true;
  });
  DEFTX_CHECK(!bad, "col_indices must ascend strictly within each row and be less than the row's number of columns");
}

}  // namespace deftx
