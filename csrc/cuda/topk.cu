// topk_mask, magnitude_histogram, threshold_mask and dense_to_csr on the GPU.
//
// topk_mask over all tensors, or over each (a "segment"), reads the scores once and waits for the device once:
//   1. sample: up to 2^18 scores of a segment (2^20 of one with more than 10^9), at random places, give a bracket of
//      two keys: six standard deviations of the rank on either side of the k-th largest. (A segment of up to 2^12
//      elements is its own sample: the bracket is exact.)
//   2. stream (stream.cuh): one pass. A score's bit is set where its key is not below the bracket; those inside are
//      listed, (key, place).
//   3. narrow: radix select over the list, by key, then by place. A launch a round; the last block of a segment picks
//      the digit, and blocks of a segment that is decided return at once. apply: clears the bits that were not chosen.
//   4. scan, emit (bitmask.cuh).
// Where the bracket does not hold the threshold, or more lies inside than the list has room for (many equal scores),
// the mask is made again from the exact threshold: the bracket's key if it is a single one, else found by radix select
// over all scores. Ties are then cut by position: counted in each tile, scanned, and cleared in the tiles that have too
// many.
// scope "row": a block to a row, radix select over the row, which stays in the cache.
//
// Steps 1 and 3 are in bracket.cuh, masks from exact thresholds in threshold.cuh, the keys of scores in scores.cuh, and
// comparisons with a bracket in classify.cuh. selection.cuh launches them.
//
// Results are the same in every run: atomics only add integers, or fill a list whose order does not matter.
// Workspace: N/8 + N/4096 * 4 bytes of mask and counts; a list for 0.016 N + 1024 candidates and half as many again as
// are expected (0.008 N at N = 2^28 and k = N/20), of 8 bytes and a key; samples and 32 KiB of counters for each of at
// most 256 segments. In all about 0.4 N bytes there with 32-bit keys. Exact thresholds add 4 bytes a tile. A tensor
// takes at least a tile (516 bytes) and about 350 bytes of tables; as a segment of its own also the 1024 candidates (12
// KB), or one for each of its elements if it has fewer.
#include <tuple>

#include "selection.cuh"

namespace deftx {
namespace {

constexpr int kHistogramBins = 1 << 16;  // of magnitude_histogram
constexpr int kSharedBins = 1 << 15;     // of them, those that a magnitude's first 16 bits can reach

// ---- magnitude_histogram, dense_to_csr ----

// Counts key >> low by its last 16 bits, of the keys whose key >> high is `prefix`. With shared counters, where at most
// kSharedBins can be reached; else a score in 2^16 takes part, as a rule, and the counters are added to where they are.
template <typename Key>
__global__ void __launch_bounds__(1024)
    histogram_kernel(const Bits bits, uint64_t prefix, int high, int low, bool shared,
                     Counter* counters) {  // [kHistogramBins]
  extern __shared__ unsigned histogram_bins[];
  constexpr int kGroups = KeyOf<Key>::kGroups;
  if (shared) clear_bins(histogram_bins, kSharedBins);
  const int warps = blockDim.x / 32;
  for (int64_t t = blockIdx.x * int64_t{warps} + threadIdx.x / 32; t < bits.tiles; t += gridDim.x * int64_t{warps}) {
    const Item item = bits.items[find_item<&Item::first_tile>(bits.items, bits.count, t)];
    const int64_t start = (t - item.first_tile) * kTile;
    for (int at = 0; at < kTile && start + at < item.numel; at += kGroups * 256) {
      const int64_t mine = start + at + threadIdx.x % 32 * 8;
      WordOf<Key> keys[kGroups][8];
      load_keys<Key, false>(keys, item, mine);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint64_t key = keys[g][j];
          if (mine + g * 256 + j >= item.numel || (high < 64 && key >> high != prefix)) continue;
          const int bin = static_cast<int>(key >> low) & (kHistogramBins - 1);
          shared ? atomicAdd(histogram_bins + bin, 1u) : static_cast<unsigned>(atomicAdd(counters + bin, Counter{1}));
        }
      }
    }
  }
  if (shared) add_bins(histogram_bins, counters, kSharedBins);
}

