// csr_sum on the CPU.
//
// The entries of the result's mask are cut into pieces of equal length, whatever rows they fall into. A piece is summed
// in blocks, which each mask's entries are merged with, row by row. Each entry is computed by one thread alone, its
// terms in the order of the masks, so the result does not depend on the number of threads. A merge takes no branch on
// what it finds, since a processor would mispredict every other one: it writes a list of the common entries, and their
// terms are added from that list.
#include "rows.h"

namespace deftx {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kBlock = 256;  // entries
static_assert(kGrain % kBlock == 0, "blocks must not depend on the number of threads");

// The common entries of a block and of one of the masks.
struct Common {
  int64_t count = 0;
  int64_t position[kBlock];  // in the mask
  int32_t entry[kBlock];     // in the block
};

// Adds the common entries of the columns mine[0...n) and theirs[position...end) of a row, both ascending; `entry` is
// that of mine[0]. Each step passes at least one of mine or of theirs, and at most one is added for each of mine, so
// that nothing outside is read or written where they do not ascend, either.
template <typename Column>
void merge(const Column* mine, int64_t n, int64_t entry, const Column* theirs, int64_t position, int64_t end,
           Common& common) {
  int64_t count = common.count;
  for (int64_t k = 0; k < n && position < end;) {
    const Column x = mine[k], y = theirs[position];
    const int64_t passes_mine = x <= y, passes_theirs = y <= x;
    common.position[count] = position;
    common.entry[count] = static_cast<int32_t>(entry + k);
    count += passes_mine & passes_theirs;
    k += passes_mine;
    position += passes_theirs;
  }
  common.count = count;
}

// The sums of a block. Elections have two, of the positive and of the negative values, until the votes are counted.
// x + -0.0 is x for every x, so that a sum of -0.0 alone is -0.0.
struct Sums {
  double sum[2][kBlock], votes[kBlock];
  int32_t count[2][kBlock];

  void clear(int64_t n) {
    for (auto& side : sum) std::fill_n(side, n, -0.0);
    for (auto& side : count) std::fill_n(side, n, 0);
    std::fill_n(votes, n, 0.0);
  }

  template <typename T>
  void add(const Common& common, const T* values, double weight) {
    for (int64_t i = 0; i < common.count; ++i) {
      const int32_t k = common.entry[i];
      sum[0][k] += weight * static_cast<double>(values[common.position[i]]);
      ++count[0][k];
    }
  }

  template <typename T>
  void elect(const Common& common, const T* values, double weight, Election election) {
    for (int64_t i = 0; i < common.count; ++i) {
      const int32_t k = common.entry[i];
      const auto x = static_cast<double>(values[common.position[i]]);
      const int positive = x > 0, negative = x < 0;
      votes[k] += election == Election::kTotal ? x : positive - negative;
      sum[negative][k] += positive | negative ? weight * x : -0.0;
      count[negative][k] += positive | negative;
    }
  }

  double result(int64_t k, Election election) const {
    const int side = election != Election::kNone && !(votes[k] >= 0);
    if (count[side][k] == 0) return 0;
    return election == Election::kNone ? sum[side][k] : sum[side][k] / count[side][k];
  }
};

template <typename Out, typename Column>
void sum_entries(const Csr& csr, const std::vector<Summand>& summands, Election election, Out* out) {  // out [nnz]
  const auto* mine = static_cast<const Column*>(csr.col);
  torch::stable::parallel_for(0, (csr.nnz + kGrain - 1) / kGrain, 1, [&](int64_t begin, int64_t end) {
    std::vector<Common> common(summands.size());
    Sums sums;
    const int64_t last = std::min(end * kGrain, csr.nnz);
    for (int64_t first = begin * kGrain; first < last; first += kBlock) {
      const int64_t n = std::min(kBlock, last - first);
      for (Common& c : common) c.count = 0;
      for_each_row(csr.crow, csr.rows, first, first + n, [&](int64_t row, int64_t i, int64_t stop) {
        for (size_t j = 0; j < summands.size(); ++j) {
          const int64_t* crow = summands[j].csr.crow;
          const auto* theirs = static_cast<const Column*>(summands[j].csr.col);
          int64_t position = crow[row];
          if (i > csr.crow[row])
            position = std::lower_bound(theirs + position, theirs + crow[row + 1], mine[i]) - theirs;
          merge(mine + i, stop - i, i - first, theirs, position, crow[row + 1], common[j]);
        }
      });
      sums.clear(n);
      for (size_t j = 0; j < summands.size(); ++j) {
        const Summand& s = summands[j];
        with_dtype(s.dtype, "values", [&](auto zero) {
          const auto* values = static_cast<const decltype(zero)*>(s.values);
          election == Election::kNone ? sums.add(common[j], values, s.weight)
                                      : sums.elect(common[j], values, s.weight, election);
        });
      }
      for (int64_t k = 0; k < n; ++k) out[first + k] = static_cast<Out>(sums.result(k, election));
    }
  });
}

Tensor csr_sum(Tensor crow_indices, Tensor col_indices,  // of the result
               std::vector<Tensor> other_crow_indices, std::vector<Tensor> other_col_indices,
               std::vector<Tensor> values, std::vector<double> weights, int64_t election, ScalarType dtype) {
  const Election which = election_of(election);
  const Csr csr = check_entries_of_sum(crow_indices, col_indices, dtype, Device::kCpu);
  const std::vector<Summand> summands =
      check_summands(csr, col_indices, other_crow_indices, other_col_indices, values, weights, Device::kCpu);
  // Columns are not checked: a merge stays within its ranges whatever they are.
  check_crow(csr.crow, csr.rows, csr.nnz, "crow_indices");
  for (size_t j = 0; j < summands.size(); ++j) {
    const Csr& other = summands[j].csr;
    check_crow(other.crow, other.rows, other.nnz, ("other_crow_indices[" + std::to_string(j) + "]").c_str());
  }
  Tensor out = torch::stable::new_empty(col_indices, {csr.nnz}, dtype);
  const auto run = [&](auto zero) {
    auto* sums = static_cast<decltype(zero)*>(out.mutable_data_ptr());
    csr.wide ? sum_entries<decltype(zero), int32_t>(csr, summands, which, sums)
             : sum_entries<decltype(zero), uint16_t>(csr, summands, which, sums);
  };
  dtype == ScalarType::Double ? run(double{}) : run(float{});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deftx, CPU, m) { m.impl("csr_sum", TORCH_BOX(&csr_sum)); }

}  // namespace deftx
