// topk_mask, magnitude_histogram, threshold_mask, dense_to_csr on the CPU.
//
// topk_mask reads the scores once. A sample gives a bracket [from, above) of magnitudes within which the threshold lies
// almost surely. The pass over the scores sets two bits per element: at or above `above`, which is selected whatever
// the threshold, and inside the bracket, of which the exact threshold is found. The keys inside are kept as long as
// they are few (1/32 of a chunk), else read again. Where the bracket missed, the pass is repeated with one that cannot
// miss. Extra memory: two bits per element, 1/32 of the keys, some 150 bytes for each tensor (for each row where rows
// are long and selected one by one), and at most 1 MB for each thread.
//
// Magnitudes are compared as the integers that their bits are without the sign ("keys"). All counts are integers and
// every bit is written by one thread, so the result does not depend on the number of threads.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <numeric>
#include <tuple>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "bitmask.h"

namespace deftx {
namespace {

using namespace bitmask;
using c10::BFloat16;
using c10::Half;

#if defined(__x86_64__) && defined(__GNUC__)
#define DEFTX_AVX512 __attribute__((target("avx512f,avx512bw,popcnt")))
#endif

// ---- keys ----

enum class Type : uint8_t { kNone, kFloat, kDouble, kBFloat16, kHalf };

Type type_of(const Tensor& t) {
  const int32_t dtype = dtype_of(t);
  if (dtype == aoti_torch_dtype_float32()) return Type::kFloat;
  if (dtype == aoti_torch_dtype_float64()) return Type::kDouble;
  if (dtype == aoti_torch_dtype_bfloat16()) return Type::kBFloat16;
  if (dtype == aoti_torch_dtype_float16()) return Type::kHalf;
  DEFTX_CHECK(false, "scores must be float32, float64, bfloat16 or float16");
  return Type::kNone;
}

int64_t size_of(Type type) { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }

// Where the scores of one part come from: a, or a - b.
struct Source {
  const void* a;
  const void* b;
  Type a_type, b_type;
};

template <typename Key>
struct Traits;
template <>
struct Traits<uint16_t> {  // bfloat16 or float16, as it is
  using Value = uint16_t;
};
template <>
struct Traits<uint32_t> {
  using Value = float;
};
template <>
struct Traits<uint64_t> {
  using Value = double;
};

template <typename Key>
constexpr Key kMagnitude = static_cast<Key>(std::numeric_limits<Key>::max() >> 1);

constexpr int64_t kBlock = 512;        // elements whose keys are made together, in L1
constexpr int64_t kLongRow = 1 << 15;  // columns; shorter rows are sorted out in a copy
constexpr int64_t kKept = 2;           // keys kept for the exact threshold, for each word of a chunk

template <typename T, typename Value>
DEFTX_CLONES void widen(const T* in, int64_t n, Value* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Value>(in[i]);
}

template <typename Value>
void widen_any(const void* data, Type type, int64_t begin, int64_t n, Value* out) {
  switch (type) {
    case Type::kFloat:
      return widen(static_cast<const float*>(data) + begin, n, out);
    case Type::kDouble:
      return widen(static_cast<const double*>(data) + begin, n, out);
    case Type::kBFloat16:
      return widen(static_cast<const BFloat16*>(data) + begin, n, out);
    default:
      return widen(static_cast<const Half*>(data) + begin, n, out);
  }
}

// The magnitudes of n numbers, given as their bits. Returns the largest.
template <typename Key>
DEFTX_CLONES Key without_sign(const Key* in, int64_t n, Key* out) {
  Key most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Key key = in[i] & kMagnitude<Key>;
    out[i] = key;
    most = std::max(most, key);
  }
  return most;
}

template <typename Value, typename Key>
DEFTX_CLONES Key difference(const Value* a, const Value* b, int64_t n, Key* out) {
  Key most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Value d = a[i] - b[i];
    Key bits;
    std::memcpy(&bits, &d, sizeof(bits));
    const Key key = bits & kMagnitude<Key>;
    out[i] = key;
    most = std::max(most, key);
  }
  return most;
}

// While the keys of one block are compared, the next one is on its way.
inline void prefetch(const void* data, Type type, int64_t begin) {
#if defined(__GNUC__)
  const int64_t size = size_of(type);
  const char* const next = static_cast<const char*>(data) + size * (begin + kBlock);
  for (int64_t at = 0; at < size * kBlock; at += 64) __builtin_prefetch(next + at);
#endif
}

