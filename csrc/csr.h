// What csr.cpp and csr.cu check alike.
#pragma once

#include <optional>

#include "stable.h"

namespace deftx {

// The compact tensors that csr_exchange_ and csr_add_ write must not share memory with the tensors, which they also
// write.
inline void check_written(std::vector<Tensor> tensors, const Tensor& compact, const char* name) {
  tensors.push_back(compact);
  check_apart(tensors, name);
}

inline void check_exchange(const Csr& csr, const std::vector<Tensor>& tensors, const Tensor& mask,
                           const Tensor& values,  // [nnz]
                           Device device) {
  check_compact(values, device, mask, csr.nnz, "values");
  DEFTX_CHECK(tensors.empty() || dtype_of(values) == csr.dtype, "csr_exchange_: values must have the tensors' dtype");
  check_written(tensors, values, "tensors and values");
}

inline void check_add(const Csr& csr, const std::vector<Tensor>& tensors, const Tensor& mask,
                      const Tensor& values,                 // [nnz]
                      const std::optional<Tensor>& former,  // [nnz]
                      const std::optional<Tensor>& done,    // bool []
                      Device device) {
  check_compact(values, device, mask, csr.nnz, "values");
  const int32_t dtype = dtype_of(values);
  DEFTX_CHECK(tensors.empty() || dtype == csr.dtype || dtype == aoti_torch_dtype_float32() ||
                  dtype == aoti_torch_dtype_float64(),
              "csr_add_: values must be float32, float64 or have the tensors' dtype");
  if (former) {
    check_compact(*former, device, mask, csr.nnz, "former");
    DEFTX_CHECK(tensors.empty() || dtype_of(*former) == csr.dtype, "csr_add_: former must have the tensors' dtype");
    check_written(tensors, *former, "tensors and former");
  }
  if (done) {
    check_tensor(*done, device, "done");
    DEFTX_CHECK(done->numel() == 1 && dtype_of(*done) == aoti_torch_dtype_bool(), "csr_add_: done must be one bool");
    DEFTX_CHECK(done->get_device_index() == mask.get_device_index(), "done is on another device than the mask");
  }
}

}  // namespace deftx
