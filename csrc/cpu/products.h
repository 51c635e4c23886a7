// Dot products of many pairs of columns, for masked_linear_grad.cpp: matrices [tokens, columns] are packed by columns,
// so that a column is contiguous, and multiplied column by column. Packed is float or double, and what the products are
// summed in. (Columns kept in bfloat16, with AVX-512's products of bfloat16 pairs, took longer than this on a Sapphire
// Rapids Xeon.)
#pragma once

#include <cstring>
#include <type_traits>

#include "rows.h"

namespace deftx {

constexpr int64_t kColumnsAtOnce = 8;  // that one column is multiplied by

// The length of a packed column is a multiple of this, a cache line.
template <typename Packed>
constexpr int64_t kPackedTokens = 64 / sizeof(Packed);

// ---- vectors of 32 bytes ----

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#define DEFTX_INLINE inline __attribute__((always_inline))  // into each clone of the caller

typedef float Floats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(32)));
typedef int32_t Order32 __attribute__((vector_size(32)));
typedef int64_t Order64 __attribute__((vector_size(32)));

// The sums of the lanes of kColumnsAtOnce vectors, in their order.
DEFTX_INLINE void sums_of_lanes(const Floats* v, float* out) {
  constexpr Order32 even = {0, 2, 8, 10, 4, 6, 12, 14}, odd = {1, 3, 9, 11, 5, 7, 13, 15};
  constexpr Order32 low = {0, 1, 2, 3, 8, 9, 10, 11}, high = {4, 5, 6, 7, 12, 13, 14, 15};
  Floats pairs[4], quads[2];
  for (int i = 0; i < 4; ++i)
    pairs[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even) + __builtin_shuffle(v[2 * i], v[2 * i + 1], odd);
  for (int i = 0; i < 2; ++i)
    quads[i] = __builtin_shuffle(pairs[2 * i], pairs[2 * i + 1], even) +
               __builtin_shuffle(pairs[2 * i], pairs[2 * i + 1], odd);
  const Floats sums = __builtin_shuffle(quads[0], quads[1], low) + __builtin_shuffle(quads[0], quads[1], high);
  std::memcpy(out, &sums, sizeof sums);
}

DEFTX_INLINE void sums_of_lanes(const Doubles* v, double* out) {
  constexpr Order64 even = {0, 4, 2, 6}, odd = {1, 5, 3, 7}, low = {0, 1, 4, 5}, high = {2, 3, 6, 7};
  for (int i = 0; i < kColumnsAtOnce; i += 4) {
    const Doubles a = __builtin_shuffle(v[i], v[i + 1], even) + __builtin_shuffle(v[i], v[i + 1], odd);
    const Doubles b = __builtin_shuffle(v[i + 2], v[i + 3], even) + __builtin_shuffle(v[i + 2], v[i + 3], odd);
    const Doubles sums = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    std::memcpy(out + i, &sums, sizeof sums);
  }
}

// Eight numbers of a row.
template <typename Source>
DEFTX_INLINE Floats eight_of_row(const Source* row) {
  Floats v;
  if constexpr (std::is_same_v<Source, float>) {
    std::memcpy(&v, row, sizeof v);
  } else if constexpr (std::is_same_v<Source, BFloat16>) {
    typedef uint16_t Bits __attribute__((vector_size(16)));
    typedef uint32_t Wide __attribute__((vector_size(32)));
    Bits bits;
    std::memcpy(&bits, row, sizeof bits);
    v = (Floats)(__builtin_convertvector(bits, Wide) << 16);
  } else {
    for (int i = 0; i < 8; ++i) v[i] = static_cast<float>(row[i]);
  }
  return v;
}

