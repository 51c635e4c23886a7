// What csr.cpp and csr.cu check alike.
#pragma once

#include <optional>

#include "stable.h"

namespace deftx {

inline void check_summand(const Csr& csr, const std::vector<Tensor>& tensors, const Tensor& mask,
                          const Tensor& values,  // [nnz]
                          Device device) {
  check_compact(values, device, mask, csr.nnz, "values");
  const int32_t dtype = dtype_of(values);
  DEFTX_CHECK(tensors.empty() || dtype == csr.dtype || dtype == aoti_torch_dtype_float32() ||
                  dtype == aoti_torch_dtype_float64(),
              "values must be float32, float64 or have the tensors' dtype");
}

inline void check_former(const Csr& csr, const std::vector<Tensor>& tensors, const Tensor& mask,
                         const Tensor& former,  // [nnz]
                         Device device) {
  check_compact(former, device, mask, csr.nnz, "former");
  DEFTX_CHECK(tensors.empty() || dtype_of(former) == csr.dtype, "former must have the tensors' dtype");
  std::vector<Tensor> all = tensors;
  all.push_back(former);
  check_apart(all, "tensors and former");
}

inline void check_add(const Csr& csr, const std::vector<Tensor>& tensors, const Tensor& mask,
                      const Tensor& values,                 // [nnz]
                      const std::optional<Tensor>& former,  // [nnz]
                      const std::optional<Tensor>& done,    // bool []
                      Device device) {
  check_summand(csr, tensors, mask, values, device);
  if (former) check_former(csr, tensors, mask, *former, device);
  if (!done) return;
  check_tensor(*done, device, "done");
  DEFTX_CHECK(done->numel() == 1 && dtype_of(*done) == aoti_torch_dtype_bool(), "done must be one bool");
  DEFTX_CHECK(done->get_device_index() == mask.get_device_index(), "done is on another device than the mask");
}

inline void check_restore(const Csr& csr, const std::vector<Tensor>& tensors, const Tensor& mask,
                          const Tensor& former,  // [nnz]
                          const Tensor& values,  // [nnz]
                          Device device) {
  check_former(csr, tensors, mask, former, device);
  check_summand(csr, tensors, mask, values, device);
}

}  // namespace deftx
