// sparse_adamw_ on the CPU: one AdamW step at the entries of a mask.
//
// The entries are cut into pieces of equal length, one per thread, whatever rows or tensors they fall into, and a piece
// into blocks. Reads of scattered cache lines bound the time, so they must not wait for arithmetic: the step of a block
// prefetches, between its vectors, the lines of the next one. (A phase that gathers a block, then one that computes,
// took 1.15 times as long: 50 M float32 at 5 %, two cores of a Sapphire Rapids Xeon.)
#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>

#include "rows.h"

namespace deftx {
namespace {

constexpr int64_t kBlock = 256;  // entries

#if defined(__GNUC__)
#define DEFTX_INLINE inline __attribute__((always_inline))  // into each clone of the caller
#pragma GCC diagnostic ignored "-Wpsabi"  // about vectors as results of functions that are always inlined
template <typename Compute>
struct LanesOf {
  typedef Compute type __attribute__((vector_size(32)));
};
template <typename Compute>
using Lanes = typename LanesOf<Compute>::type;

DEFTX_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 1); }  // into L2
#else
#define DEFTX_INLINE inline
template <typename Compute>
using Lanes = Compute;

inline void prefetch(const void*) {}
#endif

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

// One of the two bfloat16 numbers beside x, each as likely as x is near to it; bfloat16's own numbers, and NaN, stay.
DEFTX_INLINE BFloat16 round_stochastically(float x, uint32_t word) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<BFloat16>(x);
  bits += word & 0xffff;
  return BFloat16(static_cast<uint16_t>(bits >> 16), BFloat16::from_bits());
}

