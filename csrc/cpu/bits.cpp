// bit_diff, flat_exchange_, bit_checksum, bit_checksum_change, set_bits on the CPU.
//
// bit_diff reads the tensors once. They are cut, one after the other, into chunks of equal length. A chunk's entries
// are found in memory that stays in a core's cache, and kept in a piece of their own size; the pieces are copied to the
// result, whose size is then known, and freed one by one. A chunk is found by one thread, and its place in the result
// depends on the chunks before it alone. Checksums are integers, of which any order of additions gives the same sum.
#include "../bits.h"

#include <atomic>
#include <cstring>
#include <memory>

#include "bitmask.h"
#include "rows.h"

namespace deftx {
namespace {

using torch::headeronly::ScalarType;

using bitmask::kWord, bitmask::lowest_bit, bitmask::word_of;

constexpr int64_t kChunk = 1 << 16;  // elements; a position in a chunk has 16 bits

// ---- tensors, one after the other ----

// Calls visit(i, begin, end) for the parts [begin, end) of items i, counted from the item's first element, that make up
// the elements [from, to) of all. starts [items + 1]: where each item's elements begin among all.
template <typename Visit>
void for_each_part(const std::vector<int64_t>& starts, int64_t from, int64_t to, const Visit& visit) {
  if (from >= to) return;
  for (size_t i = std::upper_bound(starts.begin(), starts.end(), from) - starts.begin() - 1; from < to; ++i) {
    const int64_t end = std::min(starts[i + 1], to);
    if (from < end) visit(i, from - starts[i], end - starts[i]);
    from = end;
  }
}

std::vector<int64_t> starts_of(const std::vector<Tensor>& tensors, int64_t bytes, int64_t unit) {
  std::vector<int64_t> starts{0};
  starts.reserve(tensors.size() + 1);
  for (const Tensor& t : tensors) starts.push_back(starts.back() + (t.numel() * bytes + unit - 1) / unit);
  return starts;
}

template <typename T>
std::vector<const T*> data_of(const std::vector<Tensor>& tensors) {
  std::vector<const T*> data;
  data.reserve(tensors.size());
  for (const Tensor& t : tensors) data.push_back(static_cast<const T*>(t.const_data_ptr()));
  return data;
}

// Turns the entries of each chunk, in before[chunk + 1], into those of earlier chunks; and offsets[i], for a tensor
// with elements the entries before it in the chunk that it begins in, into those before it in all.
void add_up(std::vector<int64_t>& before, const std::vector<int64_t>& starts, int64_t* offsets) {
  for (size_t c = 1; c < before.size(); ++c) before[c] += before[c - 1];
  const size_t tensors = starts.size() - 1;
  offsets[tensors] = before.back();
  for (size_t i = tensors; i-- > 0;)
    offsets[i] = starts[i] == starts[i + 1] ? offsets[i + 1] : offsets[i] + before[starts[i] / kChunk];
}

// ---- bit_diff ----

// Writes those of n <= kChunk elements that differ: their positions, from `position` on, and their values in a. Returns
// their number. In two passes, the second over the words of bits that are not 0, so that few branches are mispredicted.
template <typename T>
DEFTX_CLONES int64_t find_differences(const T* a, const T* b, int64_t n, int64_t position, uint16_t* found, T* values) {
  uint64_t words[kChunk / kWord];
  uint16_t first[kChunk / kWord];
  int64_t count = 0, filled = 0;
  for (int64_t i = 0; i < n; i += kWord) {
    uint8_t flags[kWord];
    if (n - i >= kWord) {
      for (int64_t j = 0; j < kWord; ++j) flags[j] = a[i + j] != b[i + j];
    } else {
      for (int64_t j = 0; j < kWord; ++j) flags[j] = i + j < n && a[i + j] != b[i + j];
    }
    words[filled] = word_of(flags);
    first[filled] = static_cast<uint16_t>(i);
    filled += words[filled] != 0;
  }
  for (int64_t w = 0; w < filled; ++w) {
    for (uint64_t word = words[w]; word != 0; word &= word - 1, ++count) {
      const int64_t k = first[w] + lowest_bit(word);
      found[count] = static_cast<uint16_t>(position + k);
      values[count] = a[k];
    }
  }
  return count;
}

// The entries of a chunk: positions in the chunk, and values.
template <typename T>
struct Piece {
  std::unique_ptr<uint16_t[]> positions;
  std::unique_ptr<T[]> values;
};

template <typename T>
struct Diff {
  std::vector<const T*> mine, theirs;
  std::vector<int64_t> starts;   // [tensors + 1]
  std::vector<Piece<T>> pieces;  // [chunks]
  std::vector<int64_t> before;   // [chunks + 1]: the entries of earlier chunks

  int64_t chunks() const { return static_cast<int64_t>(pieces.size()); }

