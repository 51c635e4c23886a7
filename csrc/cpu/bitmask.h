// A mask under construction on the CPU: one bit per element, each part (a tensor, or a long row) beginning at a word of
// its own, cut into chunks of equal length that threads work on. `to_csr` makes crow_indices and col_indices of it.
#pragma once

#include <cstring>
#include <memory>
#include <utility>

#include "../stable.h"

namespace deftx {
namespace bitmask {

constexpr int64_t kWord = 64;
constexpr int64_t kChunk = 1 << 16;  // elements; 256 KB of float32, which fit into a core's L2

inline int count_bits(uint64_t word) {
#if defined(__GNUC__)
  return __builtin_popcountll(word);
#else
  word -= (word >> 1) & 0x5555555555555555u;
  word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
  return static_cast<int>((((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u) >> 56);
#endif
}

inline int lowest_bit(uint64_t word) {  // of a word that is not 0
#if defined(__GNUC__)
  return __builtin_ctzll(word);
#else
  return count_bits((word & (~word + 1)) - 1);
#endif
}

// Bit j: flags[j], of kWord flags that are 0 or 1.
inline uint64_t word_of(const uint8_t* flags) {
  uint64_t word = 0;
  for (int b = 0; b < 8; ++b) {
    uint64_t eight;
    std::memcpy(&eight, flags + 8 * b, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    eight = __builtin_bswap64(eight);
#endif
    word |= ((eight * 0x0102040810204080u) >> 56) << (8 * b);
  }
  return word;
}

struct Part {                     // one tensor, or one row of a tensor of long rows
  int64_t tensor, first_element;  // of that tensor
  int64_t rows, columns, first_row, first_word;

  int64_t numel() const { return rows * columns; }
};

struct Chunk {
  int64_t part, begin, end;  // elements [begin, end) of the part; begin is a multiple of kWord
};

struct Layout {
  std::vector<Part> parts;
  std::vector<Chunk> chunks;         // in the order of the elements
  std::vector<int64_t> first_chunk;  // [parts + 1]
  int64_t rows = 0, words = 0, numel = 0;
  bool wide = false;  // columns need 32 bits

  int64_t first_word(const Chunk& c) const { return parts[c.part].first_word + c.begin / kWord; }
  static int64_t words_of(const Chunk& c) { return (c.end - c.begin + kWord - 1) / kWord; }
};

// Each tensor is a part, but of a tensor whose rows are longer than `longest_row` each row is one.
inline Layout layout_of(const std::vector<Tensor>& tensors, int64_t longest_row = INT64_MAX) {
  Layout layout;
  layout.parts.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    check_tensor(t, Device::kCpu, "every tensor");
    const int64_t rows = rows_of(t), columns = columns_of(t);
    DEFTX_CHECK(columns <= INT32_MAX, "a tensor has more than 2**31 - 1 columns");
    const int64_t end_row = add_rows(layout.rows, rows);
    const bool by_row = columns > longest_row;
    for (int64_t p = 0; p < (by_row ? rows : 1); ++p) {
      const Part part{static_cast<int64_t>(i), p * columns, by_row ? 1 : rows, columns, layout.rows + p, layout.words};
      layout.parts.push_back(part);
      layout.words += (part.numel() + kWord - 1) / kWord;
    }
    layout.rows = end_row;
    layout.numel += rows * columns;
    layout.wide |= columns > 65536;
  }
  const auto chunks_of = [](const Part& part) { return (part.numel() + kChunk - 1) / kChunk; };
  layout.first_chunk.reserve(layout.parts.size() + 1);
  layout.first_chunk.push_back(0);
  for (const Part& part : layout.parts) layout.first_chunk.push_back(layout.first_chunk.back() + chunks_of(part));
  layout.chunks.reserve(layout.first_chunk.back());
  for (size_t p = 0; p < layout.parts.size(); ++p)
    for (int64_t begin = 0, numel = layout.parts[p].numel(); begin < numel; begin += kChunk)
      layout.chunks.push_back({static_cast<int64_t>(p), begin, std::min(begin + kChunk, numel)});
  return layout;
}

inline std::unique_ptr<uint64_t[]> new_bits(const Layout& layout) {  // not initialised
  return std::unique_ptr<uint64_t[]>(new uint64_t[layout.words]);
}

// Calls work(chunk) for every chunk, in any order and on any thread.
template <typename Work>
void for_each_chunk(int64_t first, int64_t last, const Work& work) {
  torch::stable::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) work(c);
  });
}

// The bits [begin, end) of a word.
inline uint64_t between(int64_t begin, int64_t end) {
  return (~uint64_t{0} << begin) & (~uint64_t{0} >> (kWord - end));
}

// Writes column + j for every bit j, from `offset`; returns where the next one belongs. Four at once while they stay
// before `end`: what is too many is overwritten by the next call, and no branch depends on the number of bits.
template <typename Column>
int64_t write_columns(uint64_t word, int64_t column, int64_t offset, int64_t end, Column* col) {
  const int64_t next = offset + count_bits(word);
  constexpr uint64_t kHighest = uint64_t{1} << (kWord - 1);
  while (word != 0 && offset + 4 <= end) {
    for (int64_t i = 0; i < 4; ++i, word &= word - 1)
      col[offset + i] = static_cast<Column>(column + lowest_bit(word | kHighest));
    offset += 4;
  }
  for (; word != 0; word &= word - 1) col[offset++] = static_cast<Column>(column + lowest_bit(word));
  return next;
}

// Writes the columns of a chunk's entries, which are [offset, end), and where each row that begins in it has its first
// one.
template <typename Column>
void emit(const Part& part, const Chunk& chunk, const uint64_t* bits, int64_t offset, int64_t end, int64_t* crow,
          Column* col) {
  int64_t row = chunk.begin / part.columns, row_begin = row * part.columns;
  for (int64_t at = chunk.begin; at < chunk.end; ++row, row_begin += part.columns) {
    if (row_begin == at) crow[part.first_row + row] = offset;
    const int64_t row_end = std::min(row_begin + part.columns, chunk.end);
    while (at < row_end) {
      const int64_t first = at / kWord * kWord, stop = std::min(first + kWord, row_end);
      const uint64_t word = bits[(first - chunk.begin) / kWord] & between(at - first, stop - first);
      offset = write_columns(word, first - row_begin, offset, end, col);
      at = stop;
    }
  }
}

// (crow_indices, col_indices) of the mask. `counts` [chunks]: the bits that are set in each chunk.
inline std::pair<Tensor, Tensor> to_csr(const Layout& layout, const uint64_t* bits, const std::vector<int64_t>& counts,
                                        const Tensor& like) {
  std::vector<int64_t> offsets(counts.size() + 1, 0);
  for (size_t c = 0; c < counts.size(); ++c) offsets[c + 1] = offsets[c] + counts[c];
  const int64_t nnz = offsets.back();
  using torch::headeronly::ScalarType;
  Tensor crow = torch::stable::new_empty(like, {layout.rows + 1}, ScalarType::Long);
  Tensor col = torch::stable::new_empty(like, {nnz}, layout.wide ? ScalarType::Int : ScalarType::UInt16);
  auto* rows = static_cast<int64_t*>(crow.mutable_data_ptr());
  void* columns = col.mutable_data_ptr();
  for (size_t p = 0; p < layout.parts.size(); ++p)  // rows without columns lie in no chunk
    if (layout.parts[p].columns == 0)
      std::fill_n(rows + layout.parts[p].first_row, layout.parts[p].rows, offsets[layout.first_chunk[p]]);
  rows[layout.rows] = nnz;
  for_each_chunk(0, static_cast<int64_t>(counts.size()), [&](int64_t c) {
    const Chunk& chunk = layout.chunks[c];
    const Part& part = layout.parts[chunk.part];
    const uint64_t* words = bits + layout.first_word(chunk);
    layout.wide ? emit(part, chunk, words, offsets[c], offsets[c + 1], rows, static_cast<int32_t*>(columns))
                : emit(part, chunk, words, offsets[c], offsets[c + 1], rows, static_cast<uint16_t*>(columns));
  });
  return {crow, col};
}

}  // namespace bitmask
}  // namespace deftx
