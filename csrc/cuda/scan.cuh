// Sums of counts on the device.
#pragma once

#include <cub/device/device_scan.cuh>

#include "../stable.h"

namespace deftx {

// Replaces n counts by the sums before them, and waits for the last one: the sum of all where the last count is 0.
static int64_t scan(int64_t* counts, int64_t n, const Tensor& like, cudaStream_t stream) {
  refuse_capture(stream);
  size_t bytes = 0;
  DEFTX_CUDA_CHECK(cub::DeviceScan::ExclusiveSum(nullptr, bytes, counts, counts, n, stream));
  Tensor workspace = torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, torch::headeronly::ScalarType::Byte);
  DEFTX_CUDA_CHECK(cub::DeviceScan::ExclusiveSum(workspace.mutable_data_ptr(), bytes, counts, counts, n, stream));
  int64_t total = 0;
  DEFTX_CUDA_CHECK(cudaMemcpyAsync(&total, counts + n - 1, sizeof(total), cudaMemcpyDeviceToHost, stream));
  DEFTX_CUDA_CHECK(cudaStreamSynchronize(stream));
  return total;
}

}  // namespace deftx