  // offsets [tensors + 1]: for a tensor with elements, the entries before it in the chunk that it begins in.
  void find(int64_t chunk, uint16_t* positions, T* values, int64_t* offsets) {
    const int64_t first = chunk * kChunk;
    int64_t count = 0;
    for_each_part(starts, first, std::min(first + kChunk, starts.back()), [&](size_t i, int64_t begin, int64_t end) {
      if (begin == 0) offsets[i] = count;
      count += find_differences(mine[i] + begin, theirs[i] + begin, end - begin, starts[i] + begin - first,
                                positions + count, values + count);
    });
    before[chunk + 1] = count;
    if (count == 0) return;
    pieces[chunk] = {std::unique_ptr<uint16_t[]>(new uint16_t[count]), std::unique_ptr<T[]>(new T[count])};
    std::copy_n(positions, count, pieces[chunk].positions.get());
    std::copy_n(values, count, pieces[chunk].values.get());
  }

  // Returns the number of entries.
  int64_t find_all(int64_t* offsets) {
    before.assign(pieces.size() + 1, 0);
    torch::stable::parallel_for(0, chunks(), 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<uint16_t[]> positions(new uint16_t[kChunk]);
      const std::unique_ptr<T[]> values(new T[kChunk]);
      for (int64_t c = begin; c < end; ++c) find(c, positions.get(), values.get(), offsets);
    });
    add_up(before, starts, offsets);
    return before.back();
  }

  template <typename Index>
  void write(const int64_t* offsets, Index* indices, T* values) {
    torch::stable::parallel_for(0, chunks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t first = before[c];
        const uint16_t* positions = pieces[c].positions.get();
        for_each_row(offsets, static_cast<int64_t>(mine.size()), first, before[c + 1],
                     [&](int64_t tensor, int64_t i, int64_t stop) {
                       const int64_t shift = c * kChunk - starts[tensor];
                       for (; i < stop; ++i) indices[i] = static_cast<Index>(shift + positions[i - first]);
                     });
        std::copy_n(pieces[c].values.get(), before[c + 1] - first, values + first);
        pieces[c] = {};
      }
    });
  }
};

std::tuple<Tensor, Tensor, Tensor> bit_diff(std::vector<Tensor> mine, std::vector<Tensor> theirs) {
  check_pairs(mine, theirs, Device::kCpu);
  DEFTX_CHECK(!mine.empty(), "new must hold at least one tensor");
  const int64_t n = static_cast<int64_t>(mine.size());
  Tensor offsets = torch::stable::new_empty(mine[0], {n + 1}, ScalarType::Long), indices, values;
  auto* offset = static_cast<int64_t*>(offsets.mutable_data_ptr());
  const bool wide = std::any_of(mine.begin(), mine.end(), [](const Tensor& t) { return t.numel() > INT32_MAX; });
  with_size(mine[0], "new", [&](auto zero) {
    using T = decltype(zero);
    Diff<T> diff{data_of<T>(mine), data_of<T>(theirs), starts_of(mine, 1, 1), {}, {}};
    diff.pieces.resize((diff.starts.back() + kChunk - 1) / kChunk);
    const int64_t nnz = diff.find_all(offset);
    values = torch::stable::new_empty(mine[0], {nnz});
    indices = torch::stable::new_empty(mine[0], {nnz}, wide ? ScalarType::Long : ScalarType::Int);
    void* index = indices.mutable_data_ptr();
    auto* value = static_cast<T*>(values.mutable_data_ptr());
    wide ? diff.write(offset, static_cast<int64_t*>(index), value)
         : diff.write(offset, static_cast<int32_t*>(index), value);
  });
  return {offsets, indices, values};
}

// ---- flat_exchange_ ----

// Throws unless offsets ascend from 0 to nnz and the indices of each tensor ascend strictly and stay inside it: two
// threads must not meet in one element.
template <typename Index>
void check_contents(const FlatEntries& entries, const std::vector<Tensor>& tensors, const Index* index) {
  check_crow(entries.offsets, entries.tensors, entries.nnz, "offsets");
  std::vector<int64_t> numel;
  numel.reserve(tensors.size());
  for (const Tensor& t : tensors) numel.push_back(t.numel());
  std::atomic<int64_t> bad{-1};
  torch::stable::parallel_for(0, entries.nnz, kGrain, [&](int64_t begin, int64_t end) {
    for_each_row(entries.offsets, entries.tensors, begin, end, [&](int64_t tensor, int64_t i, int64_t stop) {
      const int64_t from = std::max(i, entries.offsets[tensor] + 1);
      if (index[i] < 0 || index[stop - 1] >= numel[tensor] || count_descents(index + from, stop - from, true))
        bad = tensor;
    });
  });
  DEFTX_CHECK(bad < 0, "the indices of ", numbered("tensors", bad), " must ascend strictly from 0 to at most ",
              numel[bad] - 1);
}

