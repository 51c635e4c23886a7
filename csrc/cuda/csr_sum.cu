// csr_sum on the GPU: one launch, in which each entry of the result's mask is looked up in the row of every other mask,
// by binary search. The masks' addresses are parameters of the kernel.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "entries.cuh"

namespace deftx {
namespace {

using torch::headeronly::ScalarType;

enum class Type : int { kFloat, kDouble, kBFloat16, kHalf };

struct Term {
  const int64_t* crow;  // [rows + 1]
  const void* col;      // [nnz]
  const void* values;   // [nnz]
  int64_t nnz;
  double weight;
  Type type;
};

struct Terms {
  Term term[kSummands];
  int count;
};
static_assert(sizeof(Terms) <= 4000, "a kernel's parameters are limited to 4 KB");

__device__ double value_of(const Term& term, int64_t i) {
  switch (term.type) {
    case Type::kFloat:
      return static_cast<const float*>(term.values)[i];
    case Type::kDouble:
      return static_cast<const double*>(term.values)[i];
    case Type::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(term.values)[i]);
    default:
      return __half2float(static_cast<const __half*>(term.values)[i]);
  }
}

// The sum at one entry. Elections have two, of the positive and of the negative values, until the votes are counted.
// Products and sums are rounded one by one, as the CPU library does: both devices give the same bits. x + -0.0 is x for
// every x, so that a sum of -0.0 alone is -0.0.
template <typename Column>
__device__ double sum_at(const Terms& terms, Election election, int64_t rows, int64_t row, Column column) {
  double positives = -0.0, negatives = -0.0, votes = 0;
  int positive_count = 0, negative_count = 0;
  for (int j = 0; j < terms.count; ++j) {
    const Term& term = terms.term[j];
    const Mask<Column> mask{term.crow, static_cast<const Column*>(term.col), rows, term.nnz};
    const Place place = look_up(mask, row, column);
    if (!place.found) continue;
    const double x = value_of(term, place.at), product = __dmul_rn(term.weight, x);
    const bool all = election == Election::kNone;
    if (all || x > 0) {
      positives = __dadd_rn(positives, product);
      ++positive_count;
    } else if (x < 0) {
      negatives = __dadd_rn(negatives, product);
      ++negative_count;
    }
    votes = __dadd_rn(votes, election == Election::kTotal ? x : (x > 0) - (x < 0));
  }
  if (election == Election::kNone) return positive_count ? positives : 0;
  const bool positive = votes >= 0;
  const int count = positive ? positive_count : negative_count;
  return count ? __ddiv_rn(positive ? positives : negatives, count) : 0;
}

template <typename Column, typename Out>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const Mask<Column> mask, const __grid_constant__ Terms terms, Election election,
               Out* __restrict__ out) {  // [nnz]
  for_each_entry(mask, [&](int64_t entry, int64_t row) {
    if (row >= 0) out[entry] = static_cast<Out>(sum_at(terms, election, mask.rows, row, mask.col[entry]));
  });
}

Type type_of(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return Type::kFloat;
  if (dtype == aoti_torch_dtype_float64()) return Type::kDouble;
  return dtype == aoti_torch_dtype_bfloat16() ? Type::kBFloat16 : Type::kHalf;
}

template <typename Column, typename Out>
void launch(const Csr& csr, const Terms& terms, Election election, Tensor& out, cudaStream_t stream) {
  const Mask<Column> mask{csr.crow, static_cast<const Column*>(csr.col), csr.rows, csr.nnz};
  const unsigned blocks = blocks_for(sum_kernel<Column, Out>, csr.nnz, kTile);
  sum_kernel<Column, Out>
      <<<blocks, kThreads, 0, stream>>>(mask, terms, election, static_cast<Out*>(out.mutable_data_ptr()));
  DEFTX_LAUNCH_CHECK();
}

Tensor csr_sum(Tensor crow_indices, Tensor col_indices,  // of the result
               std::vector<Tensor> other_crow_indices, std::vector<Tensor> other_col_indices,
               std::vector<Tensor> values, std::vector<double> weights, int64_t election, ScalarType dtype) {
  const Election which = election_of(election);
  const Csr csr = check_entries_of_sum(crow_indices, col_indices, dtype, Device::kCuda);
  const std::vector<Summand> summands =
      check_summands(csr, col_indices, other_crow_indices, other_col_indices, values, weights, Device::kCuda);
  Tensor out = torch::stable::new_empty(col_indices, {csr.nnz}, dtype);
  if (csr.nnz == 0) return out;
  Terms terms;
  terms.count = static_cast<int>(summands.size());
  for (int j = 0; j < terms.count; ++j) {
    const Summand& s = summands[j];
    terms.term[j] = {s.csr.crow, s.csr.col, s.values, s.csr.nnz, s.weight, type_of(s.dtype)};
  }
  const DeviceGuard guard(crow_indices.get_device_index());
  const cudaStream_t stream = current_stream(crow_indices);
  if (dtype == ScalarType::Double)
    (csr.wide ? launch<int32_t, double> : launch<uint16_t, double>)(csr, terms, which, out, stream);
  else
    (csr.wide ? launch<int32_t, float> : launch<uint16_t, float>)(csr, terms, which, out, stream);
  return out;
}

}  // namespace

DEFTX_CUDA_LIBRARY_IMPL(m) { m.impl("csr_sum", TORCH_BOX(&csr_sum)); }

}  // namespace deftx
