// Shared by csrc/cpu/bits.cpp and csrc/cuda/bits.cu: the keys of a checksum's words, and the arguments of the operators
// on bits.
#pragma once

#include "stable.h"

#ifdef __CUDACC__
#define DEFTX_EVERYWHERE __host__ __device__
#else
#define DEFTX_EVERYWHERE
#endif

namespace deftx {

// ---- keys: word_key of deftx_kernels/ops/reference_bits.py, where the choice is explained ----

constexpr uint32_t kWordStep = 0x9E3779B1u, kHighStep = 0xC2B2AE3Du, kMix = 0x85EBCA77u;

// What is mixed for a word: kWordStep more for each next one, up to the next multiple of 2**32.
DEFTX_EVERYWHERE inline uint32_t position_of(int64_t word) {
  return static_cast<uint32_t>(word) * kWordStep + static_cast<uint32_t>(word >> 32) * kHighStep;
}

DEFTX_EVERYWHERE inline uint32_t key_of(uint32_t position) {
  const uint32_t x = (position ^ position >> 15) * kMix;
  return (x ^ x >> 13) | 1u;
}

// What an element with these bits adds to a checksum.
template <typename T>
DEFTX_EVERYWHERE inline uint64_t term_of(int64_t index, T bits) {
  if constexpr (sizeof(T) == 8) {
    const uint64_t low = static_cast<uint32_t>(bits), high = bits >> 32;
    return key_of(position_of(2 * index)) * low + key_of(position_of(2 * index + 1)) * high;
  } else {
    constexpr int kShift = sizeof(T) == 4 ? 0 : sizeof(T) == 2 ? 1 : 2;  // log2 of the elements of a word
    const int at = static_cast<int>(index & ((1 << kShift) - 1));
    return uint64_t{key_of(position_of(index >> kShift))} * (static_cast<uint32_t>(bits) << at * 8 * sizeof(T));
  }
}

// ---- arguments ----

// Calls f(T{}) for the unsigned integer of the elements' size.
template <typename F>
void with_size(const Tensor& t, const char* name, const F& f) {
  switch (t.element_size()) {
    case 1:
      return f(uint8_t{});
    case 2:
      return f(uint16_t{});
    case 4:
      return f(uint32_t{});
    case 8:
      return f(uint64_t{});
    default:
      DEFTX_CHECK(false, name, " must have elements of 1, 2, 4 or 8 bytes, got ", t.element_size());
  }
}

inline void check_alike(const Tensor& t, const Tensor& other, Device device, const std::string& name,
                        const char* other_name) {
  check_tensor(t, device, name.c_str());
  DEFTX_CHECK(t.get_device_index() == other.get_device_index(), name, " is on another device than ", other_name);
  DEFTX_CHECK(dtype_of(t) == dtype_of(other), name, " must have the dtype of ", other_name);
}

inline std::string numbered(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

inline void check_list(const std::vector<Tensor>& tensors, Device device, const char* name) {
  const std::string first = numbered(name, 0);
  for (size_t i = 0; i < tensors.size(); ++i)
    check_alike(tensors[i], tensors[0], device, numbered(name, i), first.c_str());
}

inline void check_pairs(const std::vector<Tensor>& mine, const std::vector<Tensor>& theirs, Device device) {
  DEFTX_CHECK(mine.size() == theirs.size(), "new and old must have one tensor for each other, got ", mine.size(),
              " and ", theirs.size());
  check_list(mine, device, "new");
  for (size_t i = 0; i < mine.size(); ++i) {
    check_alike(theirs[i], mine[0], device, numbered("old", i), "new[0]");
    bool same = mine[i].dim() == theirs[i].dim();
    for (int64_t d = 0; same && d < mine[i].dim(); ++d) same = mine[i].size(d) == theirs[i].size(d);
    DEFTX_CHECK(same, numbered("old", i), " must have the shape of ", numbered("new", i));
  }
}

// Entries of several tensors, by flat indices.
struct FlatEntries {
  const int64_t* offsets;  // [tensors + 1]
  const void* indices;     // [nnz] int32_t, or int64_t where `wide`
  bool wide;
  int64_t tensors, nnz;
};

inline FlatEntries check_flat_entries(const Tensor& offsets, const Tensor& indices, Device device) {
  check_tensor(offsets, device, "offsets");
  check_tensor(indices, device, "indices");
  DEFTX_CHECK(dtype_of(offsets) == aoti_torch_dtype_int64(), "offsets must be int64");
  const bool wide = dtype_of(indices) == aoti_torch_dtype_int64();
  DEFTX_CHECK(wide || dtype_of(indices) == aoti_torch_dtype_int32(), "indices must be int32 or int64");
  DEFTX_CHECK(offsets.dim() == 1 && offsets.numel() > 0, "offsets must have shape [n + 1]");
  DEFTX_CHECK(indices.dim() == 1, "indices must have shape [nnz]");
  DEFTX_CHECK(offsets.get_device_index() == indices.get_device_index(), "offsets is on another device than indices");
  DEFTX_CHECK(offsets.numel() > 1 || indices.numel() == 0, "offsets are of no tensors, but indices has ",
              indices.numel(), " elements");
  return {static_cast<const int64_t*>(offsets.const_data_ptr()), indices.const_data_ptr(), wide, offsets.numel() - 1,
          indices.numel()};
}

inline void check_values(const Tensor& values, const Tensor& indices, Device device, const char* name) {
  check_tensor(values, device, name);
  DEFTX_CHECK(values.get_device_index() == indices.get_device_index(), name, " is on another device than indices");
  DEFTX_CHECK(values.dim() == 1 && values.numel() == indices.numel(), name, " must have shape [nnz] = [",
              indices.numel(), "]");
}

inline FlatEntries check_exchange(const std::vector<Tensor>& tensors, const Tensor& offsets, const Tensor& indices,
                                  const Tensor& values, Device device) {
  const FlatEntries entries = check_flat_entries(offsets, indices, device);
  const int64_t count = static_cast<int64_t>(tensors.size());
  DEFTX_CHECK(entries.tensors == count, "offsets has ", entries.tensors + 1, " elements; ", count, " tensors need ",
              count + 1);
  check_values(values, indices, device, "values");
  for (size_t i = 0; i < tensors.size(); ++i) check_alike(tensors[i], values, device, numbered("tensors", i), "values");
  std::vector<Tensor> written = tensors;
  written.push_back(values);
  check_apart(written, "tensors and values");
  return entries;
}

inline FlatEntries check_change(const Tensor& offsets, const Tensor& indices, const Tensor& old_values,
                                const Tensor& new_values, Device device) {
  const FlatEntries entries = check_flat_entries(offsets, indices, device);
  check_values(old_values, indices, device, "old");
  check_values(new_values, indices, device, "new");
  check_alike(new_values, old_values, device, "new", "old");
  return entries;
}

// The bits of int32 words, in parts.
struct Marks {
  const uint32_t* words;
  const int64_t* starts;  // [parts + 1]
  int64_t count, parts;   // count: of words
  bool wide;              // their numbers need 64 bits
};

inline Marks check_marks(const Tensor& words, const Tensor& starts, Device device) {
  check_tensor(words, device, "words");
  check_tensor(starts, device, "starts");
  DEFTX_CHECK(dtype_of(words) == aoti_torch_dtype_int32(), "words must be int32");
  DEFTX_CHECK(dtype_of(starts) == aoti_torch_dtype_int64(), "starts must be int64");
  DEFTX_CHECK(words.dim() == 1 && starts.dim() == 1 && starts.numel() > 0,
              "words must have shape [w] and starts [n + 1]");
  DEFTX_CHECK(words.get_device_index() == starts.get_device_index(), "words is on another device than starts");
  return {static_cast<const uint32_t*>(words.const_data_ptr()), static_cast<const int64_t*>(starts.const_data_ptr()),
          words.numel(), starts.numel() - 1, 32 * words.numel() > INT32_MAX};
}

// A word, the first of whose bits has this number, without its bits outside [begin, end).
DEFTX_EVERYWHERE inline uint32_t bits_within(uint32_t word, int64_t first, int64_t begin, int64_t end) {
  if (first + 32 <= begin || first >= end) return 0;
  if (first < begin) word &= ~0u << (begin - first);
  if (first + 32 > end) word &= ~0u >> (first + 32 - end);
  return word;
}

// Calls f(index, T{}) for the types of the entries' indices and of their values.
template <typename F>
void with_types(const FlatEntries& entries, const Tensor& values, const char* name, const F& f) {
  with_size(values, name, [&](auto zero) {
    entries.wide ? f(static_cast<const int64_t*>(entries.indices), zero)
                 : f(static_cast<const int32_t*>(entries.indices), zero);
  });
}

}  // namespace deftx
