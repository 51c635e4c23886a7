// csr_combine on the CPU: a merge of two lists that ascend by (row, column).
//
// The merge is cut into pieces of equal work, within rows too, since a 1-D tensor is one row. Each piece is merged
// twice: to count its common entries, and to write. The cuts depend on the masks alone, so the result does not depend
// on the number of threads. A thread merges two pieces in turns: a step waits for the one before it (about 9 cycles),
// but not for the other piece's.
#include "rows.h"

namespace deftx {
namespace {

constexpr int64_t kPiece = 32768;  // rows and entries of both masks; about 50 us of merging

enum class Pass { kCount, kAnd, kOr, kSub };  // kCount: the common entries; nothing is written

template <typename Column>
struct Mask {
  const int64_t* crow;  // [rows + 1]
  const Column* col;    // [nnz]
  int64_t rows, nnz;
};

// Where the merge is cut: before it lie the entries [0, i) of one mask, [0, j) of the other and the ends of the rows
// [0, row).
struct Cut {
  int64_t row, i, j;
};

// The cut after `work` units of the merge, where an entry is a unit and so is the end of a row; equal entries stay
// together.
template <typename Column>
Cut cut_at(const Mask<Column>& mine, const Mask<Column>& theirs, int64_t work) {
  int64_t row = 0;
  for (int64_t high = mine.rows + 1; high - row > 1;) {
    const int64_t middle = row + (high - row) / 2;
    (mine.crow[middle] + theirs.crow[middle] + middle <= work ? row : high) = middle;
  }
  Cut cut{row, mine.crow[row], theirs.crow[row]};
  if (row == mine.rows) return cut;
  const Column *a = mine.col + cut.i, *b = theirs.col + cut.j;
  const int64_t a_count = mine.crow[row + 1] - cut.i, b_count = theirs.crow[row + 1] - cut.j;
  const int64_t rest = work - cut.i - cut.j - row;  // units of this row before the cut, at most a_count + b_count
  int64_t taken = std::max<int64_t>(0, rest - b_count);
  for (int64_t high = std::min(rest, a_count); taken < high;) {
    const int64_t middle = taken + (high - taken) / 2;
    if (a[middle] <= b[rest - 1 - middle])
      taken = middle + 1;
    else
      high = middle;
  }
  cut.i += taken;
  cut.j += rest - taken;
  if (taken > 0 && rest - taken < b_count && a[taken - 1] == b[rest - taken]) ++cut.j;
  return cut;
}

// 1 where x < 0, else 0. In arithmetic, since GCC turns `a += x <= y` into a branch, which a merge mispredicts at every
// other step (one Xeon core: 4.8 ns a step with the branch, 3.3 without, 1.7 with two pieces in turns).
inline int64_t is_negative(int64_t x) { return static_cast<int64_t>(static_cast<uint64_t>(x) >> 63); }

// One piece of the merge.
template <Pass kPass, typename Column>
class Merge {
 public:
  Merge(const Mask<Column>& mine, const Mask<Column>& theirs, const Cut& begin, const Cut& end, Column* out,
        const Column* out_end)
      : a_(mine.col + begin.i), b_(theirs.col + begin.j), out_(out), out_end_(out_end), row_(begin.row), end_(end) {
    set_row_end(mine, theirs);
  }

  // Whether both masks have entries left in this row. Nothing at or after out_end is written: it belongs to another
  // thread.
  bool can_step() const {
    const bool room = kPass == Pass::kCount || kPass == Pass::kOr || out_ < out_end_;
    return a_ < a_end_ && b_ < b_end_ && room;
  }

  void step() {
    const Column x = *a_, y = *b_;
    const int64_t difference = static_cast<int64_t>(x) - static_cast<int64_t>(y);
    const int64_t a_step = is_negative(difference - 1), b_step = is_negative(~difference);
    if constexpr (kPass == Pass::kCount) {
      common_ += a_step & b_step;
    } else {
      *out_ = kPass == Pass::kOr ? std::min(x, y) : x;
      out_ += kPass == Pass::kOr ? 1 : kPass == Pass::kAnd ? a_step & b_step : 1 - b_step;
    }
    a_ += a_step;
    b_ += b_step;
  }

  // Goes on to the next row where a step can be taken; false if there is none in this piece.
  bool next_row(const Mask<Column>& mine, const Mask<Column>& theirs, int64_t* crow_out, const Column* col_out) {
    while (!can_step()) {
      if (kPass == Pass::kOr || (kPass == Pass::kSub && out_ < out_end_)) out_ = std::copy(a_, a_end_, out_);
      if (kPass == Pass::kOr) out_ = std::copy(b_, b_end_, out_);
      if (row_ == end_.row) return false;
      ++row_;
      if (kPass != Pass::kCount) crow_out[row_] = out_ - col_out;
      a_ = a_end_;
      b_ = b_end_;
      set_row_end(mine, theirs);
    }
    return true;
  }

  int64_t common() const { return common_; }

 private:
  void set_row_end(const Mask<Column>& mine, const Mask<Column>& theirs) {
    a_end_ = mine.col + (row_ < end_.row ? mine.crow[row_ + 1] : end_.i);
    b_end_ = theirs.col + (row_ < end_.row ? theirs.crow[row_ + 1] : end_.j);
  }

