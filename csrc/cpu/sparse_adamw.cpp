// sparse_adamw_ on the CPU: one AdamW step at the entries of a mask.
//
// The entries are cut into pieces of equal length, one per thread, whatever rows or tensors they fall into, and a piece
// into blocks. Reads of scattered cache lines bound the time, so they must not wait for arithmetic: the step of a block
// prefetches, between its vectors, the lines of the next one. (A phase that gathers a block, then one that computes,
// took 1.15 times as long: 50 M float32 at 5 %, two cores of a Sapphire Rapids Xeon.) Without col_indices every entry
// is stepped: blocks are stretches of the tensors, which the hardware prefetches.
#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>

#include "rows.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace deftx {
namespace {

constexpr int64_t kBlock = 256;  // entries
constexpr int64_t kWord = 32;    // entries of a word of `changed`

#if defined(__GNUC__)
#define DEFTX_INLINE inline __attribute__((always_inline))  // into each clone of the caller
#pragma GCC diagnostic ignored "-Wpsabi"  // about vectors as results of functions that are always inlined
template <typename Compute>
struct LanesOf {
  typedef Compute type __attribute__((vector_size(32)));
};
template <typename Compute>
using Lanes = typename LanesOf<Compute>::type;
template <typename Element, int64_t lanes>
struct VectorOf {
  typedef Element type __attribute__((vector_size(lanes * sizeof(Element))));
};

DEFTX_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 1); }  // into L2
#else
#define DEFTX_INLINE inline
template <typename Compute>
using Lanes = Compute;
template <typename Element, int64_t lanes>
struct VectorOf;

inline void prefetch(const void*) {}
#endif

template <typename T>
using UnsignedOf = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
// Of a number, or of each in a vector.
template <typename Vector, typename Compute>
using UnsignedLanes =
    std::conditional_t<std::is_same_v<Vector, Compute>, UnsignedOf<Compute>, Lanes<UnsignedOf<Compute>>>;
template <typename Element>
struct VectorOf<Element, 1> {
  typedef Element type;
};
// The bits of as many elements of type T as there are numbers in a vector.
template <typename T, typename Vector, typename Compute>
using StoredBits = typename VectorOf<UnsignedOf<T>, int64_t{sizeof(Vector) / sizeof(Compute)}>::type;

// ---- 16-bit numbers ----

template <typename From, typename To>
DEFTX_CLONES void convert(const void* in, void* out, int64_t n) {
  const From* __restrict__ from = static_cast<const From*>(in);
  To* __restrict__ to = static_cast<To*>(out);
  for (int64_t k = 0; k < n; ++k) to[k] = static_cast<To>(from[k]);
}

// Philox4x32-10 (Salmon et al. 2011) with the key `seed` and the counter (entry, step): the first three words, for n
// entries.
DEFTX_CLONES void philox(uint64_t seed, uint64_t step, uint64_t first, int64_t n, uint32_t* __restrict__ words0,
                         uint32_t* __restrict__ words1, uint32_t* __restrict__ words2) {
  for (int64_t k = 0; k < n; ++k) {
    const uint64_t entry = first + static_cast<uint64_t>(k);
    uint32_t c0 = static_cast<uint32_t>(entry), c1 = static_cast<uint32_t>(entry >> 32);
    uint32_t c2 = static_cast<uint32_t>(step), c3 = static_cast<uint32_t>(step >> 32);
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
      c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
      c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
      c1 = static_cast<uint32_t>(product1);
      c3 = static_cast<uint32_t>(product0);
      key0 += 0x9E3779B9;
      key1 += 0xBB67AE85;
    }
    words0[k] = c0;
    words1[k] = c1;
    words2[k] = c2;
  }
}

// ---- the step of a block ----

// The scalars of a step, computed in float64: in float32, 1 - beta^step would lose most digits at the first steps.
template <typename Compute>
struct Scalars {
  Compute beta1, rest1, beta2, rest2, root_bias2, step_size, eps, decay, l1;
  Compute scale;  // what gradients are divided by; negative to maximize
};

