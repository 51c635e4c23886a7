// The steps of topk_mask, launched from the host; with the kernel of scope "row".
#pragma once

#include <cmath>
#include <type_traits>

#include "threshold.cuh"

namespace deftx {
namespace {

// ---- scope "row" ----

// The bits of 32 neighbouring columns, by their warp, into a mask of zeros. Rows begin anywhere in a word.
__device__ void set_bits(uint32_t* words, int64_t bit, uint32_t set) {
  const int shift = static_cast<int>(bit % 32);
  const uint64_t both = static_cast<uint64_t>(set) << shift;
  const int lane = threadIdx.x % 32;
  const uint32_t mine = static_cast<uint32_t>(lane == 0 ? both : both >> 32);
  if (lane < 2 && mine) atomicOr(words + bit / 32 + lane, mine);
}

template <typename Key, bool kBase>
__global__ void __launch_bounds__(kThreads, 4) rows_kernel(const Bits bits, WordOf<Key> infinity, Status* status) {
  constexpr int kRowDigit = 8;
  __shared__ unsigned bins[1 << kRowDigit];
  __shared__ int64_t row_pick[3];  // digit, above, count
  __shared__ int tie_counts[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t row = blockIdx.x; row < bits.rows; row += gridDim.x) {
    const Item item = bits.items[find_item<&Item::first_row>(bits.items, bits.count, row)];
    const int64_t columns = item.columns, start = (row - item.first_row) * columns;
    const int64_t first_bit = item.first_tile * kTile + start;
    int64_t remaining = item.k;
    uint64_t prefix = 0;
    int high = KeyOf<Key>::kBits;
    bool all = remaining == columns;  // of those that are left
    bool first = true;
    while (first || (!all && remaining > 0 && high > 0)) {
      const int low = max(high - kRowDigit, 0);
      __syncthreads();
      bins[threadIdx.x] = 0;
      __syncthreads();
      for (int64_t c = threadIdx.x; c < columns; c += kThreads) {
        const WordOf<Key> key = load_key<Key, kBase>(item, start + c);
        if (first && key >= infinity) atomicMin(&status->first_bad, static_cast<unsigned long long>(first_bit + c));
        if (static_cast<uint64_t>(key) >> high == prefix) {
          atomicAdd(&bins[static_cast<int>(key >> low) & ((1 << (high - low)) - 1)], 1u);
        }
      }
      first = false;
      if (all || remaining == 0) break;
      __syncthreads();
      const int bin = (1 << kRowDigit) - 1 - static_cast<int>(threadIdx.x);
      const int64_t count = bins[bin];
      int64_t total;
      const int64_t above = block_exclusive(count, total);
      if (above < remaining && remaining <= above + count) row_pick[0] = bin, row_pick[1] = above, row_pick[2] = count;
      __syncthreads();
      prefix = prefix << (high - low) | static_cast<uint64_t>(row_pick[0]);
      remaining -= row_pick[1];
      all = row_pick[2] == remaining;
      high = low;
    }
    if (remaining == 0) continue;
    const bool whole = item.k == columns;
    int64_t ties = 0;  // so far
    for (int64_t at = 0; at < columns; at += kThreads) {
      const int64_t c = at + threadIdx.x;
      const uint64_t key = c < columns && !whole ? load_key<Key, kBase>(item, start + c) >> high : 0;
      const bool tie = c < columns && !whole && key == prefix;
      bool chosen = c < columns && (whole || key > prefix || (all && tie));
      if (!all) {
        const unsigned tied = __ballot_sync(kFull, tie);
        __syncthreads();
        if (lane == 0) tie_counts[warp] = __popc(tied);
        __syncthreads();
        int64_t rank = ties + __popc(tied & ((1u << lane) - 1));
        for (int w = 0; w < kWarps; ++w) {
          if (w < warp) rank += tie_counts[w];
          ties += tie_counts[w];
        }
        chosen = chosen || (tie && rank < remaining);
      }
      const unsigned set = __ballot_sync(kFull, chosen);
      if (set) set_bits(bits.words, first_bit + at + warp * 32, set);
    }
  }
}

// ---- on the host ----

// The keys' size for a call, the key of infinity, and the dtype of all tensors if they have one. Sets the tensors'
// types.
struct Keys {
  int bytes;
  uint64_t infinity;
  int32_t type;
};

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kTogether =
    256;  // segments that are sampled or narrowed at a time, with the same counters and room for samples

// The bracket's ranks in a sample of s out of n for the k-th largest, and how many candidates there may be.
void plan_segment(SegmentPlan& s) {
  if (s.k == 0 || s.k == s.elements) return;  // exact: no candidates
  const bool whole = s.elements <= kOwnSample;
  s.samples =
      whole ? s.elements : std::clamp(s.elements / 64, kOwnSample, s.elements > kLarge ? kManySamples : kSamples);
  const double share = static_cast<double>(s.k) / static_cast<double>(s.elements),
               samples = static_cast<double>(s.samples);
  const double slack = whole ? 0 : 6 * std::sqrt(samples * share * (1 - share)) + 8;
  s.rank[0] = whole ? s.k : static_cast<int64_t>(std::ceil(samples * share + slack));
  s.rank[1] = whole ? s.k : static_cast<int64_t>(std::floor(samples * share - slack));
  const double expected = 2 * slack / samples * static_cast<double>(s.elements);
  s.capacity = std::min(s.elements, static_cast<int64_t>(1.5 * expected) + s.elements / 64 + 1024);
}

struct Segments {
  std::vector<SegmentPlan> plans;
  std::vector<SegmentState> states;
};

Segments segments_of(Layout& layout, const std::vector<int64_t>& k, bool global, int bits) {
  const auto end = static_cast<int32_t>(layout.items.size());
  const int32_t count = global ? 1 : end;
  Segments segments{std::vector<SegmentPlan>(count), std::vector<SegmentState>(count)};
  for (int32_t i = 0; i < count; ++i) {
    SegmentPlan& s = segments.plans[i];
    s.k = k[i];
    s.first_item = global ? 0 : i, s.last_item = global ? end : i + 1;
    s.elements = global ? layout.elements : layout.items[i].numel;
    s.first_tile = layout.items[s.first_item].first_tile;
    s.last_tile = s.last_item < end ? layout.items[s.last_item].first_tile : layout.tiles;
    for (int32_t item = s.first_item; item < s.last_item; ++item) layout.items[item].segment = i;
    plan_segment(s);
    if (s.samples == 0 && s.k == 0) segments.states[i].from = segments.states[i].above = uint64_t{1} << bits;
    if (i > 0) {
      const SegmentPlan& before = segments.plans[i - 1];
      s.sample_at = i % kTogether == 0 ? 0 : before.sample_at + before.samples;
      s.list_at = before.list_at + before.capacity;
    }
  }
  return segments;
}

template <typename T>
void upload(T* to, const std::vector<T>& from, cudaStream_t stream) {
  DEFTX_CUDA_CHECK(cudaMemcpyAsync(to, from.data(), sizeof(T) * from.size(), cudaMemcpyHostToDevice, stream));
}

template <typename Key, bool kBase>
class Selection {
 public:
  Selection(Layout& layout, const std::vector<int64_t>& k, bool global, Keys keys, const Tensor& like,
            cudaStream_t stream)
      : like_(like), stream_(stream), infinity_(static_cast<WordOf<Key>>(keys.infinity)), type_(keys.type) {
    const Segments segments = segments_of(layout, k, global, KeyOf<Key>::kBits);
    count_ = static_cast<int>(segments.plans.size());
    together_ = std::min(count_, kTogether);
    int64_t samples = 0, listed = 0;
    for (const SegmentPlan& s : segments.plans) {
      most_samples_ = std::max(most_samples_, s.samples), most_listed_ = std::max(most_listed_, s.capacity);
      most_tiles_ = std::max(most_tiles_, s.last_tile - s.first_tile);
      samples = std::max(samples, s.sample_at + s.samples), listed += s.capacity;
    }
    const BitsPlan plan(work_, layout);
    const int64_t plans_at = work_.add(sizeof(SegmentPlan) * count_),
                  states_at = work_.add(sizeof(SegmentState) * count_), status_at = work_.add(sizeof(Status));
    const int64_t counters_at = work_.add(sizeof(Counter) * 2 * kBins * together_),
                  samples_at = work_.add(sizeof(Key) * samples);
    const int64_t keys_at = work_.add(sizeof(Key) * listed), places_at = work_.add(sizeof(uint64_t) * listed);
    work_.allocate(like);
    bits_ = plan.upload(work_, layout, stream);
    plans_ = work_.at<SegmentPlan>(plans_at), states_ = work_.at<SegmentState>(states_at);
    status_ = work_.at<Status>(status_at);
    counters_ = work_.at<Counter>(counters_at), samples_ = work_.at<Key>(samples_at);
    lists_ = {work_.at<Key>(keys_at), work_.at<uint64_t>(places_at)};
    upload(plans_, segments.plans, stream);
    upload(states_, segments.states, stream);
    upload(status_, {Status{~0ull, 0}}, stream);
    DEFTX_CUDA_CHECK(cudaMemsetAsync(counters_, 0, sizeof(Counter) * 2 * kBins * together_, stream));
  }

