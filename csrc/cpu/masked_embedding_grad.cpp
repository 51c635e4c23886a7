// masked_embedding_grad on the CPU: the tokens are sorted by their row of the embedding; of each row that occurs, the
// masked columns are summed over its tokens, in the tokens' order. Rows that do not occur are not read.
#include <cstring>
#include <type_traits>

#include "rows.h"

namespace deftx {
namespace {

struct Token {
  int64_t row, position;
};

// The tokens in ascending order of their rows and positions, without those of the row padding_idx.
template <typename Index>
std::vector<Token> sorted_tokens(const Tensor& indices, int64_t rows, int64_t padding_idx) {
  const auto* index = static_cast<const Index*>(indices.const_data_ptr());
  std::vector<Token> tokens;
  tokens.reserve(indices.numel());
  for (int64_t i = 0; i < indices.numel(); ++i) {
    DEFTX_CHECK(index[i] >= 0 && index[i] < rows, "indices must be at least 0 and less than ", rows, ", got ",
                index[i]);
    if (index[i] != padding_idx) tokens.push_back({index[i], i});
  }
  std::sort(tokens.begin(), tokens.end(),
            [](const Token& a, const Token& b) { return a.row != b.row ? a.row < b.row : a.position < b.position; });
  return tokens;
}

// Throws unless the entries of the rows that occur lie in the mask, row after row: no two rows share an entry, so that
// no two threads write one.
void check_rows(const std::vector<Token>& tokens, const Csr& csr) {
  int64_t end = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const int64_t row = tokens[i].row;
    if (i > 0 && row == tokens[i - 1].row) continue;
    DEFTX_CHECK(end <= csr.crow[row] && csr.crow[row] <= csr.crow[row + 1] && csr.crow[row + 1] <= csr.nnz,
                "crow_indices must ascend from 0 to nnz = ", csr.nnz, ", got ", csr.crow[row], " and ",
                csr.crow[row + 1], " for row ", row);
    end = csr.crow[row + 1];
  }
}

// out [nnz] = zeros, and the sums of the tokens' gradients [N, columns]. The columns of rows that occur are checked as
// they are read.
template <typename Source, typename Out, typename Column>
void add_tokens(const std::vector<Token>& tokens, const Csr& csr, const Source* gradient, int64_t columns, Out* out) {
  using Compute = std::conditional_t<std::is_same_v<Out, double>, double, float>;
  const auto* column = static_cast<const Column*>(csr.col);
  const auto count = static_cast<int64_t>(tokens.size());
  torch::stable::parallel_for(0, csr.nnz, 16 * kGrain, [&](int64_t begin, int64_t end) {
    std::memset(static_cast<void*>(out + begin), 0, (end - begin) * sizeof(Out));
  });
  const int64_t entries_per_row = csr.nnz / std::max<int64_t>(csr.rows, 1) + 1;
  std::atomic<bool> bad{false};
  torch::stable::parallel_for(0, count, std::max<int64_t>(kGrain / entries_per_row, 1),
                              [&](int64_t begin, int64_t end) {
                                std::vector<Compute> sums;
                                while (begin > 0 && begin < end && tokens[begin].row == tokens[begin - 1].row)
                                  ++begin;  // of the thread before
                                for (int64_t first = begin, last; first < end; first = last) {
                                  const int64_t row = tokens[first].row;
                                  for (last = first + 1; last < count && tokens[last].row == row;) ++last;
                                  const int64_t entry = csr.crow[row], entries = csr.crow[row + 1] - entry;
                                  const Column* chosen = column + entry;
                                  bool wrong = false;
                                  for (int64_t j = 0; j < entries; ++j) wrong |= chosen[j] < 0 || chosen[j] >= columns;
                                  if (wrong) {
                                    bad = true;
                                    return;
                                  }
                                  sums.assign(entries, 0);
                                  for (int64_t t = first; t < last; ++t) {
                                    const Source* from = gradient + tokens[t].position * columns;
                                    for (int64_t j = 0; j < entries; ++j)
                                      sums[j] += static_cast<Compute>(from[chosen[j]]);
                                  }
                                  for (int64_t j = 0; j < entries; ++j) out[entry + j] = static_cast<Out>(sums[j]);
                                }
                              });
  DEFTX_CHECK(!bad, "col_indices must be less than ", columns);
}

Tensor masked_embedding_grad(Tensor grad_output,   // [N, columns]
                             Tensor indices,       // int32 or int64 [N]
                             Tensor crow_indices,  // int64 [rows + 1]
                             Tensor col_indices,   // uint16 or int32 [nnz]
                             int64_t padding_idx, torch::headeronly::ScalarType dtype) {
  const Csr csr = check_mask(crow_indices, col_indices, Device::kCpu);
  check_tensor(grad_output, Device::kCpu, "grad_output");
  check_tensor(indices, Device::kCpu, "indices");
  DEFTX_CHECK(grad_output.dim() == 2 && indices.dim() == 1 && grad_output.size(0) == indices.numel(),
              "grad_output must have a row for each of the ", indices.numel(), " indices");
  const bool wide = dtype_of(indices) == aoti_torch_dtype_int64();
  DEFTX_CHECK(wide || dtype_of(indices) == aoti_torch_dtype_int32(), "indices must be int32 or int64");
  DEFTX_CHECK(csr.rows >= 0, "crow_indices must not be empty");
  const auto tokens = (wide ? sorted_tokens<int64_t> : sorted_tokens<int32_t>)(indices, csr.rows, padding_idx);
  check_rows(tokens, csr);
  Tensor out = torch::stable::new_empty(grad_output, {csr.nnz}, dtype);
  with_dtype(dtype_of(out), "dtype", [&](auto zero) {
    using Out = decltype(zero);
    with_dtype(dtype_of(grad_output), "grad_output", [&](auto source) {
      using Source = decltype(source);
      (csr.wide ? add_tokens<Source, Out, int32_t>
                : add_tokens<Source, Out, uint16_t>)(tokens, csr,
                                                     static_cast<const Source*>(grad_output.const_data_ptr()),
                                                     grad_output.size(1), static_cast<Out*>(out.mutable_data_ptr()));
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deftx, CPU, m) { m.impl("masked_embedding_grad", TORCH_BOX(&masked_embedding_grad)); }

}  // namespace deftx