// Where a block's entries are, and those of the next block, which are only prefetched.
template <typename Compute>
struct Pointers {
  char* params;                            // the tensor
  const char* grads;                       // its dense gradient; null with a compact one
  const int64_t* offsets;                  // [n] of the entries in both, in elements
  const char *next_params, *next_grads;    // the tensor of the next block
  const int64_t* next_offsets;             // [n]
  Compute *values, *exp_avg, *exp_avg_sq;  // [n] values: may be null
  const Compute *grad, *decay_to;          // [n] may be null
  const Compute* weights;                  // [n] where all entries follow one another
  const uint32_t* words;                   // [n] to round parameters stochastically, or null
  uint32_t* changed;                       // [n / kWord] gets a bit where those of the tensor change; or null
};

template <typename Vector>
DEFTX_INLINE Vector root(const Vector& x) {
  if constexpr (std::is_floating_point_v<Vector>) {
    return std::sqrt(x);
  } else {
    Vector result = x;
    for (size_t q = 0; q < sizeof(Vector) / sizeof(x[0]); ++q) result[q] = std::sqrt(x[q]);  // one instruction
    return result;
  }
}

template <typename Vector, typename Element>
DEFTX_INLINE Vector load(const Element* in) {
  Vector result;
  std::memcpy(&result, in, sizeof result);
  return result;
}

// The elements at some offsets. Written as one expression, so that it is made in registers: a vector that is read back
// from elements stored one by one would wait for all of them to reach the cache.
template <typename Vector, typename T, typename Compute>
DEFTX_INLINE Vector gather(const char* data, const int64_t* offsets) {
  const T* in = reinterpret_cast<const T*>(data);
  const auto at = [&](int64_t q) { return static_cast<Compute>(in[offsets[q]]); };
  if constexpr (sizeof(Vector) == sizeof(Compute))
    return at(0);
  else if constexpr (sizeof(Vector) == 4 * sizeof(Compute))
    return Vector{at(0), at(1), at(2), at(3)};
  else
    return Vector{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)};
}

// Steps the weights w with the gradients g, of one vector's entries from the k-th on, and their moments.
template <typename Vector, typename Compute>
DEFTX_INLINE void update(Vector& w, Vector& g, const Pointers<Compute>& p, const Scalars<Compute>& s, int64_t k) {
  if (s.scale != 1) g /= s.scale;
  if (s.l1 != 0 || s.decay != 0) {
    const Vector distance = p.decay_to ? w - load<Vector>(p.decay_to + k) : w;
    const Vector none{}, size = none + s.l1;
    g += distance > 0 ? size : distance < 0 ? -size : none;
    if (s.decay != 0) w -= s.decay * distance;
  }
  const Vector m = s.beta1 * load<Vector>(p.exp_avg + k) + s.rest1 * g;
  const Vector v = s.beta2 * load<Vector>(p.exp_avg_sq + k) + s.rest2 * g * g;
  w -= s.step_size * (m / (root(v) / s.root_bias2 + s.eps));
  std::memcpy(p.exp_avg + k, &m, sizeof m);
  std::memcpy(p.exp_avg_sq + k, &v, sizeof v);
}

// Bit q: whether element q of a vector, or a number, is not 0; the elements of vectors are 0 or -1.
DEFTX_INLINE uint32_t truth_bits(bool truth) { return truth; }
#if defined(__GNUC__)
template <typename Vector>
DEFTX_INLINE uint32_t truth_bits(const Vector& truth) {
  constexpr size_t kSize = sizeof(truth[0]);
#if defined(__SSE2__)
  __m128i parts[sizeof(Vector) / sizeof(__m128i)];
  std::memcpy(parts, &truth, sizeof truth);
  uint32_t result = 0;
  for (size_t i = 0; i < sizeof parts / sizeof parts[0]; ++i) {
    const int part = kSize == 8   ? _mm_movemask_pd(_mm_castsi128_pd(parts[i]))
                     : kSize == 4 ? _mm_movemask_ps(_mm_castsi128_ps(parts[i]))
                                  : _mm_movemask_epi8(_mm_packs_epi16(parts[i], _mm_setzero_si128()));
    result |= static_cast<uint32_t>(part) << i * (sizeof(__m128i) / kSize);
  }
  return result;
#else
  uint32_t result = 0;
  for (size_t q = 0; q < sizeof(Vector) / kSize; ++q) result |= uint32_t{truth[q] != 0} << q;
  return result;
#endif
}
template <typename To, typename From>
DEFTX_INLINE std::enable_if_t<!std::is_arithmetic_v<From>, To> narrowed(const From& bits) {
  return __builtin_convertvector(bits, To);
}
#endif
template <typename To, typename From>
DEFTX_INLINE std::enable_if_t<std::is_arithmetic_v<From>, To> narrowed(From bits) {
  return static_cast<To>(bits);
}