  const Bits& bits() const { return bits_; }

  void run() {
    if (most_samples_ > 0) for_each_batch([&](int first, int count) { sample(first, count); });
    type_ == kFloat32 ? stream<kFloat32>() : type_ == kBFloat16 ? stream<kBFloat16>() : stream<kAnyType>();
    if (most_samples_ > 0) for_each_batch([&](int first, int count) { narrow(first, count); });
  }

  void rows() {
    DEFTX_CUDA_CHECK(cudaMemsetAsync(bits_.words, 0, sizeof(uint32_t) * kWords * bits_.tiles, stream_));
    const int64_t blocks = std::min(bits_.rows, resident_blocks(rows_kernel<Key, kBase>, kThreads));
    if (blocks > 0) {
      rows_kernel<Key, kBase><<<static_cast<unsigned>(blocks), kThreads, 0, stream_>>>(bits_, infinity_, status_);
      DEFTX_LAUNCH_CHECK();
    }
    count_kernel<<<grid_of(count_kernel, bits_), kThreads, 0, stream_>>>(bits_);
    DEFTX_LAUNCH_CHECK();
  }

  // Waits for all that was launched.
  Status status() const {
    Status status{};
    DEFTX_CUDA_CHECK(cudaMemcpyAsync(&status, status_, sizeof status, cudaMemcpyDeviceToHost, stream_));
    DEFTX_CUDA_CHECK(cudaStreamSynchronize(stream_));
    return status;
  }