__global__ void __launch_bounds__(kThreads, 4) dense_kernel(const Bits bits) {
  const int lane = threadIdx.x % 32;
  for (int64_t tile = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32; tile < bits.tiles;
       tile += gridDim.x * int64_t{kWarps}) {
    const Item item = bits.items[find_item<&Item::first_tile>(bits.items, bits.count, tile)];
    const int64_t start = (tile - item.first_tile) * kTile + lane * 8;
    const uint8_t* from = static_cast<const uint8_t*>(item.a) + start;
    const bool aligned = reinterpret_cast<uintptr_t>(item.a) % 8 == 0;
    uint8_t* bytes = reinterpret_cast<uint8_t*>(bits.words + tile * kWords) + lane;
    unsigned count = 0;
#pragma unroll 4
    for (int at = 0; at < kTile; at += 256) {
      const int64_t left = item.numel - start - at;
      uint64_t eight = 0;
      if (aligned && left >= 8) {
        eight = __ldcs(reinterpret_cast<const unsigned long long*>(from + at));
      } else {
        for (int j = 0; j < 8 && j < left; ++j) eight |= static_cast<uint64_t>(from[at + j]) << 8 * j;
      }
      eight |= eight >> 4, eight |= eight >> 2, eight |= eight >> 1;  // bit 0 of a byte: whether the byte is not zero
      eight = (eight & 0x0101010101010101ull) * 0x0102040810204080ull >> 56;
      bytes[at / 8] = static_cast<uint8_t>(eight);
      count += __popcll(eight);
    }
    count = __reduce_add_sync(kFull, count);
    if (lane == 0) bits.counts[tile] = count;
  }
}

// ---- on the host ----

Keys keys_of(Layout& layout, const std::vector<Tensor>& scores, const std::vector<Tensor>& base, const char* op) {
  bool all_bfloat16 = base.empty(), all_float16 = base.empty(), any_float64 = false;
  int32_t type = type_of(scores[0], op);
  for (size_t i = 0; i < scores.size(); ++i) {
    Item& item = layout.items[i];
    item.a_type = type_of(scores[i], op);
    if (!base.empty()) {
      check_tensor(base[i], Device::kCuda, "every base tensor");
      DEFTX_CHECK(base[i].get_device_index() == scores[0].get_device_index(), "base ", i,
                  " is on another device than the scores");
      DEFTX_CHECK(base[i].numel() == item.numel, op, ": base ", i, " has ", base[i].numel(),
                  " elements; its scores have ", item.numel);
      item.b = base[i].const_data_ptr();
      item.b_type = type_of(base[i], op);
    }
    if (item.a_type != type || (!base.empty() && item.b_type != type)) type = kAnyType;
    all_bfloat16 = all_bfloat16 && item.a_type == kBFloat16;
    all_float16 = all_float16 && item.a_type == kFloat16;
    any_float64 = any_float64 || item.a_type == kFloat64 || (!base.empty() && item.b_type == kFloat64);
  }
  if (any_float64) return {8, 0x7FF0000000000000ull, type};
  if (all_bfloat16) return {2, 0x7F80, type};
  if (all_float16) return {2, 0x7C00, type};
  return {4, 0x7F800000, type};
}

// int64 [2] on the CPU, filled by LibTorch.
Tensor cpu_pair(int64_t first, int64_t second) {
  int64_t values[2] = {first, second};
  using torch::headeronly::DeviceType;
  const auto there = torch::stable::from_blob(values, {2}, {1}, torch::stable::Device(DeviceType::CPU),
                                              torch::headeronly::ScalarType::Long);
  return torch::stable::clone(there);
}