// The bits of each weight in the tensor's type T. words: to round to bfloat16 stochastically, to one of the two numbers
// beside it, each as likely as it is near (bfloat16's own numbers, and NaN, stay); or null.
template <typename T, typename Vector, typename Compute>
DEFTX_INLINE UnsignedLanes<Vector, Compute> rounded_bits(const Vector& w, const uint32_t* words) {
  using Bits = UnsignedLanes<Vector, Compute>;
  Bits bits;
  std::memcpy(&bits, &w, sizeof w);
  if constexpr (std::is_same_v<T, Compute>) return bits;
  if constexpr (std::is_same_v<T, BFloat16>) {
    const Bits nan = Bits{} + 0x7fc0, change = words ? load<Bits>(words) & 0xffff : 0x7fff + (bits >> 16 & 1);
    return w != w ? nan : (bits + change) >> 16;
  }
  constexpr int64_t kLanes = sizeof(Vector) / sizeof(Compute);
  Compute lanes[kLanes];
  UnsignedOf<Compute> results[kLanes];
  std::memcpy(lanes, &w, sizeof w);
  for (int64_t q = 0; q < kLanes; ++q) {
    const T rounded = static_cast<T>(lanes[q]);
    UnsignedOf<T> result;
    std::memcpy(&result, &rounded, sizeof(T));
    results[q] = result;
  }
  return load<Bits>(results);
}

void round_stochastically(const float* in, const uint32_t* words, BFloat16* out, int64_t n) {
  for (int64_t k = 0; k < n; ++k)
    out[k] =
        BFloat16(static_cast<uint16_t>(rounded_bits<BFloat16, float, float>(in[k], words + k)), BFloat16::from_bits());
}

// One vector's entries, from the k-th on. T, G: the parameters' and the dense gradients' types.
template <typename Vector, typename T, typename G, typename Compute>
DEFTX_INLINE void step_vector(const Pointers<Compute>& p, const Scalars<Compute>& s, int64_t k) {
  constexpr int64_t kLanes = sizeof(Vector) / sizeof(Compute);
  using Element = UnsignedOf<T>;
  using Stored = StoredBits<T, Vector, Compute>;
  Vector w = p.values ? load<Vector>(p.values + k) : gather<Vector, T, Compute>(p.params, p.offsets + k);
  Stored former{};  // read early, as it may come from L2
  if (p.changed) {
    if (std::is_same_v<T, Compute> && !p.values)
      std::memcpy(&former, &w, sizeof former);
    else
      former = gather<Stored, Element, Element>(p.params, p.offsets + k);
  }
  Vector g = p.grad ? load<Vector>(p.grad + k) : gather<Vector, G, Compute>(p.grads, p.offsets + k);
  for (int64_t q = 0; q < kLanes; ++q) {
    prefetch(p.next_params + p.next_offsets[k + q] * int64_t{sizeof(T)});
    if (p.grads) prefetch(p.next_grads + p.next_offsets[k + q] * int64_t{sizeof(G)});
  }
  update(w, g, p, s, k);
  if (p.values) std::memcpy(p.values + k, &w, sizeof w);
  const auto bits = narrowed<Stored>(rounded_bits<T, Vector, Compute>(w, p.words ? p.words + k : nullptr));
  if (p.changed) p.changed[k / kWord] |= truth_bits(bits != former) << k % kWord;
  Element lanes[kLanes];
  std::memcpy(lanes, &bits, sizeof bits);
  Element* out = reinterpret_cast<Element*>(p.params);
  for (int64_t q = 0; q < kLanes; ++q) out[p.offsets[k + q]] = lanes[q];
}

template <typename T, typename G, typename Compute>
DEFTX_CLONES void step_block(const Pointers<Compute>& pointers, const Scalars<Compute>& scalars, int64_t n) {
  const Pointers<Compute> p = pointers;
  const Scalars<Compute> s = scalars;
  constexpr int64_t kLanes = sizeof(Lanes<Compute>) / sizeof(Compute);
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) step_vector<Lanes<Compute>, T, G>(p, s, k);
  for (; k < n; ++k) step_vector<Compute, T, G>(p, s, k);
}

// ---- the step of a block in which all entries follow one another: from `weights` and `grad` to `values` ----

