// masked_linear_grad on the CPU: the masked entries of grad_output.T @ input, [m, n].
//
// Up to a quarter of the entries: one dot product each. The input is packed by columns, block after block of tokens, so that a
// column of a block is contiguous and a block stays in the second cache; every thread packs a few rows of the gradient beside it.
// A dot product then reads its column from the second cache, which allows about a third of the matrix product's rate (float32, two
// cores of a Sapphire Rapids Xeon), for a small part of its work. Denser masks: the matrix product of a stretch of rows at a time
// (BLAS), of which the entries are kept. No [m, n] buffer exists in either way.
//
// Sums are over blocks of tokens, ascending, and do not depend on the number of threads (those of BLAS may).
#include <cstring>
#include <memory>
#include <type_traits>

#include "rows.h"

namespace deftx {
namespace {

constexpr double kDense = 0.25;           // share of entries above which BLAS is faster
constexpr int64_t kEntries = 8;           // dot products at a time
constexpr int64_t kRows = 32;             // of the gradient that a thread packs at a time
constexpr int64_t kColumns = 32;          // of the input
constexpr int64_t kAhead = 32;            // tokens that packing asks for ahead
constexpr int64_t kBlockBytes = 1 << 20;  // of a block of packed tokens, for the second cache
constexpr int64_t kDenseBytes = 4 << 20;  // of a stretch of rows of the matrix product

// These loops are what the time goes into: compiled for AVX2 and AVX-512, too. (CMake lets them contract a * b + c into one.)
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define DEFTX_WIDE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DEFTX_WIDE_CLONES
#endif

#if defined(__GNUC__) && !defined(__clang__)
typedef float Floats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(32)));
#pragma GCC diagnostic ignored "-Wpsabi"

// The sums of the lanes of eight vectors, in their order.
inline __attribute__((always_inline)) void sums_of_lanes(const Floats* v, float* out) {
  typedef int32_t Order __attribute__((vector_size(32)));
  constexpr Order even = {0, 2, 8, 10, 4, 6, 12, 14}, odd = {1, 3, 9, 11, 5, 7, 13, 15};
  constexpr Order low = {0, 1, 2, 3, 8, 9, 10, 11}, high = {4, 5, 6, 7, 12, 13, 14, 15};
  const auto fold = [&](Floats a, Floats b)
                        __attribute__((always_inline)) { return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd); };
  const Floats a = fold(fold(v[0], v[1]), fold(v[2], v[3])), b = fold(fold(v[4], v[5]), fold(v[6], v[7]));
  const Floats sums = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  std::memcpy(out, &sums, sizeof sums);
}

inline __attribute__((always_inline)) void sums_of_lanes(const Doubles* v, double* out) {
  typedef int64_t Order __attribute__((vector_size(32)));
  constexpr Order even = {0, 4, 2, 6}, odd = {1, 5, 3, 7}, low = {0, 1, 4, 5}, high = {2, 3, 6, 7};
  const auto fold = [&](Doubles a, Doubles b)
                        __attribute__((always_inline)) { return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd); };
  for (int64_t i = 0; i < kEntries; i += 4) {
    const Doubles a = fold(v[i], v[i + 1]), b = fold(v[i + 2], v[i + 3]);
    const Doubles sums = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    std::memcpy(out + i, &sums, sizeof sums);
  }
}

inline __attribute__((always_inline)) void load(const float* from, Floats& to) { std::memcpy(&to, from, sizeof to); }
inline __attribute__((always_inline)) void load(const BFloat16* from, Floats& to) {
  typedef uint16_t Bits __attribute__((vector_size(16)));
  typedef uint32_t Wide __attribute__((vector_size(32)));
  Bits bits;
  std::memcpy(&bits, from, sizeof bits);
  const Wide wide = __builtin_convertvector(bits, Wide) << 16;
  std::memcpy(&to, &wide, sizeof to);
}
template <typename Source, typename Vector>
inline __attribute__((always_inline)) void load(const Source* from, Vector& to) {
  for (size_t i = 0; i < sizeof(Vector) / sizeof(to[0]); ++i) to[i] = static_cast<std::decay_t<decltype(to[0])>>(from[i]);
}