void round_stochastically(const float* in, const uint32_t* words, BFloat16* out, int64_t n) {
  for (int64_t k = 0; k < n; ++k) out[k] = round_stochastically(in[k], words[k]);
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
  const uint32_t* words;                   // [n] to round parameters stochastically, or null
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

// One vector's entries, from the k-th on. T, G: the parameters' and the dense gradients' types.
template <typename Vector, typename T, typename G, typename Compute>
DEFTX_INLINE void step_vector(const Pointers<Compute>& p, const Scalars<Compute>& s, int64_t k) {
  constexpr int64_t kLanes = sizeof(Vector) / sizeof(Compute);
  Vector w = p.values ? load<Vector>(p.values + k) : gather<Vector, T, Compute>(p.params, p.offsets + k);
  Vector g = p.grad ? load<Vector>(p.grad + k) : gather<Vector, G, Compute>(p.grads, p.offsets + k);
  for (int64_t q = 0; q < kLanes; ++q) {
    prefetch(p.next_params + p.next_offsets[k + q] * int64_t{sizeof(T)});
    if (p.grads) prefetch(p.next_grads + p.next_offsets[k + q] * int64_t{sizeof(G)});
  }

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
  if (p.values) std::memcpy(p.values + k, &w, sizeof w);
  Compute lanes[kLanes];
  std::memcpy(lanes, &w, sizeof w);
  for (int64_t q = 0; q < kLanes; ++q) {
    T* out = reinterpret_cast<T*>(p.params) + p.offsets[k + q];
    if constexpr (std::is_same_v<T, BFloat16>)
      *out = p.words ? round_stochastically(lanes[q], p.words[k + q]) : static_cast<T>(lanes[q]);
    else
      *out = static_cast<T>(lanes[q]);
  }
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
  Scalars<Compute> scalars;
  void (*step_block)(const Pointers<Compute>&, const Scalars<Compute>&, int64_t n);
  uint64_t seed, step;
  bool round_params, round_state;  // stochastically
};

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

  void step(const Block& block, const Block& next) {
    const int64_t first = block.first, n = block.n;
    Pointers<Compute> p{};
    p.params = static_cast<char*>(work.params.slices[block.tensor].data);
    p.next_params = static_cast<const char*>(work.params.slices[next.tensor].data);
    if (!work.grad.data) {
      p.grads = static_cast<const char*>(work.grads.slices[block.tensor].data);
      p.next_grads = static_cast<const char*>(work.grads.slices[next.tensor].data);
    }
    p.offsets = block.offsets;
    p.next_offsets = next.offsets;
    p.values = work.values.block(first, n, nullptr);
    p.exp_avg = work.exp_avg.block(first, n, exp_avg);
    p.exp_avg_sq = work.exp_avg_sq.block(first, n, exp_avg_sq);
    p.grad = work.grad.block(first, n, grad);
    p.decay_to = work.decay_to.block(first, n, decay_to);
    if (work.round_params || work.round_state)
      philox(work.seed, work.step, static_cast<uint64_t>(first), n, words[0], words[1], words[2]);
    p.words = work.round_params ? words[0] : nullptr;
    work.step_block(p, work.scalars, n);
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

template <typename Column, typename Compute>
void step_all(const Work<Compute>& work) {
  check_contents<Column>(work.params);
  const auto* col = static_cast<const Column*>(work.params.col);
  torch::stable::parallel_for(0, work.params.nnz, kGrain, [&](int64_t begin, int64_t end) {
    Worker<Compute> worker{work, {}, {}, {}, {}, {}};
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
Compact<Compute> compact(const Tensor& t, Access access, const Tensor& col_indices, const char* name) {
  check_compact(t, Device::kCpu, col_indices, col_indices.numel(), name);
  Compact<Compute> result;
  result.data =
      static_cast<char*>(access == Access::kWrite ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr()));
  with_dtype(dtype_of(t), name, [&](auto zero) {
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
Scalars<Compute> rounded(const Scalars<double>& s) {
  const auto c = [](double x) { return static_cast<Compute>(x); };
  return {c(s.beta1),     c(s.rest1), c(s.beta2), c(s.rest2), c(s.root_bias2),
          c(s.step_size), c(s.eps),   c(s.decay), c(s.l1),    c(s.scale)};
}

void sparse_adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, bool compact_grads,
                   Tensor exp_avg,                // [nnz]
                   Tensor exp_avg_sq,             // [nnz]
                   std::optional<Tensor> values,  // [nnz]
                   Tensor crow_indices,           // int64 [rows + 1]
                   Tensor col_indices,            // uint16 or int32 [nnz]
                   Tensor step, Tensor lr, double beta1, double beta2, double eps, double weight_decay,
                   std::optional<Tensor> decay_to,  // [nnz]
                   double l1, bool maximize, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                   std::optional<int64_t> seed) {
  const Csr csr = check_csr(params, Access::kWrite, crow_indices, col_indices, Device::kCpu);
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
    work.exp_avg = compact<Compute>(exp_avg, Access::kWrite, col_indices, "exp_avg");
    work.exp_avg_sq = compact<Compute>(exp_avg_sq, Access::kWrite, col_indices, "exp_avg_sq");
    DEFTX_CHECK(dtype_of(exp_avg) == dtype_of(exp_avg_sq), "exp_avg and exp_avg_sq must have the same dtype");
    if (values) {
      DEFTX_CHECK(dtype_of(*values) == compute, "values must be float32, or float64 for float64 params");
      work.values = compact<Compute>(*values, Access::kWrite, col_indices, "values");
    }
    std::vector<Tensor> written = params;
    written.insert(written.end(), {exp_avg, exp_avg_sq});
    if (values) written.push_back(*values);
    check_apart(written, "params, exp_avg, exp_avg_sq and values");
    if (decay_to) work.decay_to = compact<Compute>(*decay_to, Access::kRead, col_indices, "decay_to");
    if (compact_grads) {
      DEFTX_CHECK(grads.size() == 1, "grads must be one compact tensor");
      work.grad = compact<Compute>(grads[0], Access::kRead, col_indices, "grads");
    } else {
      work.grads = check_csr(grads, Access::kRead, crow_indices, col_indices, Device::kCpu);
      DEFTX_CHECK(grads.size() == params.size(), "grads must have one tensor for each of params");
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
    csr.wide ? step_all<int32_t>(work) : step_all<uint16_t>(work);
  };
  csr.dtype == aoti_torch_dtype_float64() ? step_in(double{}) : step_in(float{});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deftx, CPU, m) { m.impl("sparse_adamw_", TORCH_BOX(&sparse_adamw_)); }

}  // namespace deftx