template <typename Vector, typename Compute>
DEFTX_INLINE void step_full_vector(const Pointers<Compute>& p, const Scalars<Compute>& s, int64_t k) {
  Vector w = load<Vector>(p.weights + k), g = load<Vector>(p.grad + k);
  update(w, g, p, s, k);
  std::memcpy(p.values + k, &w, sizeof w);
}

template <typename Compute>
DEFTX_CLONES void step_full_block(const Pointers<Compute>& pointers, const Scalars<Compute>& scalars, int64_t n) {
  const Pointers<Compute> p = pointers;
  const Scalars<Compute> s = scalars;
  constexpr int64_t kLanes = sizeof(Lanes<Compute>) / sizeof(Compute);
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) step_full_vector<Lanes<Compute>>(p, s, k);
  for (; k < n; ++k) step_full_vector<Compute>(p, s, k);
}

// Bit j: whether elements j of a and b differ, of n <= kWord.
template <typename Bits>
uint32_t differences(const Bits* a, const Bits* b, int64_t n) {
  uint32_t word = 0;
  for (int64_t j = 0; j < n; ++j) word |= uint32_t{a[j] != b[j]} << j;
  return word;
}

#if defined(__SSE2__)
inline __m128i equal(const uint32_t* a, const uint32_t* b) {  // 4 elements
  return _mm_cmpeq_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
}
inline __m128i equal(const uint16_t* a, const uint16_t* b) {  // 8 elements
  return _mm_cmpeq_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
}
inline __m128i equal_bytes(const uint16_t* a, const uint16_t* b) {  // 16 elements
  return _mm_packs_epi16(equal(a, b), equal(a + 8, b + 8));
}
inline __m128i equal_bytes(const uint32_t* a, const uint32_t* b) {
  return _mm_packs_epi16(_mm_packs_epi32(equal(a, b), equal(a + 4, b + 4)),
                         _mm_packs_epi32(equal(a + 8, b + 8), equal(a + 12, b + 12)));
}
template <typename Bits>
uint32_t differences_of_word(const Bits* a, const Bits* b) {
  if constexpr (sizeof(Bits) == 8)
    return differences(a, b, kWord);
  else {
    const auto low = static_cast<uint32_t>(_mm_movemask_epi8(equal_bytes(a, b)));
    const auto high = static_cast<uint32_t>(_mm_movemask_epi8(equal_bytes(a + 16, b + 16)));
    return ~(high << 16 | low);
  }
}
#else
template <typename Bits>
uint32_t differences_of_word(const Bits* a, const Bits* b) {
  return differences(a, b, kWord);
}
#endif

// The bits of the elements that differ, of n <= kBlock. Without a branch for each word: at small learning rates about
// one element in four changes, and wrong predictions would take longer.
template <typename Bits>
void find_differences(const void* one, const void* other, int64_t n, uint32_t* words) {
  const Bits *a = static_cast<const Bits*>(one), *b = static_cast<const Bits*>(other);
  int64_t i = 0;
  for (; i + kWord <= n; i += kWord) words[i / kWord] = differences_of_word(a + i, b + i);
  if (i < n) words[i / kWord] = differences(a + i, b + i, n - i);
}

// ---- the step of a thread ----

// A compact tensor of any dtype, and blocks of it in the type that is computed in.
template <typename Compute>
struct Compact {
  char* data = nullptr;                                           // [nnz]
  int64_t size = 0;                                               // of an element, in bytes
  void (*read)(const void* in, void* out, int64_t n) = nullptr;   // null where the dtype is Compute
  void (*write)(const void* in, void* out, int64_t n) = nullptr;  // rounds to nearest

  // Elements [first, first + n): in place, or converted in the buffer.
  Compute* block(int64_t first, int64_t n, Compute* buffer) const {
    if (!data) return nullptr;
    if (!read) return reinterpret_cast<Compute*>(data) + first;
    read(data + first * size, buffer, n);
    return buffer;
  }
  void put(int64_t first, int64_t n, const Compute* buffer) const {
    if (write) write(buffer, data + first * size, n);
  }
};