// out[i][t] = source[t][i] of eight by eight numbers.
template <typename Source>
inline __attribute__((always_inline)) void transpose_square(const Source* source, int64_t stride, float* out, int64_t out_stride) {
  typedef int32_t Order __attribute__((vector_size(32)));
  Floats r[8], s[8];
  for (int64_t i = 0; i < 8; ++i) load(source + i * stride, r[i]);
  for (int64_t i = 0; i < 8; i += 2) {
    s[i] = __builtin_shuffle(r[i], r[i + 1], Order{0, 8, 1, 9, 4, 12, 5, 13});
    s[i + 1] = __builtin_shuffle(r[i], r[i + 1], Order{2, 10, 3, 11, 6, 14, 7, 15});
  }
  for (int64_t i = 0; i < 8; i += 4) {
    for (int64_t k = 0; k < 2; ++k) {
      r[i + 2 * k] = __builtin_shuffle(s[i + k], s[i + k + 2], Order{0, 1, 8, 9, 4, 5, 12, 13});
      r[i + 2 * k + 1] = __builtin_shuffle(s[i + k], s[i + k + 2], Order{2, 3, 10, 11, 6, 7, 14, 15});
    }
  }
  for (int64_t i = 0; i < 4; ++i) {
    s[i] = __builtin_shuffle(r[i], r[i + 4], Order{0, 1, 2, 3, 8, 9, 10, 11});
    s[i + 4] = __builtin_shuffle(r[i], r[i + 4], Order{4, 5, 6, 7, 12, 13, 14, 15});
  }
  for (int64_t i = 0; i < 8; ++i) std::memcpy(out + i * out_stride, &s[i], sizeof s[i]);
}

template <typename Source>
inline __attribute__((always_inline)) void transpose_square(const Source* source, int64_t stride, double* out, int64_t out_stride) {
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t t = 0; t < 4; ++t) out[i * out_stride + t] = static_cast<double>(source[t * stride + i]);
}
#else
using Floats = float;
using Doubles = double;

template <typename Compute>
inline void sums_of_lanes(const Compute* v, Compute* out) {
  std::copy(v, v + kEntries, out);
}

template <typename Source, typename Compute>
inline void transpose_square(const Source* source, int64_t, Compute* out, int64_t) {
  *out = static_cast<Compute>(*source);
}
#endif

template <typename Compute>
using Lanes = std::conditional_t<std::is_same_v<Compute, double>, Doubles, Floats>;

// out[i][t] = source[t][i], converted, for i < columns and t < tokens; zeros up to `block`.
template <typename Source, typename Compute>
DEFTX_WIDE_CLONES void pack(const Source* source, int64_t stride, int64_t tokens, int64_t columns, int64_t block, Compute* out) {
  constexpr int64_t kSide = sizeof(Lanes<Compute>) / sizeof(Compute);
  const int64_t whole_tokens = tokens / kSide * kSide, whole_columns = columns / kSide * kSide;
  for (int64_t t = 0; t < whole_tokens; t += kSide) {
    for (int64_t i = 0; i < whole_columns; i += kSide)
      transpose_square(source + t * stride + i, stride, out + i * block + t, block);
  }
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t t = i < whole_columns ? whole_tokens : 0; t < tokens; ++t)
      out[i * block + t] = static_cast<Compute>(source[t * stride + i]);
    std::fill(out + i * block + tokens, out + (i + 1) * block, Compute(0));
  }
}

// sums[j] (+)= gradient . packed[column[j]] over the tokens of a block, for the entries of one row.
template <typename Compute, typename Column>
DEFTX_WIDE_CLONES void add_products(const Compute* gradient, const Compute* packed, int64_t block, const Column* column,
                                    int64_t count, bool first, Compute* sums) {
  using Vector = Lanes<Compute>;
  constexpr int64_t kLanes = sizeof(Vector) / sizeof(Compute);
  for (int64_t j = 0; j < count; j += kEntries) {
    const Compute* x[kEntries];
    for (int64_t i = 0; i < kEntries; ++i) x[i] = packed + column[std::min(j + i, count - 1)] * block;
    Vector products[kEntries] = {};
    for (int64_t t = 0; t < block; t += kLanes) {
      Vector g;
      std::memcpy(&g, gradient + t, sizeof g);
      for (int64_t i = 0; i < kEntries; ++i) {
        Vector v;
        std::memcpy(&v, x[i] + t, sizeof v);
        products[i] += g * v;
      }
    }
    Compute done[kEntries];
    sums_of_lanes(products, done);
    const int64_t end = std::min(kEntries, count - j);
    if (first)
      for (int64_t i = 0; i < end; ++i) sums[j + i] = done[i];
    else
      for (int64_t i = 0; i < end; ++i) sums[j + i] += done[i];
  }
}

