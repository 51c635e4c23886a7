// masked_linear_grad on the CPU: the masked entries of grad_output.T @ input, [m, n].
//
// Up to a fifth of the entries: a dot product each. The input is packed by columns, a block of tokens after the other,
// so that a column is contiguous and a block stays in the second cache; every thread packs some columns of the gradient
// beside it. Dot products run at a third of a matrix product's rate (float32, two cores of a Sapphire Rapids Xeon: 50
// of 135 GFLOP/s a core), but are a small part of its work. Denser masks: the matrix product (BLAS) of a stretch of
// rows at a time, of which the entries are kept. In neither way is more than a few megabytes of the [m, n] product in
// memory.
//
// Dot products are summed over blocks of tokens, ascending: the same for any number of threads. (BLAS does not promise
// that.)
#include <memory>

#include "products.h"

#ifdef __linux__
#include <unistd.h>
#endif

namespace deftx {
namespace {

using torch::headeronly::ScalarType;

constexpr double kDense = 0.2;            // share of the entries above which BLAS is faster
constexpr int64_t kColumnBytes = 2048;    // of a packed column, at most
constexpr int64_t kPackedColumns = 32;    // that a thread packs at a time
constexpr int64_t kDenseBytes = 8 << 20;  // of a stretch of rows of the matrix product

// Of a packed block: half of the second cache. Kept: older C libraries query the processor in each call.
int64_t block_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);  // 0 or -1 where the system does not report it
#else
  constexpr int64_t cache = 0;
#endif
  return cache > 0 ? std::clamp<int64_t>(cache / 2, 256 << 10, 4 << 20) : 1 << 20;
}

struct Problem {
  Tensor grad_output, input;  // [tokens, rows], [tokens, columns]
  Csr csr;                    // of [rows, columns]
  int64_t tokens, rows, columns;
};

// The columns [begin, end) of the tokens [first, first + length) of a matrix, padded with zeros: out [end - begin,
// length].
template <typename Packed>
void pack(const Tensor& matrix, int64_t first, int64_t length, int64_t begin, int64_t end, Packed* out) {
  const int64_t width = matrix.size(1), tokens = std::min(length, matrix.size(0) - first);
  const auto pack_as = [&](auto zero) {
    const auto* source = static_cast<const decltype(zero)*>(matrix.const_data_ptr()) + first * width;
    for (int64_t c = begin; c < end; c += kPackedColumns)
      pack_columns(source + c, width, tokens, std::min(kPackedColumns, end - c), length, out + (c - begin) * length);
  };
  with_dtype(dtype_of(matrix), "every matrix", pack_as);
}

// A dot product for each entry.
template <typename Packed, typename Column>
void by_entries(const Problem& p, Packed* sums) {
  constexpr int64_t kTokens = kPackedTokens<Packed>, kItem = sizeof(Packed);
  const int64_t longest = std::clamp<int64_t>(block_bytes() / (p.columns * kItem), 4 * kTokens, kColumnBytes / kItem);
  const int64_t equal = (p.tokens - 1) / ((p.tokens - 1) / longest + 1) + 1;  // blocks of about one length
  // An odd number of cache lines: columns that are a multiple of 1024 bytes apart would crowd into a few sets of the
  // first cache.
  const int64_t block = ((equal + kTokens - 1) / kTokens | 1) * kTokens;
  const auto length_of = [&](int64_t first) {
    return std::min(block, (p.tokens - first + kTokens - 1) / kTokens * kTokens);
  };
  // Blocks packed at a time. One stays in a cache; but after each time, all threads wait for one another.
  const int64_t blocks = std::clamp<int64_t>(torch::stable::get_num_threads() / 2, 1, 8);
  const std::unique_ptr<Packed[]> packed(new Packed[std::min(blocks * block, p.tokens + kTokens) * p.columns]);

  // Rows are shared out by their work: entries, and the packing of their gradient.
  const auto* crow = p.csr.crow;
  const auto work_before = [&](int64_t row) { return crow[row] + 4 * row; };
  const auto row_at = [&](int64_t work) {
    int64_t low = 0, high = p.rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      work_before(middle) < work ? low = middle + 1 : high = middle;
    }
    return low;
  };

  const auto* column = static_cast<const Column*>(p.csr.col);
  for (int64_t start = 0; start < p.tokens; start += blocks * block) {
    const int64_t stop = std::min(start + blocks * block, p.tokens);
    const auto pack_input = [&](int64_t begin, int64_t end) {
      begin *= kPackedColumns, end = std::min(end * kPackedColumns, p.columns);
      for (int64_t first = start; first < stop; first += block) {
        const int64_t length = length_of(first);
        pack(p.input, first, length, begin, end, packed.get() + (first - start) * p.columns + begin * length);
      }
    };
    const int64_t groups = (p.columns + kPackedColumns - 1) / kPackedColumns;
    torch::stable::parallel_for(0, groups, std::max<int64_t>(kGrain / (kPackedColumns * (stop - start)), 1),
                                pack_input);

    const auto multiply = [&](int64_t begin, int64_t end) {
      const int64_t last_row = row_at(end);
      const std::unique_ptr<Packed[]> gradient(new Packed[kPackedColumns * block]);
      for (int64_t first = start; first < stop; first += block) {
        const int64_t length = length_of(first);
        const Packed* x = packed.get() + (first - start) * p.columns;
        for (int64_t row = row_at(begin), next; row < last_row; row = next) {
          next = std::min(row + kPackedColumns, last_row);
          if (crow[row] == crow[next]) continue;
          pack(p.grad_output, first, length, row, next, gradient.get());
          for (const Packed* g = gradient.get(); row < next; ++row, g += length)
            add_products(g, x, length, column + crow[row], crow[row + 1] - crow[row], first == 0, sums + crow[row]);
        }
      }
    };
    torch::stable::parallel_for(0, work_before(p.rows), std::max<int64_t>(kGrain / (stop - start), 16), multiply);
  }
}