// What a step reads and writes.
template <typename Compute>
struct Work {
  Csr params, grads;  // dense; no grads where there is a compact one
  Compact<Compute> exp_avg, exp_avg_sq, values, grad, decay_to;
  Compact<Compute> param, dense_grad;  // of a tensor in `params` and `grads`, without its data
  Scalars<Compute> scalars;
  void (*step_block)(const Pointers<Compute>&, const Scalars<Compute>&, int64_t n);
  uint64_t seed, step;
  bool round_params, round_state;  // stochastically
  uint32_t* changed;               // [ceil(nnz / kWord)] or null
};

// Adds the bits of n <= kBlock entries from `first` on. No other thread has entries of the same words.
inline void add_changes(const uint32_t* changed, int64_t first, int64_t n, uint32_t* all) {
  uint32_t* words = all + first / kWord;
  const int64_t shift = first % kWord, count = (n + kWord - 1) / kWord;
  for (int64_t w = 0; w < count; ++w) words[w] |= changed[w] << shift;
  if (shift == 0) return;
  for (int64_t w = 0; w < count; ++w)
    if (const uint32_t rest = changed[w] >> (kWord - shift)) words[w + 1] |= rest;  // there are such entries
}

// Entries of one tensor.
struct Block {
  int64_t tensor = 0, first = 0, n = 0;
  int64_t offsets[kBlock] = {};  // in the tensor; those from the n-th on are fit for prefetching
};

template <typename Compute>
struct Worker {
  const Work<Compute>& work;
  Compute exp_avg[kBlock], exp_avg_sq[kBlock], grad[kBlock], decay_to[kBlock];
  uint32_t words[3][kBlock];
  Compute param[kBlock], rounded[kBlock];  // in the type that is computed in, and in the tensor's
  uint32_t changed[kBlock / kWord];

  void step(const Block& block, const Block& next) {
    Pointers<Compute> p{};
    p.params = static_cast<char*>(work.params.slices[block.tensor].data);
    p.next_params = static_cast<const char*>(work.params.slices[next.tensor].data);
    if (!work.grad.data) {
      p.grads = static_cast<const char*>(work.grads.slices[block.tensor].data);
      p.next_grads = static_cast<const char*>(work.grads.slices[next.tensor].data);
    }
    p.offsets = block.offsets;
    p.next_offsets = next.offsets;
    p.values = work.values.block(block.first, block.n, nullptr);
    p.grad = work.grad.block(block.first, block.n, grad);
    set_state(p, block.first, block.n);
    p.words = work.round_params ? words[0] : nullptr;
    if (work.changed) {
      std::memset(changed, 0, sizeof changed);
      p.changed = changed;
      prefetch(work.changed + (next.first + next.n) / kWord);
    }
    work.step_block(p, work.scalars, block.n);
    if (work.changed) add_changes(changed, block.first, block.n, work.changed);
    put_state(p, block.first, block.n);
  }

  // Entries [first, first + n), which are the elements of one tensor from `element` on.
  void step_full(int64_t tensor, int64_t element, int64_t first, int64_t n) {
    Compact<Compute> stored = work.param, dense_grad = work.dense_grad;
    stored.data = static_cast<char*>(work.params.slices[tensor].data);
    char* out = stored.data + element * stored.size;
    const bool in_place = !stored.write && !work.changed;  // without a master
    Pointers<Compute> p{};
    p.values = work.values.block(first, n, nullptr);
    p.weights = p.values ? p.values : stored.block(element, n, param);
    if (!p.values) p.values = in_place ? reinterpret_cast<Compute*>(out) : param;
    if (work.grad.data) {
      p.grad = work.grad.block(first, n, grad);
    } else {
      dense_grad.data = static_cast<char*>(work.grads.slices[tensor].data);
      p.grad = dense_grad.block(element, n, grad);
    }
    set_state(p, first, n);
    step_full_block(p, work.scalars, n);
    const auto fresh = reinterpret_cast<const char*>(p.values);
    if (!work.changed) {
      if (fresh != out) write(p.values, out, n);
    } else {
      const void* replacing = stored.write ? static_cast<const void*>(rounded) : fresh;
      if (stored.write) write(p.values, rounded, n);
      stored.size == 2 ? mark<uint16_t>(replacing, out, first, n) : mark<UnsignedOf<Compute>>(replacing, out, first, n);
      std::memcpy(out, replacing, n * stored.size);
    }
    put_state(p, first, n);
  }