  const Column *a_, *a_end_, *b_, *b_end_;
  Column* out_;
  const Column* out_end_;
  int64_t row_, common_ = 0;
  Cut end_;
};

// Merges all pieces. kCount: sets first[p + 1] to the common entries of piece p. Else: writes piece p's entries to
// col_out[first[p]...first[p + 1]], and where the rows end that end in it.
template <Pass kPass, typename Column>
void merge_pieces(const Mask<Column>& mine, const Mask<Column>& theirs, const std::vector<Cut>& cuts,
                  std::vector<int64_t>& first, int64_t* crow_out, Column* col_out) {
  torch::stable::parallel_for(0, static_cast<int64_t>(first.size()) / 2, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = 2 * begin; p < 2 * end; p += 2) {
      const auto out = [&](int64_t q) { return kPass == Pass::kCount ? nullptr : col_out + first[q]; };
      Merge<kPass, Column> x(mine, theirs, cuts[p], cuts[p + 1], out(p), out(p + 1));
      Merge<kPass, Column> y(mine, theirs, cuts[p + 1], cuts[p + 2], out(p + 1), out(p + 2));
      bool x_goes_on = x.next_row(mine, theirs, crow_out, col_out),
           y_goes_on = y.next_row(mine, theirs, crow_out, col_out);
      while (x_goes_on && y_goes_on) {
        do {
          x.step();
          y.step();
        } while (x.can_step() && y.can_step());
        x_goes_on = x.next_row(mine, theirs, crow_out, col_out);
        y_goes_on = y.next_row(mine, theirs, crow_out, col_out);
      }
      for (; x_goes_on; x_goes_on = x.next_row(mine, theirs, crow_out, col_out)) x.step();
      for (; y_goes_on; y_goes_on = y.next_row(mine, theirs, crow_out, col_out)) y.step();
      if (kPass == Pass::kCount) {
        first[p + 1] = x.common();
        first[p + 2] = y.common();
      }
    }
  });
}

template <Pass kPass, typename Column>
std::tuple<Tensor, Tensor> combine(const Mask<Column>& mine, const Mask<Column>& theirs, const Tensor& crow_indices,
                                   const Tensor& col_indices) {
  const int64_t work = mine.nnz + theirs.nnz + mine.rows, pieces = 2 * (work / (2 * kPiece) + 1);
  std::vector<Cut> cuts(pieces + 1, Cut{0, 0, 0});
  torch::stable::parallel_for(1, pieces + 1, 256, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) cuts[p] = cut_at(mine, theirs, std::min(p * kPiece, work));
  });
  std::vector<int64_t> first(pieces + 1, 0);  // where each piece's entries go
  for (int64_t p = 1; p <= pieces; ++p) {     // changes something only where columns descend
    cuts[p].i = std::max(cuts[p].i, cuts[p - 1].i);
    cuts[p].j = std::max(cuts[p].j, cuts[p - 1].j);
  }
  merge_pieces<Pass::kCount, Column>(mine, theirs, cuts, first, nullptr, nullptr);
  for (int64_t p = 0; p < pieces; ++p) {
    const int64_t common = first[p + 1], a_count = cuts[p + 1].i - cuts[p].i, b_count = cuts[p + 1].j - cuts[p].j;
    const int64_t count = kPass == Pass::kAnd  ? common
                          : kPass == Pass::kOr ? a_count + b_count - common
                                               : a_count - common;
    first[p + 1] = first[p] + count;
  }
  Tensor crow_out = torch::stable::new_empty(crow_indices, {mine.rows + 1});
  Tensor col_out = torch::stable::new_empty(col_indices, {first[pieces]});
  auto* crow = static_cast<int64_t*>(crow_out.mutable_data_ptr());
  crow[0] = 0;
  merge_pieces<kPass>(mine, theirs, cuts, first, crow, static_cast<Column*>(col_out.mutable_data_ptr()));
  return {crow_out, col_out};
}

template <typename Column>
std::tuple<Tensor, Tensor> combine_typed(const Csr& mine, const Csr& theirs, const Tensor& crow_indices,
                                         const Tensor& col_indices, Operation operation) {
  const Mask<Column> a{mine.crow, static_cast<const Column*>(mine.col), mine.rows, mine.nnz};
  const Mask<Column> b{theirs.crow, static_cast<const Column*>(theirs.col), theirs.rows, theirs.nnz};
  // Columns are not checked: whatever they are, the merge stays within its ranges, and both of its passes find the
  // same.
  check_crow(a.crow, a.rows, a.nnz, "crow_indices");
  check_crow(b.crow, b.rows, b.nnz, "other_crow_indices");
  if (operation == Operation::kAnd) return combine<Pass::kAnd>(a, b, crow_indices, col_indices);
  if (operation == Operation::kOr) return combine<Pass::kOr>(a, b, crow_indices, col_indices);
  return combine<Pass::kSub>(a, b, crow_indices, col_indices);
}

std::tuple<Tensor, Tensor> csr_combine(Tensor crow_indices, Tensor col_indices, Tensor other_crow_indices,
                                       Tensor other_col_indices, int64_t operation) {
  const Operation which = operation_of(operation);
  const auto [mine, theirs] =
      check_combine(crow_indices, col_indices, other_crow_indices, other_col_indices, Device::kCpu);
  return mine.wide ? combine_typed<int32_t>(mine, theirs, crow_indices, col_indices, which)
                   : combine_typed<uint16_t>(mine, theirs, crow_indices, col_indices, which);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deftx, CPU, m) { m.impl("csr_combine", TORCH_BOX(&csr_combine)); }

}  // namespace deftx