// The keys of n <= kBlock elements from `begin`. Returns the largest.
template <typename Key>
Key load_keys(const Source& s, int64_t begin, int64_t n, Key* out) {
  using Value = typename Traits<Key>::Value;
  prefetch(s.a, s.a_type, begin);
  if (s.b_type != Type::kNone) prefetch(s.b, s.b_type, begin);
  if constexpr (sizeof(Key) == 2) {
    return without_sign(static_cast<const Key*>(s.a) + begin, n, out);
  } else {
    constexpr Type kOwn = sizeof(Key) == 4 ? Type::kFloat : Type::kDouble;
    Value a[kBlock], b[kBlock];
    const Value *left = a, *right = b;
    s.a_type == kOwn ? void(left = static_cast<const Value*>(s.a) + begin) : widen_any(s.a, s.a_type, begin, n, a);
    if (s.b_type == Type::kNone) return without_sign(reinterpret_cast<const Key*>(left), n, out);
    s.b_type == kOwn ? void(right = static_cast<const Value*>(s.b) + begin) : widen_any(s.b, s.b_type, begin, n, b);
    return difference(left, right, n, out);
  }
}

template <typename Value>
Value value_at(const void* data, Type type, int64_t i) {
  switch (type) {
    case Type::kFloat:
      return static_cast<Value>(static_cast<const float*>(data)[i]);
    case Type::kDouble:
      return static_cast<Value>(static_cast<const double*>(data)[i]);
    case Type::kBFloat16:
      return static_cast<Value>(static_cast<const BFloat16*>(data)[i]);
    default:
      return static_cast<Value>(static_cast<const Half*>(data)[i]);
  }
}

template <typename Key>
Key key_at(const Source& s, int64_t i) {
  if constexpr (sizeof(Key) == 2) {
    return static_cast<const Key*>(s.a)[i] & kMagnitude<Key>;
  } else {
    using Value = typename Traits<Key>::Value;
    Value v = value_at<Value>(s.a, s.a_type, i);
    if (s.b_type != Type::kNone) v -= value_at<Value>(s.b, s.b_type, i);
    Key bits;
    std::memcpy(&bits, &v, sizeof(bits));
    return bits & kMagnitude<Key>;
  }
}

// The first key that is not of a finite number.
template <typename Key>
Key infinity(const std::vector<Source>& sources) {
  if (sizeof(Key) == 8) return static_cast<Key>(0x7ff0000000000000u);
  if (sizeof(Key) == 4) return static_cast<Key>(0x7f800000u);
  return static_cast<Key>(!sources.empty() && sources[0].a_type == Type::kHalf ? 0x7c00u : 0x7f80u);
}

// ---- the pass over the scores ----

// A key >= above is selected, one in [from, above) is to be decided.
template <typename Key>
struct Bracket {
  Key from, above;
};

// Bit j: keys[j] >= bound, of kWord keys.
template <typename Key>
inline uint64_t at_least(const Key* keys, Key bound) {
  uint8_t flags[kWord];
  for (int64_t j = 0; j < kWord; ++j) flags[j] = keys[j] >= bound;
  return word_of(flags);
}

struct Counts {
  int64_t above = 0, inside = 0;
};

// The two bits of each of n words of keys, of which the last word has `last` (a set bit for each). Returns how many are
// set.
template <typename Key>
DEFTX_CLONES Counts classify(const Key* keys, int64_t n, uint64_t last, Bracket<Key> bracket, uint64_t* above,
                             uint64_t* inside) {
  Counts counts;
  for (int64_t w = 0; w < n; ++w) {
    const uint64_t valid = w + 1 == n ? last : ~uint64_t{0};
    const uint64_t high = at_least(keys + kWord * w, bracket.above) & valid;
    const uint64_t low = at_least(keys + kWord * w, bracket.from) & valid & ~high;
    above[w] = high;
    inside[w] = low;
    counts.above += count_bits(high);
    counts.inside += count_bits(low);
  }
  return counts;
}

#ifdef DEFTX_AVX512
// With these, topk_mask of 50 M float32 took 31 to 36 ms rather than 36 to 41 (best of 40 calls, two Sapphire Rapids
// cores).
DEFTX_AVX512 inline uint64_t at_least_avx512(const uint32_t* keys, __m512i bound) {
  uint64_t word = 0;
  for (int i = 0; i < 4; ++i)
    word |= static_cast<uint64_t>(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(keys + 16 * i), bound)) << (16 * i);
  return word;
}