  // Writes parameters in their dtype.
  void write(const Compute* weights, void* out, int64_t n) {
    if constexpr (std::is_same_v<Compute, float>)
      if (work.round_params) return round_stochastically(weights, words[0], static_cast<BFloat16*>(out), n);
    if (work.param.write)
      work.param.write(weights, out, n);
    else
      std::memcpy(out, weights, n * sizeof(Compute));
  }

  // Adds the bits of the entries at which two arrays of n <= kBlock elements differ.
  template <typename Bits>
  void mark(const void* one, const void* other, int64_t first, int64_t n) {
    find_differences<Bits>(one, other, n, changed);
    add_changes(changed, first, n, work.changed);
  }

  void set_state(Pointers<Compute>& p, int64_t first, int64_t n) {
    p.exp_avg = work.exp_avg.block(first, n, exp_avg);
    p.exp_avg_sq = work.exp_avg_sq.block(first, n, exp_avg_sq);
    p.decay_to = work.decay_to.block(first, n, decay_to);
    if (work.round_params || work.round_state)
      philox(work.seed, work.step, static_cast<uint64_t>(first), n, words[0], words[1], words[2]);
  }

  void put_state(const Pointers<Compute>& p, int64_t first, int64_t n) {
    put(work.exp_avg, first, n, p.exp_avg, words[1]);
    put(work.exp_avg_sq, first, n, p.exp_avg_sq, words[2]);
  }

  void put(const Compact<Compute>& state, int64_t first, int64_t n, const Compute* block, const uint32_t* words) {
    if constexpr (std::is_same_v<Compute, float>)
      if (work.round_state)
        return round_stochastically(block, words, reinterpret_cast<BFloat16*>(state.data) + first, n);
    state.put(first, n, block);
  }
};

// Calls step(begin, end) for pieces of the entries, in threads. They begin at multiples of kWord.
template <typename Step>
void for_each_piece(int64_t nnz, const Step& step) {
  torch::stable::parallel_for(0, (nnz + kWord - 1) / kWord, kGrain / kWord,
                              [&](int64_t begin, int64_t end) { step(begin * kWord, std::min(end * kWord, nnz)); });
}

template <typename Compute>
void step_full(const Work<Compute>& work) {
  for_each_piece(work.params.nnz, [&](int64_t begin, int64_t end) {
    Worker<Compute> worker{work, {}, {}, {}, {}, {}, {}, {}, {}};
    for_each_run(work.params, begin, end, [&](const Run& run) {
      for (int64_t i = run.begin; i < run.end; i += kBlock)
        worker.step_full(run.tensor, i - run.row_begin, i, std::min(kBlock, run.end - i));
    });
  });
}

template <typename Column, typename Compute>
void step_all(const Work<Compute>& work) {
  check_contents<Column>(work.params);
  const auto* col = static_cast<const Column*>(work.params.col);
  for_each_piece(work.params.nnz, [&](int64_t begin, int64_t end) {
    Worker<Compute> worker{work, {}, {}, {}, {}, {}, {}, {}, {}};
    Block blocks[2], *filling = &blocks[0], *before = &blocks[1];
    filling->first = before->first = begin;
    const auto advance = [&] {
      std::fill(filling->offsets + filling->n, filling->offsets + kBlock, filling->offsets[0]);
      if (before->n) worker.step(*before, *filling);
      std::swap(filling, before);
      filling->first = before->first + before->n;
      filling->n = 0;
    };
    for_each_run(work.params, begin, end, [&](const Run& run) {
      for (int64_t i = run.begin; i < run.end;) {
        if (filling->n == kBlock || (filling->n && filling->tensor != run.tensor)) advance();
        filling->tensor = run.tensor;
        const int64_t n = std::min(kBlock - filling->n, run.end - i);
        for (int64_t k = 0; k < n; ++k) filling->offsets[filling->n + k] = run.offset + col[i + k];
        filling->n += n;
        i += n;
      }
    });
    advance();
    if (before->n) worker.step(*before, *before);
  });
}

// ---- the operator ----

// The value of a tensor of one element.
double number(const Tensor& t, const char* name) {
  check_tensor(t, Device::kCpu, name);
  DEFTX_CHECK(t.numel() == 1, name, " must have one element");
  const void* data = t.const_data_ptr();
  const int32_t dtype = dtype_of(t);
  if (dtype == aoti_torch_dtype_float32()) return *static_cast<const float*>(data);
  if (dtype == aoti_torch_dtype_float64()) return *static_cast<const double*>(data);
  if (dtype == aoti_torch_dtype_int64()) return static_cast<double>(*static_cast<const int64_t*>(data));
  DEFTX_CHECK(dtype == aoti_torch_dtype_int32(), name, " must be float32, float64, int32 or int64");
  return *static_cast<const int32_t*>(data);
}