struct Problem {
  Tensor grad_output, input;  // [N, m], [N, n]
  Csr csr;                    // of [m, n]
  int64_t tokens, rows, columns;
};

// One dot product for each entry; sums: Compute [nnz].
template <typename Compute, typename Column>
void by_entries(const Problem& p, Compute* sums) {
  constexpr int64_t kGranule = 32 / sizeof(Compute);
  const int64_t token_bytes = p.columns * sizeof(Compute);
  int64_t block = std::max<int64_t>(kBlockBytes / token_bytes / 64 * 64, 64);
  block = std::min(std::min<int64_t>(block, 256), (p.tokens + kGranule - 1) / kGranule * kGranule);
  // Packed at a time: one block stays in a cache, but then all threads wait for one another after every block.
  const int64_t blocks =
      std::clamp<int64_t>(torch::stable::get_num_threads() / 2, 1, std::min<int64_t>(8, (p.tokens + block - 1) / block));
  const std::unique_ptr<Compute[]> packed(new Compute[blocks * block * p.columns]);  // a vector would write zeros first
  const auto* column = static_cast<const Column*>(p.csr.col);
  // Rows are shared out by their work: their entries, and the packing of their gradient.
  const auto work_before = [&](int64_t row) { return p.csr.crow[row] + 4 * row; };
  const auto row_at = [&](int64_t work) {
    int64_t low = 0, high = p.rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (work_before(middle) < work)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  for (int64_t start = 0; start < p.tokens; start += blocks * block) {
    const int64_t stop = std::min(start + blocks * block, p.tokens);
    torch::stable::parallel_for(0, (p.columns + kColumns - 1) / kColumns,
                                std::max<int64_t>(kGrain / (kColumns * (stop - start)), 1), [&](int64_t begin, int64_t end) {
                                  with_dtype(dtype_of(p.input), "input", [&](auto zero) {
                                    using Source = decltype(zero);
                                    const auto* source = static_cast<const Source*>(p.input.const_data_ptr());
                                    for (int64_t first = start; first < stop; first += block) {
                                      Compute* out = packed.get() + (first - start) * p.columns;
                                      for (int64_t c = kColumns * begin; c < std::min(kColumns * end, p.columns); c += kColumns)
                                        pack(source + first * p.columns + c, p.columns, std::min(block, stop - first),
                                             std::min(kColumns, p.columns - c), block, out + c * block);
                                    }
                                  });
                                });
    torch::stable::parallel_for(
        0, work_before(p.rows), std::max<int64_t>(kGrain / (stop - start), 16), [&](int64_t begin, int64_t end) {
          const int64_t first_row = row_at(begin), last_row = row_at(end);
          const std::unique_ptr<Compute[]> gradient(new Compute[kRows * block]);
          with_dtype(dtype_of(p.grad_output), "grad_output", [&](auto zero) {
            using Source = decltype(zero);
            const auto* source = static_cast<const Source*>(p.grad_output.const_data_ptr());
            for (int64_t first = start; first < stop; first += block) {
              const Compute* x = packed.get() + (first - start) * p.columns;
              for (int64_t row = first_row; row < last_row; row += kRows) {
                const int64_t rows = std::min(kRows, last_row - row);
                if (p.csr.crow[row + rows] == p.csr.crow[row]) continue;
                pack(source + first * p.rows + row, p.rows, std::min(block, stop - first), rows, block, gradient.get());
                for (int64_t r = 0; r < rows; ++r) {
                  const int64_t entry = p.csr.crow[row + r];
                  add_products(gradient.get() + r * block, x, block, column + entry, p.csr.crow[row + r + 1] - entry, first == 0,
                               sums + entry);
                }
              }
            }
          });
        });
  }
}

// The matrix product of a stretch of rows at a time; sums: Compute [nnz].
template <typename Compute, typename Column>
void by_rows(const Problem& p, Compute* sums) {
  constexpr auto kDtype =
      std::is_same_v<Compute, double> ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;
  const Tensor input = torch::stable::to(p.input, kDtype);
  const auto* column = static_cast<const Column*>(p.csr.col);
  const int64_t stretch = std::max<int64_t>(kDenseBytes / (p.columns * sizeof(Compute)) / 16 * 16, 16);
  for (int64_t start = 0; start < p.rows; start += stretch) {
    const int64_t rows = std::min(stretch, p.rows - start);
    Tensor part = p.grad_output;
    part = torch::stable::to(torch::stable::narrow(part, 1, start, rows), kDtype);
    const Tensor product = torch::stable::matmul(torch::stable::transpose(part, 0, 1), input);  // [rows, n]
    const auto* dense = static_cast<const Compute*>(product.const_data_ptr());
    const int64_t* crow = p.csr.crow + start;
    torch::stable::parallel_for(0, rows, std::max<int64_t>(kGrain / p.columns, 1), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t e = crow[r]; e < crow[r + 1]; ++e) sums[e] = dense[r * p.columns + column[e]];
    });
  }
}