DEFTX_AVX512 Counts classify_avx512(const uint32_t* keys, int64_t n, uint64_t last, Bracket<uint32_t> bracket,
                                    uint64_t* above, uint64_t* inside) {
  const __m512i from = _mm512_set1_epi32(static_cast<int>(bracket.from)),
                up = _mm512_set1_epi32(static_cast<int>(bracket.above));
  Counts counts;
  for (int64_t w = 0; w < n; ++w) {
    const uint64_t valid = w + 1 == n ? last : ~uint64_t{0};
    const uint64_t high = at_least_avx512(keys + kWord * w, up) & valid;
    const uint64_t low = at_least_avx512(keys + kWord * w, from) & valid & ~high;
    above[w] = high;
    inside[w] = low;
    counts.above += _mm_popcnt_u64(high);
    counts.inside += _mm_popcnt_u64(low);
  }
  return counts;
}
#endif

template <typename Key>
Counts classify_fast(const Key* keys, int64_t n, uint64_t last, Bracket<Key> bracket, uint64_t* above,
                     uint64_t* inside) {
#ifdef DEFTX_AVX512
  static const bool has_avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512f");
  if constexpr (sizeof(Key) == 4)
    if (has_avx512) return classify_avx512(keys, n, last, bracket, above, inside);
#endif
  return classify(keys, n, last, bracket, above, inside);
}

// Sets the bits of one chunk and keeps the keys inside the bracket, in order, as long as there is room for them.
template <typename Key>
Counts scan_chunk(const Source& source, const Chunk& chunk, Bracket<Key> bracket, uint64_t* above, uint64_t* inside,
                  Key* kept, Key& most) {
  const int64_t room = kKept * Layout::words_of(chunk);
  Counts counts;
  alignas(64) Key keys[kBlock] = {};
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock) {
    const int64_t n = std::min(kBlock, chunk.end - begin), words = (n + kWord - 1) / kWord,
                  first = (begin - chunk.begin) / kWord;
    most = std::max(most, load_keys(source, begin, n, keys));
    const Counts more =
        classify_fast(keys, words, between(0, n - kWord * (words - 1)), bracket, above + first, inside + first);
    if (counts.inside + more.inside <= room) {
      Key* next = kept + counts.inside;
      for (int64_t w = 0; w < words; ++w)
        for (uint64_t word = inside[first + w]; word != 0; word &= word - 1)
          *next++ = keys[kWord * w + lowest_bit(word)];
    }
    counts.above += more.above;
    counts.inside += more.inside;
  }
  return counts;
}

// ---- one selection ----

// Selects the k largest of each segment: all elements, or those of each tensor or row.
template <typename Key>
class Selection {
 public:
  Selection(const Layout& layout, const std::vector<Source>& sources)
      : layout_(layout),
        sources_(sources),
        above_(new_bits(layout)),
        inside_(new_bits(layout)),
        kept_(new Key[kKept * layout.words]),
        counts_(layout.chunks.size()) {}

  // The k[i] largest keys of each tensor i.
  void select_tensors(const std::vector<int64_t>& k) {
    std::vector<int64_t> parts(layout_.parts.size());
    std::iota(parts.begin(), parts.end(), 0);
    select_each(parts, k);
  }

  // The k largest keys of the parts [first, last).
  void select(int64_t first, int64_t last, int64_t k) {
    const int64_t from_chunk = layout_.first_chunk[first], to_chunk = layout_.first_chunk[last];
    int64_t numel = 0;
    for (int64_t p = first; p < last; ++p) numel += layout_.parts[p].numel();
    if (numel == 0) return;
    constexpr Key kNothing = kMagnitude<Key> + 1;  // no key is as large
    Bracket<Key> bracket{kNothing, kNothing};
    if (k == numel) bracket = {0, 0};
    if (0 < k && k < numel) bracket = sampled(first, last, numel, k);
    Counts total = scan(from_chunk, to_chunk, bracket);
    if (k < total.above || k > total.above + total.inside) {
      bracket = k < total.above ? Bracket<Key>{bracket.above, kNothing} : Bracket<Key>{0, bracket.from};
      total = scan(from_chunk, to_chunk, bracket);
    }
    if (k == total.above) return;
    if (k == total.above + total.inside) return take_ties(from_chunk, to_chunk, total.inside);
    int64_t ties = k - total.above;
    const Key threshold = find_threshold(from_chunk, to_chunk, bracket, ties);
    keep_ties(from_chunk, to_chunk, threshold);
    take_ties(from_chunk, to_chunk, ties);
  }