template <typename Compute>
Compact<Compute> elements_of(int32_t dtype, const char* name) {
  Compact<Compute> result;
  with_dtype(dtype, name, [&](auto zero) {
    using T = decltype(zero);
    result.size = sizeof(T);
    if constexpr (!std::is_same_v<T, Compute>) {
      result.read = convert<T, Compute>;
      result.write = convert<Compute, T>;
    }
  });
  return result;
}

template <typename Compute>
Compact<Compute> compact(const Tensor& t, Access access, const Tensor& crow_indices, int64_t nnz, const char* name) {
  check_compact(t, Device::kCpu, crow_indices, nnz, name);
  Compact<Compute> result = elements_of<Compute>(dtype_of(t), name);
  result.data =
      static_cast<char*>(access == Access::kWrite ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr()));
  return result;
}

// Tensors of which every element is an entry: each is one row, whatever its shape.
Csr check_full(const std::vector<Tensor>& tensors, Access access,
               const Tensor& crow_indices) {  // int64 [tensors + 1]
  check_tensor(crow_indices, Device::kCpu, "crow_indices");
  const auto count = static_cast<int64_t>(tensors.size());
  DEFTX_CHECK(crow_indices.dim() == 1 && dtype_of(crow_indices) == aoti_torch_dtype_int64() &&
                  crow_indices.numel() == count + 1,
              "crow_indices must be int64 [tensors + 1] = [", count + 1, "] without col_indices");
  Csr csr{};
  csr.crow = static_cast<const int64_t*>(crow_indices.const_data_ptr());
  csr.dtype = tensors.empty() ? aoti_torch_dtype_float32() : dtype_of(tensors[0]);
  csr.element_size = static_cast<int64_t>(aoti_torch_dtype_element_size(csr.dtype));
  csr.slices.reserve(tensors.size());
  DEFTX_CHECK(csr.crow[0] == 0, "crow_indices must begin with 0, got ", csr.crow[0]);
  for (const Tensor& t : tensors) {
    check_tensor(t, Device::kCpu, "every tensor");
    DEFTX_CHECK(dtype_of(t) == csr.dtype, "tensor ", csr.rows, " has another dtype than tensor 0");
    void* data = access == Access::kWrite ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
    csr.slices.push_back({data, csr.rows++, t.numel()});
    csr.nnz += t.numel();
    DEFTX_CHECK(csr.crow[csr.rows] == csr.nnz, "crow_indices must have ", csr.nnz, " at ", csr.rows,
                ", the number of elements of the tensors before, got ", csr.crow[csr.rows]);
  }
  return csr;
}

template <typename Compute>
Scalars<Compute> rounded(const Scalars<double>& s) {
  const auto c = [](double x) { return static_cast<Compute>(x); };
  return {c(s.beta1),     c(s.rest1), c(s.beta2), c(s.rest2), c(s.root_bias2),
          c(s.step_size), c(s.eps),   c(s.decay), c(s.l1),    c(s.scale)};
}