void flat_exchange_(std::vector<Tensor> tensors, Tensor offsets, Tensor indices, Tensor values) {
  const FlatEntries entries = check_exchange(tensors, offsets, indices, values, Device::kCpu);
  with_types(entries, values, "values", [&](const auto* index, auto zero) {
    using T = decltype(zero);
    check_contents(entries, tensors, index);
    std::vector<T*> data;
    data.reserve(tensors.size());
    for (const Tensor& t : tensors) data.push_back(static_cast<T*>(t.mutable_data_ptr()));
    auto* const given = static_cast<T*>(values.mutable_data_ptr());
    torch::stable::parallel_for(0, entries.nnz, kGrain, [&](int64_t begin, int64_t end) {
      for_each_row(entries.offsets, entries.tensors, begin, end, [&](int64_t tensor, int64_t i, int64_t stop) {
        T* const flat = data[tensor];
        for (; i < stop; ++i) std::swap(flat[index[i]], given[i]);
      });
    });
  });
}

// ---- checksums ----

using Sums = std::vector<std::atomic<uint64_t>>;  // [tensors]

Tensor as_tensor(const Sums& sums, const Tensor& like) {
  Tensor out = torch::stable::new_empty(like, {static_cast<int64_t>(sums.size())}, ScalarType::Long);
  auto* data = static_cast<uint64_t*>(out.mutable_data_ptr());
  for (size_t i = 0; i < sums.size(); ++i) data[i] = sums[i];
  return out;
}

// The sum of n words, the first at this position; none of the others is a multiple of 2**32.
DEFTX_CLONES uint64_t sum_words(const char* bytes, int64_t n, uint32_t position) {
  uint64_t sum = 0;
  for (int64_t k = 0; k < n; ++k, position += kWordStep) {
    uint32_t word;
    std::memcpy(&word, bytes + 4 * k, 4);
    sum += uint64_t{key_of(position)} * word;
  }
  return sum;
}

// The sum of a tensor's words [begin, end). bytes: of the whole tensor; what the last word lacks is 0.
uint64_t sum_part(const char* data, int64_t bytes, int64_t begin, int64_t end) {
  uint64_t sum = 0;
  const int64_t whole = std::min(end, bytes / 4);
  while (begin < whole) {
    const int64_t next = std::min(whole, (begin >> 32 << 32) + (int64_t{1} << 32));
    sum += sum_words(data + 4 * begin, next - begin, position_of(begin));
    begin = next;
  }
  if (begin < end) {
    uint32_t word = 0;
    std::memcpy(&word, data + 4 * begin, bytes - 4 * begin);
    sum += uint64_t{key_of(position_of(begin))} * word;
  }
  return sum;
}

Tensor bit_checksum(std::vector<Tensor> tensors) {
  check_list(tensors, Device::kCpu, "tensors");
  DEFTX_CHECK(!tensors.empty(), "tensors must hold at least one tensor");
  with_size(tensors[0], "tensors", [](auto) {});
  const int64_t size = tensors[0].element_size();
  const std::vector<const char*> data = data_of<char>(tensors);
  const std::vector<int64_t> starts = starts_of(tensors, size, 4);
  Sums sums(tensors.size());
  torch::stable::parallel_for(0, starts.back(), kChunk, [&](int64_t first, int64_t last) {
    for_each_part(starts, first, last, [&](size_t i, int64_t begin, int64_t end) {
      sums[i] += sum_part(data[i], tensors[i].numel() * size, begin, end);
    });
  });
  return as_tensor(sums, tensors[0]);
}

template <typename Index, typename T>
DEFTX_CLONES uint64_t sum_changes(const Index* index, const T* mine, const T* theirs, int64_t n) {
  uint64_t sum = 0;
  for (int64_t k = 0; k < n; ++k) sum += term_of<T>(index[k], mine[k]) - term_of<T>(index[k], theirs[k]);
  return sum;
}

Tensor bit_checksum_change(Tensor offsets, Tensor indices, Tensor before, Tensor after) {
  const FlatEntries entries = check_change(offsets, indices, before, after, Device::kCpu);
  check_crow(entries.offsets, entries.tensors, entries.nnz, "offsets");
  Sums sums(entries.tensors);
  with_types(entries, before, "old", [&](const auto* index, auto zero) {
    using T = decltype(zero);
    const auto* mine = static_cast<const T*>(after.const_data_ptr());
    const auto* theirs = static_cast<const T*>(before.const_data_ptr());
    torch::stable::parallel_for(0, entries.nnz, kGrain, [&](int64_t begin, int64_t end) {
      for_each_row(entries.offsets, entries.tensors, begin, end, [&](int64_t tensor, int64_t i, int64_t stop) {
        sums[tensor] += sum_changes(index + i, mine + i, theirs + i, stop - i);
      });
    });
  });
  return as_tensor(sums, offsets);
}