// out[i][t] = source[t][i] of 8 columns of 8 tokens.
template <typename Source, typename Packed>
DEFTX_INLINE void pack_tile(const Source* source, int64_t stride, Packed* out, int64_t length) {
  if constexpr (std::is_same_v<Packed, double>) {
    for (int i = 0; i < 8; ++i)
      for (int t = 0; t < 8; ++t) out[i * length + t] = static_cast<double>(source[t * stride + i]);
  } else {
    Floats r[8], s[8];
    for (int i = 0; i < 8; ++i) r[i] = eight_of_row(source + i * stride);
    for (int i = 0; i < 8; i += 2) {
      s[i] = __builtin_shuffle(r[i], r[i + 1], Order32{0, 8, 1, 9, 4, 12, 5, 13});
      s[i + 1] = __builtin_shuffle(r[i], r[i + 1], Order32{2, 10, 3, 11, 6, 14, 7, 15});
    }
    for (int i = 0; i < 8; i += 4) {
      for (int k = 0; k < 2; ++k) {
        r[i + 2 * k] = __builtin_shuffle(s[i + k], s[i + k + 2], Order32{0, 1, 8, 9, 4, 5, 12, 13});
        r[i + 2 * k + 1] = __builtin_shuffle(s[i + k], s[i + k + 2], Order32{2, 3, 10, 11, 6, 7, 14, 15});
      }
    }
    for (int i = 0; i < 4; ++i) {
      s[i] = __builtin_shuffle(r[i], r[i + 4], Order32{0, 1, 2, 3, 8, 9, 10, 11});
      s[i + 4] = __builtin_shuffle(r[i], r[i + 4], Order32{4, 5, 6, 7, 12, 13, 14, 15});
    }
    for (int i = 0; i < 8; ++i) std::memcpy(out + i * length, &s[i], sizeof s[i]);
  }
}
#else
#define DEFTX_INLINE inline
using Floats = float;
using Doubles = double;

template <typename Sum>
inline void sums_of_lanes(const Sum* v, Sum* out) {
  std::copy(v, v + kColumnsAtOnce, out);
}

template <typename Source, typename Packed>
inline void pack_tile(const Source* source, int64_t stride, Packed* out, int64_t length) {
  for (int i = 0; i < 8; ++i)
    for (int t = 0; t < 8; ++t) out[i * length + t] = static_cast<Packed>(source[t * stride + i]);
}
#endif

// ---- packing and multiplying ----

// out[i][t] = source[t][i], converted, for i < columns and t < tokens; zeros up to `length`.
template <typename Source, typename Packed>
DEFTX_WIDE_CLONES void pack_columns(const Source* source, int64_t stride, int64_t tokens, int64_t columns,
                                    int64_t length, Packed* out) {
  const int64_t whole_tokens = tokens / 8 * 8, whole_columns = columns / 8 * 8;
  for (int64_t t = 0; t < whole_tokens; t += 8)
    for (int64_t i = 0; i < whole_columns; i += 8)
      pack_tile(source + t * stride + i, stride, out + i * length + t, length);
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t t = i < whole_columns ? whole_tokens : 0; t < tokens; ++t)
      out[i * length + t] = static_cast<Packed>(source[t * stride + i]);
    std::fill(out + i * length + tokens, out + (i + 1) * length, Packed(0));
  }
}

// products[i] = one . others[i] over `length` tokens.
template <typename Packed>
DEFTX_WIDE_CLONES void multiply_columns(const Packed* one, const Packed* const* others, int64_t length,
                                        Packed* products) {
  using Vector = std::conditional_t<std::is_same_v<Packed, double>, Doubles, Floats>;
  constexpr int64_t kLanes = sizeof(Vector) / sizeof(Packed);
  Vector sums[kColumnsAtOnce] = {};
  for (int64_t t = 0; t < length; t += kLanes) {
    Vector a, b;
    std::memcpy(&a, one + t, sizeof a);
    for (int i = 0; i < kColumnsAtOnce; ++i) {
      std::memcpy(&b, others[i] + t, sizeof b);
      sums[i] += a * b;
    }
  }
  sums_of_lanes(sums, products);
}

// sums[j] (+)= one . packed[column[j]], for the `count` entries of a row.
template <typename Packed, typename Column>
void add_products(const Packed* one, const Packed* packed, int64_t length, const Column* column, int64_t count,
                  bool first, Packed* sums) {
  for (int64_t j = 0; j < count; j += kColumnsAtOnce) {
    const Packed* others[kColumnsAtOnce];
    for (int64_t i = 0; i < kColumnsAtOnce; ++i) others[i] = packed + column[std::min(j + i, count - 1)] * length;
    Packed products[kColumnsAtOnce];
    multiply_columns(one, others, length, products);
    const int64_t end = std::min(kColumnsAtOnce, count - j);
    for (int64_t i = 0; i < end; ++i) sums[j + i] = first ? products[i] : sums[j + i] + products[i];
  }
}

}  // namespace deftx