// The matrix product of a stretch of rows at a time.
template <typename Sum, typename Column>
void by_rows(const Problem& p, Sum* sums) {
  constexpr auto kDtype = std::is_same_v<Sum, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor input = torch::stable::to(p.input, kDtype);
  const auto* column = static_cast<const Column*>(p.csr.col);
  const int64_t stretch = std::max<int64_t>(kDenseBytes / (p.columns * sizeof(Sum)) / 16 * 16, 16);
  for (int64_t start = 0; start < p.rows; start += stretch) {
    const int64_t rows = std::min(stretch, p.rows - start);
    Tensor part = p.grad_output;
    part = torch::stable::to(torch::stable::narrow(part, 1, start, rows), kDtype);
    const Tensor product = torch::stable::matmul(torch::stable::transpose(part, 0, 1), input);  // [rows, columns]
    const auto* dense = static_cast<const Sum*>(product.const_data_ptr());
    const int64_t* crow = p.csr.crow + start;
    torch::stable::parallel_for(0, rows, std::max<int64_t>(kGrain / p.columns, 1), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t e = crow[r]; e < crow[r + 1]; ++e) sums[e] = dense[r * p.columns + column[e]];
    });
  }
}

template <typename Sum, typename Column>
void products_at_entries(const Problem& p, void* out) {
  check_contents<Column>(p.csr);
  auto* sums = static_cast<Sum*>(out);
  if (static_cast<double>(p.csr.nnz) > kDense * static_cast<double>(p.rows) * static_cast<double>(p.columns))
    return by_rows<Sum, Column>(p, sums);
  by_entries<Sum, Column>(p, sums);
}

Tensor masked_linear_grad(Tensor grad_output,   // [tokens, m]
                          Tensor input,         // [tokens, n]
                          Tensor crow_indices,  // int64 [m + 1]
                          Tensor col_indices,   // uint16 or int32 [nnz]
                          ScalarType dtype) {
  for (const auto& [t, name] : {std::pair{&grad_output, "grad_output"}, std::pair{&input, "input"}}) {
    check_tensor(*t, Device::kCpu, name);
    DEFTX_CHECK(t->dim() == 2, name, " must be a matrix [tokens, features]");
    with_dtype(dtype_of(*t), name, [](auto) {});
  }
  Problem p{grad_output,         input,        check_mask(crow_indices, col_indices, Device::kCpu), grad_output.size(0),
            grad_output.size(1), input.size(1)};
  DEFTX_CHECK(input.size(0) == p.tokens, "grad_output has ", p.tokens, " tokens and input ", input.size(0));
  DEFTX_CHECK(p.csr.rows == p.rows, "crow_indices has ", p.csr.rows + 1, " elements; grad_output has ", p.rows,
              " features, which need ", p.rows + 1);
  p.csr.slices.push_back({nullptr, 0, p.columns});
  const bool wide = dtype == ScalarType::Double, narrow = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  DEFTX_CHECK(wide || narrow || dtype == ScalarType::Float, "dtype must be float32, float64, bfloat16 or float16");
  if (p.csr.nnz == 0 || p.tokens == 0) return torch::stable::new_zeros(grad_output, {p.csr.nnz}, dtype);
  Tensor sums = torch::stable::new_empty(grad_output, {p.csr.nnz}, narrow ? ScalarType::Float : dtype);
  void* out = sums.mutable_data_ptr();
  if (wide)
    (p.csr.wide ? products_at_entries<double, int32_t> : products_at_entries<double, uint16_t>)(p, out);
  else
    (p.csr.wide ? products_at_entries<float, int32_t> : products_at_entries<float, uint16_t>)(p, out);
  return narrow ? torch::stable::to(sums, dtype) : sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deftx, CPU, m) { m.impl("masked_linear_grad", TORCH_BOX(&masked_linear_grad)); }

}  // namespace deftx