  // The keys above a threshold and the first `ties` equal to it, of the parts [first, last).
  void select_above(int64_t first, int64_t last, Key threshold, int64_t ties) {
    const int64_t from_chunk = layout_.first_chunk[first], to_chunk = layout_.first_chunk[last];
    scan(from_chunk, to_chunk, {threshold, static_cast<Key>(threshold + 1)});
    take_ties(from_chunk, to_chunk, ties);
  }

  // The k[i] largest keys of each row of tensor i. Rows longer than kLongRow are parts.
  void select_rows(const std::vector<int64_t>& k) {
    std::vector<int64_t> long_rows;
    for (int64_t p = 0; p < static_cast<int64_t>(layout_.parts.size()); ++p)
      layout_.parts[p].columns > kLongRow ? long_rows.push_back(p) : select_short_rows(p, k[layout_.parts[p].tensor]);
    select_each(long_rows, k);
  }

  // The tensor and the flat index of the first key that is not finite, or (-1, -1).
  std::array<int64_t, 2> first_bad() const {
    const Key bound = infinity<Key>(sources_);
    if (most_.load() < bound) return {-1, -1};
    for (const Chunk& chunk : layout_.chunks)
      for (int64_t i = chunk.begin; i < chunk.end; ++i)
        if (key_at<Key>(sources_[chunk.part], i) >= bound)
          return {layout_.parts[chunk.part].tensor, layout_.parts[chunk.part].first_element + i};
    return {-1, -1};
  }

  std::pair<Tensor, Tensor> csr(const Tensor& like) {
    inside_.reset();
    kept_.reset();
    std::vector<int64_t> counts;
    for (const Counts& c : counts_) counts.push_back(c.above);
    return to_csr(layout_, above_.get(), counts, like);
  }

 private:
  // The k[i] largest keys of each of the parts, which belong to tensor i: large ones with all threads, one after the
  // other; the others with a thread each, unless they are too few for all threads.
  void select_each(const std::vector<int64_t>& parts, const std::vector<int64_t>& k) {
    const auto select_part = [&](int64_t p) { select(p, p + 1, k[layout_.parts[p].tensor]); };
    std::vector<int64_t> small;
    for (const int64_t p : parts) layout_.parts[p].numel() < kLarge ? small.push_back(p) : select_part(p);
    if (small.size() < torch::stable::get_num_threads()) {
      std::for_each(small.begin(), small.end(), select_part);
      return;
    }
    torch::stable::parallel_for(0, static_cast<int64_t>(small.size()), 1, [&](int64_t begin, int64_t end) {
      std::for_each(small.begin() + begin, small.begin() + end, select_part);
    });
  }