// ---- set_bits ----

// Calls visit(word, number of its first bit) for the words that hold bits [begin, end), without their other bits.
template <typename Visit>
void for_each_word(const uint32_t* words, int64_t begin, int64_t end, const Visit& visit) {
  const auto part = [&](int64_t first) { visit(bits_within(words[first / 32], first, begin, end), first); };
  int64_t first = begin / 32 * 32;
  if (first < begin) {
    part(first);
    first += 32;
  }
  for (; first + 32 <= end; first += 32) visit(words[first / 32], first);
  if (first < end) part(first);
}

DEFTX_CLONES int64_t count_words(const uint32_t* words, int64_t n) {
  int64_t count = 0;
  for (int64_t w = 0; w < n; ++w) count += bitmask::count_bits(words[w]);
  return count;
}

// The number of ones among bits [begin, end).
int64_t count_ones(const uint32_t* words, int64_t begin, int64_t end) {
  const auto part = [&](int64_t w) { return bitmask::count_bits(bits_within(words[w], 32 * w, begin, end)); };
  const int64_t first = (begin + 31) / 32, last = end / 32;  // whole words
  if (first > last) return part(last);
  return count_words(words + first, last - first) + (begin < 32 * first ? part(first - 1) : 0) +
         (32 * last < end ? part(last) : 0);
}

// Calls visit(chunk, part, begin, end) for the parts of each chunk, with numbers of bits, in threads.
template <typename Visit>
void for_each_bits(const std::vector<int64_t>& starts, int64_t shift, int64_t chunks, const Visit& visit) {
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
    for (int64_t c = from; c < to; ++c)
      for_each_part(starts, c * kChunk, std::min((c + 1) * kChunk, starts.back()),
                    [&](size_t i, int64_t begin, int64_t end) {
                      visit(c, i, shift + starts[i] + begin, shift + starts[i] + end);
                    });
  });
}

std::tuple<Tensor, Tensor> set_bits(Tensor words, Tensor starts) {
  const Marks marks = check_marks(words, starts, Device::kCpu);
  const int64_t shift = marks.starts[0], bits = 32 * marks.count;
  std::vector<int64_t> relative(marks.starts, marks.starts + marks.parts + 1);
  DEFTX_CHECK(shift >= 0 && relative.back() <= bits && std::is_sorted(relative.begin(), relative.end()),
              "starts must ascend from at least 0 to at most ", bits, ", the bits of words");
  for (int64_t& start : relative) start -= shift;
  Tensor offsets = torch::stable::new_empty(words, {marks.parts + 1}, ScalarType::Long);
  auto* offset = static_cast<int64_t*>(offsets.mutable_data_ptr());
  const int64_t chunks = (relative.back() + kChunk - 1) / kChunk;
  std::vector<int64_t> before(chunks + 1);
  for_each_bits(relative, shift, chunks, [&](int64_t chunk, size_t part, int64_t begin, int64_t end) {
    if (begin == marks.starts[part]) offset[part] = before[chunk + 1];
    before[chunk + 1] += count_ones(marks.words, begin, end);
  });
  add_up(before, relative, offset);
  Tensor indices = torch::stable::new_empty(words, {before.back()}, marks.wide ? ScalarType::Long : ScalarType::Int);
  const auto write = [&](auto* index) {
    using Index = std::remove_pointer_t<decltype(index)>;
    std::vector<int64_t> at(before.begin(), before.end() - 1);  // [chunks]
    for_each_bits(relative, shift, chunks, [&](int64_t chunk, size_t part, int64_t begin, int64_t end) {
      Index* out = index + at[chunk];
      for_each_word(marks.words, begin, end, [&](uint32_t word, int64_t first) {
        const auto number = static_cast<Index>(first - marks.starts[part]);
        for (; word != 0; word &= word - 1) *out++ = static_cast<Index>(number + lowest_bit(word));
      });
      at[chunk] = out - index;
    });
  };
  void* index = indices.mutable_data_ptr();
  marks.wide ? write(static_cast<int64_t*>(index)) : write(static_cast<int32_t*>(index));
  return {offsets, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deftx, CPU, m) {
  m.impl("bit_diff", TORCH_BOX(&bit_diff));
  m.impl("flat_exchange_", TORCH_BOX(&flat_exchange_));
  m.impl("bit_checksum", TORCH_BOX(&bit_checksum));
  m.impl("bit_checksum_change", TORCH_BOX(&bit_checksum_change));
  m.impl("set_bits", TORCH_BOX(&set_bits));
}

}  // namespace deftx