std::tuple<Tensor, Tensor, Tensor> topk_mask(std::vector<Tensor> scores, std::vector<Tensor> base,
                                             std::vector<int64_t> k, int64_t scope) {
  const Scope which = scope_of(scope);
  const bool global = which == Scope::kGlobal, row = which == Scope::kRow;
  Layout layout = layout_of(scores, "topk_mask");
  DEFTX_CHECK(base.empty() || base.size() == scores.size(),
              "topk_mask: base must be empty or have one tensor for each of scores");
  const Keys keys = keys_of(layout, scores, base, "topk_mask");
  DEFTX_CHECK(k.size() == (global ? 1 : scores.size()), "topk_mask: k has ", k.size(), " numbers");
  int64_t nnz = 0;
  for (size_t i = 0; i < k.size(); ++i) {
    Item& item = layout.items[i];
    const int64_t most = global ? layout.elements : row ? item.columns : item.numel;
    DEFTX_CHECK(k[i] >= 0 && k[i] <= most, "topk_mask: k must be in [0, ", most, "], got ", k[i]);
    nnz += row ? k[i] * item.rows : k[i];
    item.k = k[i];
  }
  const DeviceGuard guard(scores[0].get_device_index());
  const cudaStream_t stream = current_stream(scores[0]);
  const CsrOut out = new_csr(scores[0], layout, nnz);
  const Status status = with_key(keys.bytes, !base.empty(), [&](auto key, auto with_base) {
    // Rows are selected one by one: for them the segments are of no use.
    Selection<decltype(key), decltype(with_base)::value> selection(layout, row ? std::vector<int64_t>{0} : k,
                                                                   global || row, keys, scores[0], stream);
    row ? selection.rows() : selection.run();
    scan(selection.bits(), stream);
    emit(selection.bits(), out, layout.wide, stream);
    const Status status = selection.status();
    if (status.first_bad == ~0ull && status.redo) {
      selection.again(status.redo);
      scan(selection.bits(), stream);
      emit(selection.bits(), out, layout.wide, stream);
    }
    return status;
  });
  if (status.first_bad == ~0ull) return {out.crow, out.col, cpu_pair(-1, -1)};
  const int64_t tile = static_cast<int64_t>(status.first_bad / kTile);
  size_t i = layout.items.size() - 1;
  while (layout.items[i].first_tile > tile) --i;
  return {
      out.crow, out.col,
      cpu_pair(static_cast<int64_t>(i), static_cast<int64_t>(status.first_bad) - layout.items[i].first_tile * kTile)};
}

// The keys of a call whose scores all have one dtype.
Keys keys_of_one_dtype(Layout& layout, const std::vector<Tensor>& scores, const char* op) {
  for (size_t i = 1; i < scores.size(); ++i) {
    DEFTX_CHECK(dtype_of(scores[i]) == dtype_of(scores[0]), "tensor ", i, " has another dtype than tensor 0");
  }
  return keys_of(layout, scores, {}, op);
}