  // The k largest keys of each row of one part.
  void select_short_rows(int64_t p, int64_t k) {
    const Part& part = layout_.parts[p];
    if (part.numel() == 0) return;
    uint64_t* const bits = above_.get() + part.first_word;
    // A word belongs to one thread: rows whose ends lie within a word stay together.
    int64_t together = kWord;
    while (together > 1 && part.columns * (together / 2) % kWord == 0) together /= 2;
    const int64_t groups = (part.rows + together - 1) / together;
    const int64_t grain = std::max<int64_t>(1, kChunk / (together * part.columns));
    torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
      std::vector<Key> keys(part.columns), order(part.columns);
      const int64_t last = std::min(end * together, part.rows);
      const int64_t first_word = begin * together * part.columns / kWord;
      std::fill(bits + first_word, bits + (last * part.columns + kWord - 1) / kWord, uint64_t{0});
      for (int64_t r = begin * together; r < last; ++r) select_row(sources_[p], r * part.columns, k, keys, order, bits);
    });
    for_each_chunk(layout_.first_chunk[p], layout_.first_chunk[p + 1], [&](int64_t c) {
      const uint64_t* const words = above_.get() + layout_.first_word(layout_.chunks[c]);
      for (int64_t w = 0; w < Layout::words_of(layout_.chunks[c]); ++w) counts_[c].above += count_bits(words[w]);
    });
  }

  void raise_most(Key key) {
    Key seen = most_.load();
    while (key > seen && !most_.compare_exchange_weak(seen, key)) {
    }
  }

  // A number in [0, 1) that looks random (the finaliser of MurmurHash3).
  static double scrambled(uint64_t x) {
    x = (x ^ x >> 33) * 0xff51afd7ed558ccdu;
    x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53u;
    return static_cast<double>(x >> 11) * 0x1p-53;
  }

  // A bracket around the k-th largest key, from a sample: six standard deviations of its rank.
  Bracket<Key> sampled(int64_t first, int64_t last, int64_t numel, int64_t k) const {
    const int64_t size = std::min(numel, std::clamp(numel / 64, kSample / 8, kSample));
    std::vector<Key> keys(size);
    // Sample i is an element of the i-th of `size` equal stretches of the parts one after the other, at a place in it
    // that looks random: at regular distances, columns of different scale would mislead.
    std::vector<int64_t> starts{0};
    for (int64_t p = first; p < last; ++p) starts.push_back(starts.back() + layout_.parts[p].numel());
    const double distance = static_cast<double>(numel) / static_cast<double>(size);
    torch::stable::parallel_for(0, size, kSample / 8, [&](int64_t begin, int64_t end) {
      int64_t p = 0;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at =
            size == numel
                ? i
                : std::min(static_cast<int64_t>((static_cast<double>(i) + scrambled(i)) * distance), numel - 1);
        while (at >= starts[p + 1]) ++p;
        keys[i] = key_at<Key>(sources_[first + p], at - starts[p]);
      }
    });
    const double share = static_cast<double>(k) / static_cast<double>(numel), rank = share * static_cast<double>(size);
    const double margin = size == numel ? 0 : 6 * std::sqrt(rank * (1 - share)) + 4;
    const auto high = static_cast<int64_t>(std::floor(rank - margin)),
               low = static_cast<int64_t>(std::ceil(rank + margin));
    Bracket<Key> bracket{0, static_cast<Key>(kMagnitude<Key> + 1)};
    auto end = keys.end();
    if (low < size) {  // the sample's low-th largest (from 1)
      std::nth_element(keys.begin(), keys.begin() + (low - 1), end, std::greater<Key>());
      bracket.from = keys[low - 1];
      end = keys.begin() + low;
    }
    if (high >= 1) {
      std::nth_element(keys.begin(), keys.begin() + (high - 1), end, std::greater<Key>());
      bracket.above = static_cast<Key>(keys[high - 1] + 1);
    }
    if (bracket.above <= bracket.from) bracket.above = static_cast<Key>(bracket.from + 1);
    return bracket;
  }

  Counts scan(int64_t from_chunk, int64_t to_chunk, Bracket<Key> bracket) {
    for_each_chunk(from_chunk, to_chunk, [&](int64_t c) {
      const Chunk& chunk = layout_.chunks[c];
      const int64_t word = layout_.first_word(chunk);
      Key most = 0;
      counts_[c] = scan_chunk(sources_[chunk.part], chunk, bracket, above_.get() + word, inside_.get() + word,
                              kept_.get() + kKept * word, most);
      raise_most(most);
    });
    Counts total;
    for (int64_t c = from_chunk; c < to_chunk; ++c) total.above += counts_[c].above, total.inside += counts_[c].inside;
    return total;
  }

  // Calls visit(key, place of the element) for the elements inside the bracket.
  template <typename Visit>
  void for_each_inside(int64_t c, const Visit& visit) const {
    const Chunk& chunk = layout_.chunks[c];
    const int64_t first = layout_.first_word(chunk);
    const uint64_t* const words = inside_.get() + first;
    const bool all_kept = counts_[c].inside <= kKept * Layout::words_of(chunk);
    const Key* kept = kept_.get() + kKept * first;
    for (int64_t w = 0; counts_[c].inside != 0 && w < Layout::words_of(chunk); ++w)
      for (uint64_t word = words[w]; word != 0; word &= word - 1) {
        const int bit = lowest_bit(word);
        visit(all_kept ? *kept++ : key_at<Key>(sources_[chunk.part], chunk.begin + kWord * w + bit), w, bit);
      }
  }

  // The ties-th largest key inside the bracket; `ties` becomes how many keys equal to it belong to the selection.
  Key find_threshold(int64_t from_chunk, int64_t to_chunk, Bracket<Key> bracket, int64_t& ties) const {
    uint64_t base = bracket.from,
             span = static_cast<uint64_t>(bracket.above) - base;  // the threshold is in [base, base + span)
    if (span == 1) return bracket.from;
    std::vector<int64_t> histogram(kBins);
    std::mutex merging;
    while (span > 1) {
      int shift = 0;
      while (((span - 1) >> shift) >= kBins) ++shift;
      std::fill(histogram.begin(), histogram.end(), 0);
      torch::stable::parallel_for(from_chunk, to_chunk, 1, [&](int64_t begin, int64_t end) {
        std::vector<int64_t> mine(kBins);
        for (int64_t c = begin; c < end; ++c)
          for_each_inside(c, [&](Key key, int64_t, int) {
            const uint64_t distance = static_cast<uint64_t>(key) - base;
            if (distance < span) ++mine[distance >> shift];
          });
        const std::lock_guard<std::mutex> lock(merging);
        for (uint64_t b = 0; b < kBins; ++b) histogram[b] += mine[b];
      });
      uint64_t bin = kBins - 1;
      for (; ties > histogram[bin]; --bin) ties -= histogram[bin];
      base += bin << shift;
      span = std::min(span - (bin << shift), uint64_t{1} << shift);
    }
    return static_cast<Key>(base);
  }

  // Selects what is above the threshold; only what equals it stays inside.
  void keep_ties(int64_t from_chunk, int64_t to_chunk, Key threshold) {
    for_each_chunk(from_chunk, to_chunk, [&](int64_t c) {
      const int64_t first = layout_.first_word(layout_.chunks[c]);
      uint64_t* const above = above_.get() + first;
      uint64_t* const inside = inside_.get() + first;
      Counts change;
      for_each_inside(c, [&](Key key, int64_t w, int bit) {
        if (key == threshold) return;
        inside[w] &= ~(uint64_t{1} << bit);
        --change.inside;
        if (key < threshold) return;
        above[w] |= uint64_t{1} << bit;
        ++change.above;
      });
      counts_[c].above += change.above;
      counts_[c].inside += change.inside;
    });
  }

  // Selects the first `ties` of what is inside.
  void take_ties(int64_t from_chunk, int64_t to_chunk, int64_t ties) {
    std::vector<int64_t> quota(to_chunk - from_chunk);
    for (int64_t c = from_chunk; c < to_chunk; ++c) ties -= quota[c - from_chunk] = std::min(ties, counts_[c].inside);
    for_each_chunk(from_chunk, to_chunk, [&](int64_t c) {
      const int64_t first = layout_.first_word(layout_.chunks[c]);
      int64_t left = quota[c - from_chunk];
      counts_[c].above += left;
      for (int64_t w = first; left > 0; ++w) {
        uint64_t word = inside_[w], taken = word;
        if (count_bits(word) > left)
          for (taken = 0; left > 0; word &= word - 1, --left) taken |= word & (~word + 1);
        else
          left -= count_bits(word);
        above_[w] |= taken;
      }
    });
  }

  // The k largest of the row that begins at element `begin`. keys, order [columns]: room to work in.
  void select_row(const Source& source, int64_t begin, int64_t k, std::vector<Key>& keys, std::vector<Key>& order,
                  uint64_t* bits) {
    const auto columns = static_cast<int64_t>(keys.size());
    for (int64_t j = 0; j < columns; j += kBlock)
      load_keys(source, begin + j, std::min(kBlock, columns - j), keys.data() + j);
    raise_most(*std::max_element(keys.begin(), keys.end()));
    if (k == 0) return;
    order = keys;
    std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<Key>());
    const Key threshold = order[k - 1];
    int64_t ties = k;
    for (int64_t j = 0; j < columns; ++j) ties -= keys[j] > threshold;
    for (int64_t j = 0; j < columns; ++j)
      if (keys[j] > threshold || (keys[j] == threshold && ties-- > 0))
        bits[(begin + j) / kWord] |= uint64_t{1} << (begin + j) % kWord;
  }

  static constexpr int64_t kSample = 1 << 16;
  static constexpr int64_t kLarge = 1 << 22;
  static constexpr uint64_t kBins = 1 << 12;

  const Layout& layout_;
  const std::vector<Source>& sources_;
  std::unique_ptr<uint64_t[]> above_, inside_;
  std::unique_ptr<Key[]> kept_;  // [words, kKept]
  std::vector<Counts> counts_;   // [chunks]
  std::atomic<Key> most_{0};
};

