// Eights of scores compared with the keys of a bracket. How depends on which arithmetic is cheapest.
//
//     Limit, limit(key)       what a key becomes to be compared with
//     not_below(g, limit)     a bit for each of the eight: whether its key is at least the limit. Exact, for any bits.
//     Bracket(from, above)    the bracket of these two keys
//     classify(g, bracket, set, worst)
//                             shifts not_below(from) into `set` from the right. Returns whether a score may lie inside
//                             the bracket: true wherever one does. Right where all scores are finite.
//     found_bad(worst, infinity)
//                             whether any score that was classified was infinite or NaN
//
// A scheduler issues one instruction in a cycle, but an integer one (other than multiplications) only every other
// cycle. On sm_90 classify takes 30 instructions for float32, 14 of them such, and 22 for 16-bit scores, 15 of them
// such.
#pragma once

#include "scores.cuh"

namespace deftx {
namespace {

template <typename Word>
struct KeyBracket {
  Word from, above;
  KeyBracket() = default;
  __device__ KeyBracket(uint64_t from, uint64_t above)
      : from(static_cast<Word>(from)), above(static_cast<Word>(above)) {}
};

template <typename Key, bool kBase, bool kWhole, int kEights>
struct Eights {
  using Limit = WordOf<Key>;
  using Worst = WordOf<Key>;  // the largest key
  using Bracket = KeyBracket<Limit>;
  WordOf<Key> keys[kEights][8];

  __device__ Eights(const Item& item, int64_t at) { load_keys<Key, kBase, kWhole, kEights>(keys, item, at); }
  __device__ static Limit limit(uint64_t key) { return static_cast<Limit>(key); }
  __device__ uint32_t not_below(int g, Limit limit) const {
    uint32_t below = 0;
#pragma unroll
    for (int j = 7; j >= 0; --j) {  // neither key nor limit has more than kBits + 1 bits: the first bit is the sign
      below = __funnelshift_l(static_cast<uint32_t>((keys[g][j] - limit) >> (8 * sizeof(Limit) - 32)), below, 1);
    }
    return ~below & 0xFFu;
  }
  __device__ bool classify(int g, const Bracket& bracket, uint32_t& set, Worst& worst) const {
    const uint32_t mine = not_below(g, bracket.from);
    set = set << 8 | mine;
#pragma unroll
    for (int j = 0; j < 8; ++j) worst = max(worst, keys[g][j]);
    return mine & ~not_below(g, bracket.above);
  }
  __device__ static bool found_bad(Worst worst, uint64_t infinity) { return worst >= infinity; }
};

struct FloatBracket {
  float before;     // the last number before the bracket
  int32_t nearest;  // the differences of its numbers from `before` are smaller, as integers
  FloatBracket() = default;
  __device__ FloatBracket(uint64_t from, uint64_t above) {
    const uint32_t key = static_cast<uint32_t>(min(from - 1, uint64_t{0x7F800000}));
    before = __uint_as_float(from == 0 ? 0x80000001u : key);  // -2^-149, where all are inside or above
    const float last = __uint_as_float(static_cast<uint32_t>(min(above - 1, uint64_t{0x7F7FFFFF})));
    nearest = above > from ? __float_as_int(__fsub_rn(before, last)) + 1 : INT32_MIN;
  }
};

// In float32 the sign of before - |x|: no rounding changes it, additions have twice the rate of integer ones, and |x|
// is free. The smallest of these differences as integers belongs to the smallest |x| that is not below the bracket.
template <bool kBase, bool kWhole, int kEights>
struct FloatEights {
  using Worst = float;  // 0, or NaN
  using Bracket = FloatBracket;
  float x[kEights][8];

