// Scores as keys: the bits of |a| or |a - b| as an integer, which has the order of the magnitudes.
//
// Key uint16_t: bfloat16 or float16 tensors without a base. uint32_t: everything without a float64, in float32.
// uint64_t: the rest, in float64. The tensors' own dtypes are looked up at run time, the same for a whole warp, so that
// mixed dtypes need no copies.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "bitmask.cuh"

namespace deftx {
namespace {

enum Type : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64, kAnyType };

template <typename Key>
struct KeyOf;
template <>
struct KeyOf<uint16_t> {
  using Word = uint32_t;  // what is computed with
  static constexpr int kBits = 15,
                       kGroups = 4;  // bits of a finite or infinite magnitude; eights that a thread loads at once
  static constexpr int kBytes = 16, kRounds = 2;  // of eight elements; rounds of eleven bits that bracket the threshold
};
template <>
struct KeyOf<uint32_t> {
  using Word = uint32_t;
  static constexpr int kBits = 31, kGroups = 2, kBytes = 32, kRounds = 3;
};
template <>
struct KeyOf<uint64_t> {
  using Word = uint64_t;
  static constexpr int kBits = 63, kGroups = 1, kBytes = 64, kRounds = 4;
};

template <typename Key>
using WordOf = typename KeyOf<Key>::Word;

__device__ inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
__host__ __device__ inline int size_of(int32_t type) { return type == kFloat64 ? 8 : type == kFloat32 ? 4 : 2; }

// The bytes of eight elements, of which the first is aligned like 16 bytes.
template <typename Key>
__device__ void load_whole(uint32_t (&raw)[KeyOf<Key>::kBytes / 4], const char* p, int size) {
  constexpr int kBytes = KeyOf<Key>::kBytes;
  uint4* vectors = reinterpret_cast<uint4*>(raw);
  const uint4* from = reinterpret_cast<const uint4*>(p);
  vectors[0] = __ldcs(from);
  if constexpr (kBytes >= 32) {
    if (size >= 4) vectors[1] = __ldcs(from + 1);
  }
  if constexpr (kBytes >= 64) {
    if (size >= 8) {
      vectors[2] = __ldcs(from + 2);
      vectors[3] = __ldcs(from + 3);
    }
  }
}

// The bytes of the first `valid` of eight elements, and zeros.
template <typename Key>
__device__ void load_part(uint32_t (&raw)[KeyOf<Key>::kBytes / 4], const char* p, int size, int valid) {
  constexpr int kBytes = KeyOf<Key>::kBytes;
#pragma unroll
  for (int i = 0; i < kBytes / 4; ++i) raw[i] = 0;
  if (size == 2) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j < valid) raw[j / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(p)[j]) << (j % 2 * 16);
    }
  }
  if constexpr (kBytes >= 32) {
    if (size == 4) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j < valid) raw[j] = reinterpret_cast<const uint32_t*>(p)[j];
      }
    }
  }
  if constexpr (kBytes >= 64) {
    if (size == 8) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j < valid) {
          const uint64_t x = reinterpret_cast<const uint64_t*>(p)[j];
          raw[2 * j] = static_cast<uint32_t>(x), raw[2 * j + 1] = static_cast<uint32_t>(x >> 32);
        }
      }
    }
  }
}

// The bytes of up to eight elements from `at` on, a multiple of eight, and zeros. kWhole: there are eight, of an
// aligned tensor.
template <typename Key, bool kWhole>
__device__ void load_raw(uint32_t (&raw)[KeyOf<Key>::kBytes / 4], const void* data, int64_t at, int size, int valid) {
  const char* p = static_cast<const char*>(data) + at * size;
  if constexpr (kWhole) {
    load_whole<Key>(raw, p, size);
  } else {
    valid == 8 && is_aligned(data) ? load_whole<Key>(raw, p, size) : load_part<Key>(raw, p, size, valid);
  }
}

__device__ inline uint32_t half_of(const uint32_t* raw, int j) { return (raw[j / 2] >> (j % 2 * 16)) & 0xFFFFu; }
__device__ inline float half_to_float(uint32_t x) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(x)));
}

template <typename Real>
__device__ void widen(Real (&out)[8], const uint32_t* raw, int32_t type) {
  if (type == kBFloat16) {
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = __uint_as_float(half_of(raw, j) << 16);
  } else if (type == kFloat16) {
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = half_to_float(half_of(raw, j));
  } else if (type == kFloat32 || sizeof(Real) == 4) {
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = __uint_as_float(raw[j]);
  } else if constexpr (sizeof(Real) == 8) {
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = __hiloint2double(raw[2 * j + 1], raw[2 * j]);
  }
}