// ---- ops ----

const char* data_at(const Tensor& t, Type type, int64_t element) {
  return static_cast<const char*>(t.const_data_ptr()) + size_of(type) * element;
}

// Of each part of the layout of the scores.
std::vector<Source> sources_of(const Layout& layout, const std::vector<Tensor>& scores,
                               const std::vector<Tensor>& base) {
  DEFTX_CHECK(!scores.empty(), "scores must hold at least one tensor");
  DEFTX_CHECK(base.empty() || base.size() == scores.size(), "base must be empty or have as many tensors as scores");
  for (size_t i = 0; i < base.size(); ++i) {
    check_tensor(base[i], Device::kCpu, "every base tensor");
    DEFTX_CHECK(base[i].numel() == scores[i].numel(), "base tensor ", i, " has another size than scores");
  }
  std::vector<Source> sources;
  sources.reserve(layout.parts.size());
  for (const Part& part : layout.parts) {
    const Tensor& a = scores[part.tensor];
    const Type type = type_of(a);
    sources.push_back({data_at(a, type, part.first_element), nullptr, type, Type::kNone});
    if (base.empty()) continue;
    const Tensor& b = base[part.tensor];
    sources.back().b_type = type_of(b);
    sources.back().b = data_at(b, sources.back().b_type, part.first_element);
  }
  return sources;
}