Tensor magnitude_histogram(std::vector<Tensor> scores, int64_t prefix, int64_t shift) {
  Layout layout = layout_of(scores, "magnitude_histogram");
  const Keys keys = keys_of_one_dtype(layout, scores, "magnitude_histogram");
  check_digit(prefix, shift, keys.bytes);
  const DeviceGuard guard(scores[0].get_device_index());
  const cudaStream_t stream = current_stream(scores[0]);
  const Tensor out = torch::stable::new_empty(scores[0], {kHistogramBins}, torch::headeronly::ScalarType::Long);
  Counter* counters = static_cast<Counter*>(const_cast<void*>(out.const_data_ptr()));
  DEFTX_CUDA_CHECK(cudaMemsetAsync(counters, 0, sizeof(Counter) * kHistogramBins, stream));
  Workspace work;
  const BitsPlan plan(work, layout);
  work.allocate(scores[0]);
  const Bits bits = plan.upload(work, layout, stream);
  const int low = static_cast<int>(shift), high = shift + 16 >= 8 * keys.bytes ? 64 : low + 16;
  int device = 0, most_shared = 0;
  DEFTX_CUDA_CHECK(cudaGetDevice(&device));
  DEFTX_CUDA_CHECK(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  constexpr int kShared = kSharedBins * sizeof(unsigned);
  const bool shared = high == 64 && most_shared >= kShared;
  with_key(keys.bytes, false, [&](auto key, auto) {
    const auto kernel = histogram_kernel<decltype(key)>;
    const int threads = shared ? 1024 : kThreads, bytes = shared ? kShared : 0;
    if (shared) DEFTX_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    const int64_t blocks = std::min(resident_blocks(kernel, threads, bytes), divided(bits.tiles, threads / 32));
    kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(bits, static_cast<uint64_t>(prefix), high, low,
                                                                      shared, counters);
    DEFTX_LAUNCH_CHECK();
  });
  return out;
}

std::tuple<Tensor, Tensor> threshold_mask(std::vector<Tensor> scores, int64_t threshold, std::vector<int64_t> ties) {
  Layout layout = layout_of(scores, "threshold_mask");
  const Keys keys = keys_of_one_dtype(layout, scores, "threshold_mask");
  check_ties(ties, scores);
  check_threshold(threshold, keys.bytes);
  std::vector<SegmentPlan> plans(scores.size());
  std::vector<SegmentState> states(scores.size());
  for (size_t i = 0; i < states.size(); ++i) {
    layout.items[i].segment = static_cast<int32_t>(i);
    plans[i].first_tile = layout.items[i].first_tile;
    states[i].from = static_cast<uint64_t>(threshold);
    states[i].above = states[i].from + 1;
    states[i].quota = ties[i];
  }
  const DeviceGuard guard(scores[0].get_device_index());
  const cudaStream_t stream = current_stream(scores[0]);
  Workspace work;
  const BitsPlan plan(work, layout);
  const int64_t plans_at = work.add(sizeof(SegmentPlan) * plans.size()),
                states_at = work.add(sizeof(SegmentState) * states.size());
  work.allocate(scores[0]);
  const Bits bits = plan.upload(work, layout, stream);
  upload(work.at<SegmentPlan>(plans_at), plans, stream);
  upload(work.at<SegmentState>(states_at), states, stream);
  with_key(keys.bytes, false, [&](auto key, auto) {
    mask_by_threshold<decltype(key), false>(bits, work.at<SegmentPlan>(plans_at), work.at<SegmentState>(states_at),
                                            scores[0], stream);
  });
  const CsrOut out = emit_counted(bits, layout, scores[0], stream);
  return {out.crow, out.col};
}

std::tuple<Tensor, Tensor> dense_to_csr(std::vector<Tensor> dense) {
  const Layout layout = layout_of(dense, "dense_to_csr");
  for (size_t i = 0; i < dense.size(); ++i) {
    DEFTX_CHECK(dtype_of(dense[i]) == aoti_torch_dtype_bool(), "dense_to_csr: tensor ", i, " must be bool");
  }
  const DeviceGuard guard(dense[0].get_device_index());
  const cudaStream_t stream = current_stream(dense[0]);
  Workspace work;
  const BitsPlan plan(work, layout);
  work.allocate(dense[0]);
  const Bits bits = plan.upload(work, layout, stream);
  dense_kernel<<<grid_of(dense_kernel, bits), kThreads, 0, stream>>>(bits);
  DEFTX_LAUNCH_CHECK();
  const CsrOut out = emit_counted(bits, layout, dense[0], stream);
  return {out.crow, out.col};
}

}  // namespace

DEFTX_CUDA_LIBRARY_IMPL(m) {
  m.impl("topk_mask", TORCH_BOX(&topk_mask));
  m.impl("magnitude_histogram", TORCH_BOX(&magnitude_histogram));
  m.impl("threshold_mask", TORCH_BOX(&threshold_mask));
  m.impl("dense_to_csr", TORCH_BOX(&dense_to_csr));
}

}  // namespace deftx