  __device__ FloatEights(const Item& item, int64_t at) {
    const RawEights<uint32_t, kBase, kWhole, kEights> raw(item, at);
#pragma unroll
    for (int g = 0; g < kEights; ++g) raw.scores(g, x[g], item);
  }
  __device__ bool classify(int g, const Bracket& bracket, uint32_t& set, Worst& worst) const {
    int32_t difference[8], lowest = INT32_MAX;
#pragma unroll
    for (int j = 7; j >= 0; --j) {
      difference[j] = __float_as_int(__fsub_rn(bracket.before, fabsf(x[g][j])));
      set = __funnelshift_l(static_cast<uint32_t>(difference[j]), set, 1);
      worst = __fmaf_rn(x[g][j], 0.0f, worst);
    }
#pragma unroll
    for (int j = 0; j < 8; j += 2) lowest = __vimin3_s32(difference[j], difference[j + 1], lowest);
    return lowest < bracket.nearest;
  }
  __device__ static bool found_bad(Worst worst, uint64_t) { return worst != worst; }
};

// The first bits of the halves of a and b: a byte for each, 0 or -1.
__device__ inline int32_t signs_of_halves(uint32_t a, uint32_t b) {
  int32_t signs;
  asm("prmt.b32 %0, %1, %2, 0xFDB9;" : "=r"(signs) : "r"(a), "r"(b));
  return signs;
}

__device__ inline uint32_t both_halves(uint64_t key) { return static_cast<uint32_t>(key) * 0x10001u; }

struct HalfBracket {
  uint32_t from;
  int32_t nearest;  // the differences of the bracket's keys from `from`, with bit 15 set, are smaller; times 2^16
  HalfBracket() = default;
  __device__ HalfBracket(uint64_t from, uint64_t above)
      : from(both_halves(from)),
        nearest(static_cast<int32_t>(0x80000000u + (static_cast<uint32_t>(max(above, from) - from) << 16))) {}
};

// Two keys of 15 bits to a word: with bit 15 set, a subtraction borrows nothing from the neighbour and leaves the bit
// where the key is not below the limit.
template <bool kWhole, int kEights>
struct Eights<uint16_t, false, kWhole, kEights> {
  using Limit = uint32_t;
  using Worst = uint32_t;  // the largest of each half, with bit 15 set
  using Bracket = HalfBracket;
  RawEights<uint16_t, false, kWhole, kEights> raw;

  __device__ Eights(const Item& item, int64_t at) : raw(item, at) {}
  __device__ static Limit limit(uint64_t key) { return both_halves(key); }
  __device__ uint32_t with_sign(int g, int i) const { return raw.a[g][i] | 0x80008000u; }
  // set << 8, and the first bits of the eight halves.
  __device__ static uint32_t shift_in(uint32_t set, const uint32_t (&halves)[4]) {
    int32_t sum = static_cast<int32_t>(set << 8);
    sum = __dp4a(signs_of_halves(halves[0], halves[1]), static_cast<int32_t>(0xF8FCFEFF), sum);  // -1, -2, -4, -8
    sum = __dp4a(signs_of_halves(halves[2], halves[3]), static_cast<int32_t>(0x80C0E0F0), sum);  // -16, ... -128
    return static_cast<uint32_t>(sum);
  }
  __device__ uint32_t not_below(int g, Limit limit) const {
    const uint32_t halves[4] = {with_sign(g, 0) - limit, with_sign(g, 1) - limit, with_sign(g, 2) - limit,
                                with_sign(g, 3) - limit};
    return shift_in(0, halves);
  }
  __device__ bool classify(int g, const Bracket& bracket, uint32_t& set, Worst& worst) const {
    uint32_t halves[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) halves[i] = with_sign(g, i) - bracket.from;
    set = shift_in(set, halves);
    worst = __vimax3_u16x2(with_sign(g, 0), with_sign(g, 1), worst);
    worst = __vimax3_u16x2(with_sign(g, 2), with_sign(g, 3), worst);
    const uint32_t three = __vimin3_s16x2(halves[0], halves[1], halves[2]),
                   lowest = __vimin3_s16x2(three, halves[3], three);
    return static_cast<int32_t>(lowest) < bracket.nearest || static_cast<int32_t>(lowest << 16) < bracket.nearest;
  }
  __device__ static bool found_bad(Worst worst, uint64_t infinity) {
    return max(worst & 0x7FFFu, worst >> 16 & 0x7FFFu) >= infinity;
  }
};

// For scores that are finite.
template <typename Key, bool kBase, bool kWhole, int kEights>
using FiniteEights =
    std::conditional_t<sizeof(Key) == 4, FloatEights<kBase, kWhole, kEights>, Eights<Key, kBase, kWhole, kEights>>;

}  // namespace
}  // namespace deftx