// Bytes of the keys in which all scores of a call are compared exactly.
int64_t key_size(const std::vector<Source>& sources) {
  bool same = true, wide = false;
  for (const Source& s : sources) {
    same &= s.a_type == sources[0].a_type && s.b_type == Type::kNone;
    wide |= s.a_type == Type::kDouble || s.b_type == Type::kDouble;
  }
  if (wide) return 8;
  return same && sources[0].a_type != Type::kFloat ? 2 : 4;
}

// work(Key{}) with the type of the keys.
template <typename Work>
auto with_key(int64_t size, const Work& work) {
  if (size == 2) return work(uint16_t{});
  if (size == 4) return work(uint32_t{});
  return work(uint64_t{});
}

std::tuple<Tensor, Tensor, Tensor> topk_mask(std::vector<Tensor> scores, std::vector<Tensor> base,
                                             std::vector<int64_t> k, int64_t scope) {
  const Scope which = scope_of(scope);
  const bool global = which == Scope::kGlobal, row = which == Scope::kRow;
  const Layout layout = layout_of(scores, row ? kLongRow : INT64_MAX);
  const std::vector<Source> sources = sources_of(layout, scores, base);
  DEFTX_CHECK(k.size() == (global ? 1 : scores.size()), "k must have one number for each selection, got ", k.size());
  for (size_t i = 0; i < k.size(); ++i) {
    const int64_t most = global ? layout.numel : row ? columns_of(scores[i]) : scores[i].numel();
    DEFTX_CHECK(k[i] >= 0 && k[i] <= most, "k must be from 0 to ", most, ", got ", k[i]);
  }
  return with_key(key_size(sources), [&](auto key) {
    Selection<decltype(key)> selection(layout, sources);
    if (global) selection.select(0, static_cast<int64_t>(layout.parts.size()), k[0]);
    if (which == Scope::kTensor) selection.select_tensors(k);
    if (row) selection.select_rows(k);
    const auto bad = selection.first_bad();
    auto [crow, col] = selection.csr(scores[0]);
    Tensor where = torch::stable::new_empty(scores[0], {2}, torch::headeronly::ScalarType::Long);
    std::copy(bad.begin(), bad.end(), static_cast<int64_t*>(where.mutable_data_ptr()));
    return std::make_tuple(crow, col, where);
  });
}

void check_one_dtype(const std::vector<Tensor>& scores) {
  DEFTX_CHECK(!scores.empty(), "scores must hold at least one tensor");
  for (const Tensor& t : scores) DEFTX_CHECK(dtype_of(t) == dtype_of(scores[0]), "scores must have one dtype");
}

