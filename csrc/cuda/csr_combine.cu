// csr_combine on the GPU: every entry of one mask is looked up in the other's row, by binary search.
//
// What the look-ups find is kept as one bit an entry and, for each 32 of them, the number of ones before: `rank`, the
// number of ones before any entry, then takes two reads. "and", "sub": the ones are the entries of the first mask that
// stay, and rank is where each goes. "or": the ones are the second mask's entries that the first has not; an entry of
// the first mask moves up by those before it. The host waits once, for the size of the result.
#include "entries.cuh"
#include "scan.cuh"

namespace deftx {
namespace {

// One bit for each of a mask's entries.
struct Bits {
  uint32_t* word;   // [words + 1], ends with a 0
  int64_t* before;  // [words + 1]: the ones in earlier words

  __device__ bool operator[](int64_t entry) const { return word[entry / 32] >> (entry % 32) & 1; }
  // The ones before an entry, or before the end.
  __device__ int64_t rank(int64_t entry) const {
    return before[entry / 32] + __popc(word[entry / 32] & ((1u << (entry % 32)) - 1));
  }
};

// Bit i: whether entry i of `mask` is (`wanted`) or is not in `other`. bits.before gets the ones of each word, for the
// scan.
template <typename Column>
__global__ void __launch_bounds__(kThreads)
    mark_kernel(const Mask<Column> mask, const Mask<Column> other, bool wanted, Bits bits) {
  for_each_entry(mask, [&](int64_t entry, int64_t row) {
    const bool one = row >= 0 && look_up(other, row, mask.col[entry]).found == wanted;
    const unsigned word = __ballot_sync(kFull, one);
    if (threadIdx.x % 32 == 0 && entry < mask.nnz) {
      bits.word[entry / 32] = word;
      bits.before[entry / 32] = __popc(word);
    }
  });
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    const int64_t words = (mask.nnz + 31) / 32;
    bits.word[words] = 0;
    bits.before[words] = 0;
  }
}

// "and", "sub": the marked entries of `mask`, one after the other.
template <typename Column>
__global__ void __launch_bounds__(kThreads)
    keep_kernel(const Mask<Column> mask, const Bits bits, Column* __restrict__ col_out) {
  const int64_t threads = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < mask.nnz; i += threads)
    if (bits[i]) col_out[bits.rank(i)] = mask.col[i];
}

// "or": the entries of `mask`, moved up by the marked ones of `other` before them.
template <typename Column>
__global__ void __launch_bounds__(kThreads) place_mine_kernel(const Mask<Column> mask, const Mask<Column> other,
                                                              const Bits bits, Column* __restrict__ col_out) {
  for_each_entry(mask, [&](int64_t entry, int64_t row) {
    if (row >= 0) col_out[entry + bits.rank(look_up(other, row, mask.col[entry]).at)] = mask.col[entry];
  });
}

// "or": the marked entries of `other`, moved up by the entries of `mask` before them.
template <typename Column>
__global__ void __launch_bounds__(kThreads) place_theirs_kernel(const Mask<Column> mask, const Mask<Column> other,
                                                                const Bits bits, Column* __restrict__ col_out) {
  for_each_entry(other, [&](int64_t entry, int64_t row) {
    if (row >= 0 && bits[entry]) col_out[bits.rank(entry) + look_up(mask, row, other.col[entry]).at] = other.col[entry];
  });
}

// `all`: the mask of which all entries stay, with crow_indices [rows + 1], or null. `marked`: the mask that the bits
// belong to.
__global__ void __launch_bounds__(kThreads)
    crow_kernel(const int64_t* __restrict__ all, int64_t all_nnz, const int64_t* __restrict__ marked,
                int64_t marked_nnz, int64_t rows, const Bits bits, int64_t* __restrict__ crow_out) {
  const int64_t threads = int64_t{gridDim.x} * kThreads;
  for (int64_t r = int64_t{blockIdx.x} * kThreads + threadIdx.x; r <= rows; r += threads)
    crow_out[r] = (all ? clamped(all[r], 0, all_nnz) : 0) + bits.rank(clamped(marked[r], 0, marked_nnz));
}

template <typename Column>
std::tuple<Tensor, Tensor> combine(const Csr& a, const Csr& b, const Tensor& crow_indices, const Tensor& col_indices,
                                   Operation operation) {
  const DeviceGuard guard(crow_indices.get_device_index());
  const cudaStream_t stream = current_stream(crow_indices);
  const bool all_mine = operation == Operation::kOr;
  const Mask<Column> mine{a.crow, static_cast<const Column*>(a.col), a.rows, a.nnz};
  const Mask<Column> theirs{b.crow, static_cast<const Column*>(b.col), b.rows, b.nnz};
  const Mask<Column>&marked = all_mine ? theirs : mine, &other = all_mine ? mine : theirs;

  const int64_t words = (marked.nnz + 31) / 32;
  Tensor before = torch::stable::new_empty(crow_indices, {words + 1});
  Tensor word = torch::stable::new_empty(crow_indices, {words + 1}, torch::headeronly::ScalarType::Int);
  const Bits bits{static_cast<uint32_t*>(word.mutable_data_ptr()), static_cast<int64_t*>(before.mutable_data_ptr())};
  mark_kernel<Column><<<blocks_for(mark_kernel<Column>, marked.nnz, kTile), kThreads, 0, stream>>>(
      marked, other, operation == Operation::kAnd, bits);
  DEFTX_LAUNCH_CHECK();
  const int64_t ones = scan(bits.before, words + 1, crow_indices, stream);

  Tensor crow_out = torch::stable::new_empty(crow_indices, {mine.rows + 1});
  Tensor col_out = torch::stable::new_empty(col_indices, {ones + (all_mine ? mine.nnz : 0)});
  auto* col = static_cast<Column*>(col_out.mutable_data_ptr());
  crow_kernel<<<blocks_for(crow_kernel, mine.rows + 1, kThreads), kThreads, 0, stream>>>(
      all_mine ? mine.crow : nullptr, mine.nnz, marked.crow, marked.nnz, mine.rows, bits,
      static_cast<int64_t*>(crow_out.mutable_data_ptr()));
  DEFTX_LAUNCH_CHECK();
  if (!all_mine) {
    keep_kernel<Column><<<blocks_for(keep_kernel<Column>, mine.nnz, kThreads), kThreads, 0, stream>>>(mine, bits, col);
  } else {
    place_mine_kernel<Column>
        <<<blocks_for(place_mine_kernel<Column>, mine.nnz, kTile), kThreads, 0, stream>>>(mine, theirs, bits, col);
    DEFTX_LAUNCH_CHECK();
    place_theirs_kernel<Column>
        <<<blocks_for(place_theirs_kernel<Column>, theirs.nnz, kTile), kThreads, 0, stream>>>(mine, theirs, bits, col);
  }
  DEFTX_LAUNCH_CHECK();
  return {crow_out, col_out};
}

std::tuple<Tensor, Tensor> csr_combine(Tensor crow_indices, Tensor col_indices, Tensor other_crow_indices,
                                       Tensor other_col_indices, int64_t operation) {
  const Operation which = operation_of(operation);
  const auto [mine, theirs] =
      check_combine(crow_indices, col_indices, other_crow_indices, other_col_indices, Device::kCuda);
  return mine.wide ? combine<int32_t>(mine, theirs, crow_indices, col_indices, which)
                   : combine<uint16_t>(mine, theirs, crow_indices, col_indices, which);
}

}  // namespace

DEFTX_CUDA_LIBRARY_IMPL(m) { m.impl("csr_combine", TORCH_BOX(&csr_combine)); }

}  // namespace deftx