template <typename Compute, typename Column>
void compute(const Problem& p, void* sums) {
  check_contents<Column>(p.csr);
  const bool dense = static_cast<double>(p.csr.nnz) > kDense * static_cast<double>(p.rows) * static_cast<double>(p.columns);
  (dense ? by_rows<Compute, Column> : by_entries<Compute, Column>)(p, static_cast<Compute*>(sums));
}

Tensor masked_linear_grad(Tensor grad_output,   // [N, m]
                          Tensor input,         // [N, n]
                          Tensor crow_indices,  // int64 [m + 1]
                          Tensor col_indices,   // uint16 or int32 [nnz]
                          torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  Problem p{grad_output, input, check_mask(crow_indices, col_indices, Device::kCpu), 0, 0, 0};
  for (const auto& [t, name] : {std::pair{&grad_output, "grad_output"}, std::pair{&input, "input"}}) {
    check_tensor(*t, Device::kCpu, name);
    DEFTX_CHECK(t->dim() == 2, name, " must be a matrix [tokens, features]");
    with_dtype(dtype_of(*t), name, [](auto) {});
  }
  p.tokens = grad_output.size(0), p.rows = grad_output.size(1), p.columns = input.size(1);
  DEFTX_CHECK(input.size(0) == p.tokens, "grad_output has ", p.tokens, " tokens and input ", input.size(0));
  DEFTX_CHECK(p.csr.rows == p.rows, "crow_indices has ", p.csr.rows + 1, " elements; grad_output has ", p.rows,
              " features, which need ", p.rows + 1);
  p.csr.slices.push_back({nullptr, 0, p.columns});
  const bool wide = dtype == ScalarType::Double;
  const bool narrow = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  DEFTX_CHECK(wide || narrow || dtype == ScalarType::Float, "dtype must be float32, float64, bfloat16 or float16");
  if (p.csr.nnz == 0 || p.tokens == 0) return torch::stable::new_zeros(grad_output, {p.csr.nnz}, dtype);
  Tensor sums = torch::stable::new_empty(grad_output, {p.csr.nnz}, narrow ? ScalarType::Float : dtype);
  void* out = sums.mutable_data_ptr();
  if (wide)
    p.csr.wide ? compute<double, int32_t>(p, out) : compute<double, uint16_t>(p, out);
  else
    p.csr.wide ? compute<float, int32_t>(p, out) : compute<float, uint16_t>(p, out);
  return narrow ? torch::stable::to(sums, dtype) : sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deftx, CPU, m) { m.impl("masked_linear_grad", TORCH_BOX(&masked_linear_grad)); }

}  // namespace deftx