Tensor magnitude_histogram(std::vector<Tensor> scores, int64_t prefix, int64_t shift) {
  check_one_dtype(scores);
  const Layout layout = layout_of(scores);
  const std::vector<Source> sources = sources_of(layout, scores, {});
  const int64_t bits = 8 * key_size(sources);
  check_digit(prefix, shift, bits / 8);
  constexpr int64_t kBins = 1 << 16;
  Tensor histogram = torch::stable::new_empty(scores[0], {kBins}, torch::headeronly::ScalarType::Long);
  auto* const total = static_cast<int64_t*>(histogram.mutable_data_ptr());
  std::fill_n(total, kBins, 0);
  std::mutex merging;
  with_key(bits / 8, [&](auto zero) {
    using Key = decltype(zero);
    const bool filtered = shift + 16 < bits;
    const auto wanted = static_cast<uint64_t>(prefix);
    torch::stable::parallel_for(0, static_cast<int64_t>(layout.chunks.size()), 1, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> mine(kBins);
      Key keys[kBlock];
      for (int64_t c = begin; c < end; ++c) {
        const Chunk& chunk = layout.chunks[c];
        for (int64_t at = chunk.begin; at < chunk.end; at += kBlock) {
          const int64_t n = std::min(kBlock, chunk.end - at);
          load_keys(sources[chunk.part], at, n, keys);
          for (int64_t i = 0; i < n; ++i) {
            const uint64_t key = keys[i];
            if (!filtered || key >> (shift + 16) == wanted) ++mine[(key >> shift) & (kBins - 1)];
          }
        }
      }
      const std::lock_guard<std::mutex> lock(merging);
      for (int64_t b = 0; b < kBins; ++b) total[b] += mine[b];
    });
    return 0;
  });
  return histogram;
}

std::tuple<Tensor, Tensor> threshold_mask(std::vector<Tensor> scores, int64_t threshold, std::vector<int64_t> ties) {
  check_one_dtype(scores);
  const Layout layout = layout_of(scores);
  const std::vector<Source> sources = sources_of(layout, scores, {});
  check_ties(ties, scores);
  return with_key(key_size(sources), [&](auto zero) {
    using Key = decltype(zero);
    check_threshold(threshold, sizeof(Key));
    Selection<Key> selection(layout, sources);
    for (int64_t p = 0; p < static_cast<int64_t>(scores.size()); ++p)
      selection.select_above(p, p + 1, static_cast<Key>(threshold), ties[p]);
    auto [crow, col] = selection.csr(scores[0]);
    return std::make_tuple(crow, col);
  });
}

std::tuple<Tensor, Tensor> dense_to_csr(std::vector<Tensor> dense) {
  DEFTX_CHECK(!dense.empty(), "dense must hold at least one tensor");
  for (const Tensor& t : dense) DEFTX_CHECK(dtype_of(t) == aoti_torch_dtype_bool(), "every tensor must be bool");
  const Layout layout = layout_of(dense);
  const auto bits = new_bits(layout);
  std::vector<int64_t> counts(layout.chunks.size());
  for_each_chunk(0, static_cast<int64_t>(counts.size()), [&](int64_t c) {
    const Chunk& chunk = layout.chunks[c];
    const auto* const flags = static_cast<const uint8_t*>(dense[chunk.part].const_data_ptr());
    alignas(64) uint8_t block[kBlock];
    for (int64_t at = chunk.begin; at < chunk.end; at += kBlock) {
      const int64_t n = std::min(kBlock, chunk.end - at), words = (n + kWord - 1) / kWord;
      std::copy_n(flags + at, n, block);
      std::fill(block + n, block + words * kWord, uint8_t{0});
      uint64_t* const out = bits.get() + layout.first_word(chunk) + (at - chunk.begin) / kWord;
      for (int64_t w = 0; w < words; ++w) counts[c] += count_bits(out[w] = at_least<uint8_t>(block + kWord * w, 1));
    }
  });
  auto [crow, col] = to_csr(layout, bits.get(), counts, dense[0]);
  return std::make_tuple(crow, col);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deftx, CPU, m) {
  m.impl("topk_mask", TORCH_BOX(&topk_mask));
  m.impl("magnitude_histogram", TORCH_BOX(&magnitude_histogram));
  m.impl("threshold_mask", TORCH_BOX(&threshold_mask));
  m.impl("dense_to_csr", TORCH_BOX(&dense_to_csr));
}

}  // namespace deftx