void sparse_adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, bool compact_grads,
                   Tensor exp_avg,                     // [nnz]
                   Tensor exp_avg_sq,                  // [nnz]
                   std::optional<Tensor> values,       // [nnz]
                   Tensor crow_indices,                // int64 [rows + 1], or [tensors + 1] without col_indices
                   std::optional<Tensor> col_indices,  // uint16 or int32 [nnz]
                   Tensor step, Tensor lr, double beta1, double beta2, double eps, double weight_decay,
                   std::optional<Tensor> decay_to,  // [nnz]
                   double l1, bool maximize, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                   std::optional<int64_t> seed,
                   std::optional<Tensor> changed) {  // int32 [ceil(nnz / 32)]
  const auto csr_of = [&](const std::vector<Tensor>& tensors, Access access) {
    return col_indices ? check_csr(tensors, access, crow_indices, *col_indices, Device::kCpu)
                       : check_full(tensors, access, crow_indices);
  };
  const Csr csr = csr_of(params, Access::kWrite);
  if (csr.nnz == 0 || (found_inf && number(*found_inf, "found_inf") != 0)) return;
  const double t = number(step, "step"), rate = number(lr, "lr");
  const double scale = (maximize ? -1.0 : 1.0) * (grad_scale ? number(*grad_scale, "grad_scale") : 1.0);
  const double bias1 = 1 - std::pow(beta1, t), bias2 = 1 - std::pow(beta2, t);
  const Scalars<double> scalars{beta1, 1 - beta1,           beta2, 1 - beta2, std::sqrt(bias2), rate / bias1,
                                eps,   rate * weight_decay, l1,    scale};

  const auto step_in = [&](auto zero) {
    using Compute = decltype(zero);
    const int32_t compute = std::is_same_v<Compute, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    Work<Compute> work{};
    work.params = csr;
    work.scalars = rounded<Compute>(scalars);
    work.param = elements_of<Compute>(csr.dtype, "params");
    work.exp_avg = compact<Compute>(exp_avg, Access::kWrite, crow_indices, csr.nnz, "exp_avg");
    work.exp_avg_sq = compact<Compute>(exp_avg_sq, Access::kWrite, crow_indices, csr.nnz, "exp_avg_sq");
    DEFTX_CHECK(dtype_of(exp_avg) == dtype_of(exp_avg_sq), "exp_avg and exp_avg_sq must have the same dtype");
    if (values) {
      DEFTX_CHECK(dtype_of(*values) == compute, "values must be float32, or float64 for float64 params");
      work.values = compact<Compute>(*values, Access::kWrite, crow_indices, csr.nnz, "values");
    }
    std::vector<Tensor> written = params;
    written.insert(written.end(), {exp_avg, exp_avg_sq});
    if (values) written.push_back(*values);
    if (changed) {
      check_compact(*changed, Device::kCpu, crow_indices, (csr.nnz + kWord - 1) / kWord, "changed");
      DEFTX_CHECK(dtype_of(*changed) == aoti_torch_dtype_int32(), "changed must be int32 [ceil(nnz / 32)]");
      work.changed = static_cast<uint32_t*>(changed->mutable_data_ptr());
      written.push_back(*changed);
    }
    check_apart(written, "params, exp_avg, exp_avg_sq, values and changed");
    if (decay_to) work.decay_to = compact<Compute>(*decay_to, Access::kRead, crow_indices, csr.nnz, "decay_to");
    if (compact_grads) {
      DEFTX_CHECK(grads.size() == 1, "grads must be one compact tensor");
      work.grad = compact<Compute>(grads[0], Access::kRead, crow_indices, csr.nnz, "grads");
    } else {
      DEFTX_CHECK(grads.size() == params.size(), "grads must have one tensor for each of params");
      work.grads = csr_of(grads, Access::kRead);
      work.dense_grad = elements_of<Compute>(work.grads.dtype, "grads");
      for (size_t i = 0; i < grads.size(); ++i)
        DEFTX_CHECK(grads[i].numel() == params[i].numel() && work.grads.slices[i].columns == csr.slices[i].columns,
                    "gradient ", i, " has another shape than its parameter");
    }
    const bool computed_grads = !compact_grads && work.grads.dtype == compute;
    DEFTX_CHECK(compact_grads || computed_grads || work.grads.dtype == csr.dtype,
                "dense grads must have the dtype of params or, unless that is float64, be float32");
    with_dtype(csr.dtype, "params", [&](auto element) {
      using T = decltype(element);
      if constexpr (std::is_same_v<T, double> == std::is_same_v<Compute, double>) {
        work.step_block = computed_grads ? step_block<T, Compute, Compute> : step_block<T, T, Compute>;
      }
    });
    work.round_params = seed && !values && csr.dtype == aoti_torch_dtype_bfloat16();
    work.round_state = seed && dtype_of(exp_avg) == aoti_torch_dtype_bfloat16();
    work.seed = static_cast<uint64_t>(seed.value_or(0));
    work.step = t >= 0 && t < 0x1p63 ? static_cast<uint64_t>(t) : 0;  // other numbers have no integer
    if (!col_indices)
      step_full(work);
    else
      csr.wide ? step_all<int32_t>(work) : step_all<uint16_t>(work);
  };
  csr.dtype == aoti_torch_dtype_float64() ? step_in(double{}) : step_in(float{});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deftx, CPU, m) { m.impl("sparse_adamw_", TORCH_BOX(&sparse_adamw_)); }

}  // namespace deftx