  void again(unsigned redo) {
    const bool missed = redo & kMissed;
    restart_kernel<Key>
        <<<static_cast<unsigned>(divided(count_, kThreads)), kThreads, 0, stream_>>>(plans_, states_, count_, missed);
    DEFTX_LAUNCH_CHECK();
    const int64_t blocks =
        std::min(resident_blocks(count_all_kernel<Key, kBase>, kThreads), divided(bits_.tiles, kWarps));
    for_each_batch([&](int first, int count) {
      for (int high = missed ? KeyOf<Key>::kBits : 0; high > 0; high -= kDigit) {
        count_all_kernel<Key, kBase>
            <<<static_cast<unsigned>(blocks), kThreads, 0, stream_>>>(bits_, plans_, states_, first, count, counters_);
        DEFTX_LAUNCH_CHECK();
        pick_kernel<<<static_cast<unsigned>(count), kThreads, 0, stream_>>>(states_ + first, counters_);
        DEFTX_LAUNCH_CHECK();
      }
    });
    mask_by_threshold<Key, kBase>(bits_, plans_, states_, like_, stream_);
  }

 private:
  // Calls work(first, count) for the segments, as many at a time as there are counters for.
  template <typename Work>
  void for_each_batch(const Work& work) {
    for (int first = 0; first < count_; first += together_) work(first, std::min(together_, count_ - first));
  }

  // Blocks for each segment, when the largest has `most` elements to look at, `each` a block.
  int blocks_each(int64_t most, int64_t each) const {
    const int64_t blocks =
        std::clamp<int64_t>(64 * int64_t{together_}, 512, 8192) / together_;  // few flushes, or even work
    return static_cast<int>(std::max<int64_t>(1, std::min(blocks, divided(most, each))));
  }

  template <int kType>
  void stream() {
    constexpr bool kSpecial = sizeof(Key) == 4 && (kType == kFloat32 || (kBase && kType == kBFloat16));
    const auto kernel = stream_kernel < Key, kBase, kSpecial ? kType : kAnyType > ;
    kernel<<<grid_of(kernel, bits_), kThreads, 0, stream_>>>(bits_, plans_, states_, lists_, infinity_, status_);
    DEFTX_LAUNCH_CHECK();
  }

  void sample(int first, int count) {
    const int each = blocks_each(most_samples_, 2048);
    for (int round = 0; round < KeyOf<Key>::kRounds; ++round) {
      sample_kernel<Key, kBase><<<static_cast<unsigned>(each * count), kThreads, 0, stream_>>>(
          bits_, plans_ + first, states_ + first, samples_, counters_, each, round);
      DEFTX_LAUNCH_CHECK();
    }
  }

  void narrow(int first, int count) {
    const int each = blocks_each(most_listed_, 4096);
    int place_bits = 0;
    while (most_tiles_ * kTile - 1 >> place_bits) ++place_bits;
    const int64_t rounds = divided(KeyOf<Key>::kBits, kDigit) + divided(place_bits, kDigit);
    for (int round = 0; round < rounds; ++round) {
      narrow_kernel<Key><<<static_cast<unsigned>(each * count), kThreads, 0, stream_>>>(
          plans_ + first, states_ + first, lists_, counters_, each, round, status_);
      DEFTX_LAUNCH_CHECK();
    }
    apply_kernel<Key><<<static_cast<unsigned>(each * count), kThreads, 0, stream_>>>(bits_, plans_ + first,
                                                                                     states_ + first, lists_, each);
    DEFTX_LAUNCH_CHECK();
  }

  Tensor like_;
  cudaStream_t stream_;
  WordOf<Key> infinity_;
  int32_t type_;
  int count_ = 0, together_ = 0;  // segments, and how many of them have counters at a time
  int64_t most_samples_ = 0, most_listed_ = 0, most_tiles_ = 0;
  Workspace work_;
  Bits bits_{};
  SegmentPlan* plans_ = nullptr;
  SegmentState* states_ = nullptr;
  Status* status_ = nullptr;
  Counter* counters_ = nullptr;
  Key* samples_ = nullptr;
  Lists<Key> lists_{};
};

}  // namespace
}  // namespace deftx