__device__ inline uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7FFFFFFFu; }
__device__ inline uint64_t magnitude(double x) {
  return static_cast<uint64_t>(__double_as_longlong(x)) & 0x7FFFFFFFFFFFFFFFull;
}
__device__ inline float minus(float a, float b) { return __fsub_rn(a, b); }
__device__ inline double minus(double a, double b) { return __dsub_rn(a, b); }

// How many of the eight elements from `at` on there are, and a bit for each.
__device__ inline int valid_of(const Item& item, int64_t at) {
  return static_cast<int>(min(max(item.numel - at, int64_t{0}), int64_t{8}));
}
__device__ inline uint32_t valid_bits(const Item& item, int64_t at) { return (1u << valid_of(item, at)) - 1; }

// The bytes of eights that begin at `at`, at + 256, ... All loads come before the first use.
template <typename Key, bool kBase, bool kWhole, int kEights>
struct RawEights {
  static constexpr int kWords = KeyOf<Key>::kBytes / 4;
  alignas(16) uint32_t a[kEights][kWords];
  alignas(16) uint32_t b[kBase ? kEights : 1][kWords];

  __device__ RawEights(const Item& item, int64_t at) {
#pragma unroll
    for (int g = 0; g < kEights; ++g) {
      const int64_t from = at + g * 256;
      const int valid = kWhole ? 8 : valid_of(item, from);
      load_raw<Key, kWhole>(a[g], item.a, from, size_of(item.a_type), valid);
      if constexpr (kBase) load_raw<Key, kWhole>(b[g], item.b, from, size_of(item.b_type), valid);
    }
  }

  template <typename Real>
  __device__ void scores(int g, Real (&x)[8], const Item& item) const {
    widen(x, a[g], item.a_type);
    if constexpr (kBase) {
      Real y[8];
      widen(y, b[g], item.b_type);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] = minus(x[j], y[j]);
    }
  }
};

template <typename Key, bool kBase, bool kWhole = false, int kEights = KeyOf<Key>::kGroups>
__device__ void load_keys(WordOf<Key> (&keys)[kEights][8], const Item& item, int64_t at) {
  const RawEights<Key, kBase, kWhole, kEights> raw(item, at);
#pragma unroll
  for (int g = 0; g < kEights; ++g) {
    if constexpr (sizeof(Key) == 2) {
#pragma unroll
      for (int j = 0; j < 8; ++j) keys[g][j] = half_of(raw.a[g], j) & 0x7FFFu;
    } else {
      std::conditional_t<sizeof(Key) == 8, double, float> x[8];
      raw.scores(g, x, item);
#pragma unroll
      for (int j = 0; j < 8; ++j) keys[g][j] = magnitude(x[j]);
    }
  }
}

template <typename Real>
__device__ Real load_real(const void* data, int32_t type, int64_t at) {
  switch (type) {
    case kBFloat16:
      return __uint_as_float(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[at]) << 16);
    case kFloat16:
      return half_to_float(static_cast<const uint16_t*>(data)[at]);
    case kFloat64:
      return static_cast<Real>(static_cast<const double*>(data)[at]);
    default:
      return static_cast<const float*>(data)[at];
  }
}

template <typename Key, bool kBase>
__device__ WordOf<Key> load_key(const Item& item, int64_t at) {
  if constexpr (sizeof(Key) == 2) {
    return static_cast<const uint16_t*>(item.a)[at] & 0x7FFFu;
  } else {
    using Real = std::conditional_t<sizeof(Key) == 8, double, float>;
    Real x = load_real<Real>(item.a, item.a_type, at);
    if constexpr (kBase) x = minus(x, load_real<Real>(item.b, item.b_type, at));
    return magnitude(x);
  }
}

// ---- on the host ----

Type type_of(const Tensor& t, const char* op) {
  const int32_t dtype = dtype_of(t);
  if (dtype == aoti_torch_dtype_float32()) return kFloat32;
  if (dtype == aoti_torch_dtype_bfloat16()) return kBFloat16;
  if (dtype == aoti_torch_dtype_float16()) return kFloat16;
  DEFTX_CHECK(dtype == aoti_torch_dtype_float64(), op, ": tensors must be float32, float64, bfloat16 or float16");
  return kFloat64;
}

// Calls run(Key{}, std::bool_constant<base>{}).
template <typename Run>
auto with_key(int key_bytes, bool base, Run run) {
  if (key_bytes == 2) return run(uint16_t{}, std::false_type{});
  if (key_bytes == 4) return base ? run(uint32_t{}, std::true_type{}) : run(uint32_t{}, std::false_type{});
  return base ? run(uint64_t{}, std::true_type{}) : run(uint64_t{}, std::false_type{});
}

}  // namespace
}  // namespace deftx
