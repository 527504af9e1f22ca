// Torch-facing side of the grouped products. The counts stay on the device, so their sum is not checked; the kernels
// cut what does not fit.
#include "cuda/gemm.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>
#if __has_include(<ATen/ops/_grouped_mm.h>)
#include <ATen/ops/_grouped_mm.h>
#define MOETRAIN_TORCH_HAS_GROUPED_MM 1
#else
#define MOETRAIN_TORCH_HAS_GROUPED_MM 0
#endif

#include <cstdlib>
#include <limits>
#include <string>
#include <tuple>

#include "cuda/rows.h"
#include "cuda/torch_side.h"

namespace moetrain::cuda {
namespace {

// Not kept between calls, so that one process can compare both. Own unless asked: torch promises no row invariance, and
// the proof that no token sees the future stands on it.
bool torch_is_chosen() {
  const char* value = std::getenv("MOETRAIN_CUDA_GEMM");
  const std::string name = value ? value : "own";
  MOETRAIN_CHECK(name == "own" || name == "torch", "the environment variable MOETRAIN_CUDA_GEMM is '", name,
                 "'; legal values are own and torch");
  TORCH_CHECK(name == "own" || MOETRAIN_TORCH_HAS_GROUPED_MM,
              "moetrain: MOETRAIN_CUDA_GEMM is torch, but this torch has no grouped product");
  return name == "torch";
}

bool is_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

Tensor ends_of(const Tensor& tokens_per_expert, int64_t rows, const char* op) {
  Tensor ends = at::empty({tokens_per_expert.size(0)}, tokens_per_expert.options().dtype(at::kInt));
  check_launch(moetrain_cuda_group_ends(tokens_per_expert.const_data_ptr<int64_t>(), tokens_per_expert.size(0), rows,
                                        ends.data_ptr<int32_t>(), current_stream(ends)),
               op);
  return ends;
}

#if MOETRAIN_TORCH_HAS_GROUPED_MM
Tensor torch_row_product(Product kind, const Tensor& rows, const Tensor& w, const Tensor& tokens_per_expert,
                         const char* op) {
  const Tensor ends = ends_of(tokens_per_expert, rows.size(0), op);
  Tensor out = at::_grouped_mm(rows, kind == Product::kForward ? w.transpose(1, 2) : w, ends);
  check_launch(moetrain_cuda_zero_unclaimed(ends.const_data_ptr<int32_t>(), ends.size(0), out.size(0),
                                            out.size(1) * out.element_size(), out.data_ptr(), current_stream(out)),
               op);
  return out;
}

Tensor torch_weight_gradient(const Tensor& grad, const Tensor& x, const Tensor& tokens_per_expert, const char* op) {
  return at::_grouped_mm(grad.t(), x, ends_of(tokens_per_expert, grad.size(0), op));
}
#else
Tensor torch_row_product(Product, const Tensor&, const Tensor&, const Tensor&, const char*) { return {}; }
Tensor torch_weight_gradient(const Tensor&, const Tensor&, const Tensor&, const char*) { return {}; }
#endif

const int64_t* index_of(const Routed& rows) { return rows.index ? rows.index->const_data_ptr<int64_t>() : nullptr; }

// The own kernels. `b` is the weights, or the x of a weight gradient.
MoetrainGemm describe(Product kind, const Routed& a, const Routed& b, const Tensor& tokens_per_expert, int64_t n,
                      int64_t k) {
  MoetrainGemm gemm = {};
  gemm.kind = static_cast<int>(kind);
  gemm.a = a.data.const_data_ptr(), gemm.a_rows = index_of(a), gemm.a_count = a.data.size(0);
  gemm.b = b.data.const_data_ptr(), gemm.b_rows = index_of(b), gemm.b_count = b.data.size(0);
  gemm.tokens_per_expert = tokens_per_expert.const_data_ptr<int64_t>();
  gemm.rows = a.rows(), gemm.experts = tokens_per_expert.size(0), gemm.n = n, gemm.k = k;
  return gemm;
}

void launch(const MoetrainGemm& gemm, const Tensor& like, const char* op) {
  constexpr int64_t kMost = int64_t{1} << 30;  // rows and columns are numbered by int on the device
  MOETRAIN_CHECK(gemm.rows <= kMost && gemm.n <= kMost && gemm.k <= kMost, op, ": ", gemm.rows, " rows, ", gemm.n,
                 " and ", gemm.k, " columns; CUDA takes up to ", kMost);
  const auto run =
      like.scalar_type() == at::kFloat ? &moetrain_cuda_grouped_gemm_fp32 : &moetrain_cuda_grouped_gemm_bf16;
  check_launch(run(&gemm, current_stream(like)), op);
}

void check_product(const Tensor& rows, const Tensor& w, const Tensor& tokens_per_expert, int64_t columns,
                   int64_t w_dim, const char* op, const char* name) {
  check_dim(rows, 2, op, name);
  check_dim(w, 3, op, "w");
  check_dtype(w, rows.scalar_type(), op, "w");
  check_same_device(w, rows, op, "w");
  check_groups(rows, tokens_per_expert, w.size(0), op);
  MOETRAIN_CHECK(columns == w.size(w_dim), op, ": ", name, " has ", columns, " columns, w is ", w.sizes(),
                 " ([E, out, in])");
}

}  // namespace

bool through_torch(const Tensor& rows, int64_t n, int64_t k) {
  return rows.scalar_type() == at::kBFloat16 && n > 0 && k > 0 && n % 8 == 0 && k % 8 == 0 && torch_is_chosen();
}

Routed prepared(const Routed& rows, bool for_torch, const char* op) {
  return for_torch && rows.index ? Routed{gather(rows.data, *rows.index, op), std::nullopt} : rows;
}

Tensor row_product(Product kind, const Routed& rows, const Tensor& w, const Tensor& tokens_per_expert,
                   const char* op) {
  const int64_t n = w.size(1), k = w.size(2);
  if (rows.rows() > 0 && w.size(0) > 0 && is_aligned(rows.data) && is_aligned(w) && through_torch(rows.data, n, k)) {
    return torch_row_product(kind, prepared(rows, true, op).data, w, tokens_per_expert, op);
  }
  Tensor out = at::empty({rows.rows(), kind == Product::kForward ? n : k}, rows.data.options());
  MoetrainGemm gemm = describe(kind, rows, {w, std::nullopt}, tokens_per_expert, n, k);
  gemm.c = out.data_ptr();
  launch(gemm, out, op);
  return out;
}

Tensor weight_gradient(const Routed& grad, const Routed& x, const Tensor& tokens_per_expert, const char* op) {
  const int64_t n = grad.data.size(1), k = x.data.size(1);
  if (grad.rows() > 0 && tokens_per_expert.size(0) > 0 && is_aligned(grad.data) && is_aligned(x.data) &&
      through_torch(grad.data, n, k)) {
    return torch_weight_gradient(prepared(grad, true, op).data, prepared(x, true, op).data, tokens_per_expert, op);
  }
  Tensor out = at::empty({tokens_per_expert.size(0), n, k}, grad.data.options());
  MoetrainGemm gemm = describe(Product::kWeightGradient, grad, x, tokens_per_expert, n, k);
  gemm.c = out.data_ptr();
  launch(gemm, out, op);
  return out;
}

Activated swiglu_product(const Routed& x, const Tensor& w, const Tensor& tokens_per_expert, bool keep_z,
                         const char* op) {
  const int64_t n = w.size(1), k = w.size(2);
  Tensor h = at::empty({x.rows(), n / 2}, x.data.options());
  if (through_torch(x.data, n, k)) {
    Tensor z = row_product(Product::kForward, x, w, tokens_per_expert, op);
    check_launch(moetrain_cuda_swiglu(z.const_data_ptr(), z.size(0), n / 2, dtype_code(z), h.data_ptr(),
                                      current_stream(z)),
                 op);
    return {h, keep_z ? z : at::empty({0, n}, z.options())};
  }
  Tensor z = at::empty({keep_z ? x.rows() : 0, n}, x.data.options());
  MoetrainGemm gemm = describe(Product::kSwiglu, x, {w, std::nullopt}, tokens_per_expert, n, k);
  gemm.c = keep_z ? z.data_ptr() : nullptr;
  gemm.h = h.data_ptr();
  launch(gemm, h, op);
  return {h, z};
}

namespace {

Tensor grouped_gemm(const Tensor& x, const Tensor& w, const Tensor& tokens_per_expert) {
  const char* op = "grouped_gemm";
  check_product(x, w, tokens_per_expert, x.size(-1), 2, op, "x");
  const c10::DeviceGuard guard(x.device());
  return row_product(Product::kForward, {x.contiguous(), std::nullopt}, w.contiguous(),
                     tokens_per_expert.contiguous(), op);
}

Tensor gathered_grouped_gemm(const Tensor& x, const Tensor& w, const Tensor& row_source,
                             const Tensor& tokens_per_expert) {
  const char* op = "gathered_grouped_gemm";
  check_product(x, w, tokens_per_expert, x.size(-1), 2, op, "x");
  const c10::DeviceGuard guard(x.device());
  const Routed rows = {x.contiguous(), checked_index(row_source, 1, x, op, "row_source")};
  return row_product(Product::kForward, rows, w.contiguous(), tokens_per_expert.contiguous(), op);
}

Tensor grouped_gemm_dgrad(const Tensor& grad, const Tensor& w, const Tensor& tokens_per_expert) {
  const char* op = "grouped_gemm dgrad";
  check_product(grad, w, tokens_per_expert, grad.size(-1), 1, op, "grad");
  const c10::DeviceGuard guard(grad.device());
  return row_product(Product::kInputGradient, {grad.contiguous(), std::nullopt}, w.contiguous(),
                     tokens_per_expert.contiguous(), op);
}

void check_weight_gradient(const Tensor& grad, const Tensor& x, const Tensor& tokens_per_expert, const char* op) {
  check_dim(x, 2, op, "x");
  check_dtype(x, grad.scalar_type(), op, "x");
  check_same_device(x, grad, op, "x");
  check_groups(grad, tokens_per_expert, tokens_per_expert.numel(), op);
  MOETRAIN_CHECK(grad.size(0) == x.size(0), op, ": grad has ", grad.size(0), " rows, x has ", x.size(0));
}

Tensor grouped_gemm_wgrad(const Tensor& grad, const Tensor& x, const Tensor& tokens_per_expert) {
  const char* op = "grouped_gemm wgrad";
  check_weight_gradient(grad, x, tokens_per_expert, op);
  const c10::DeviceGuard guard(grad.device());
  return weight_gradient({grad.contiguous(), std::nullopt}, {x.contiguous(), std::nullopt},
                         tokens_per_expert.contiguous(), op);
}

void grouped_gemm_wgrad_out(const Tensor& grad, const Tensor& x, const Tensor& tokens_per_expert, const Tensor& out,
                            bool accumulate) {
  const char* op = "grouped_gemm_wgrad_out";
  check_weight_gradient(grad, x, tokens_per_expert, op);
  const int64_t experts = tokens_per_expert.size(0), n = grad.size(1), k = x.size(1);
  check_same_device(out, grad, op, "out");
  MOETRAIN_CHECK(out.scalar_type() == at::kFloat || out.scalar_type() == grad.scalar_type(), op, ": out must be ",
                 grad.scalar_type(), " or float32, it is ", out.scalar_type());
  MOETRAIN_CHECK(out.sizes() == at::IntArrayRef({experts, n, k}) && out.is_contiguous(), op,
                 ": out must be contiguous of shape [", experts, ", ", n, ", ", k, "], it has shape ", out.sizes(),
                 " and strides ", out.strides());
  const c10::DeviceGuard guard(grad.device());
  const Tensor counts = tokens_per_expert.contiguous();
  const Routed g = {grad.contiguous(), std::nullopt}, from = {x.contiguous(), std::nullopt};
  MoetrainGemm gemm = describe(Product::kWeightGradient, g, from, counts, n, k);
  gemm.c = out.data_ptr();
  gemm.wide = out.scalar_type() != grad.scalar_type();
  gemm.accumulate = accumulate;
  launch(gemm, grad, op);
}

}  // namespace

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) {
  m.impl("grouped_gemm", &grouped_gemm);
  m.impl("grouped_gemm_dgrad", &grouped_gemm_dgrad);
  m.impl("grouped_gemm_wgrad", &grouped_gemm_wgrad);
  m.impl("gathered_grouped_gemm", &gathered_grouped_gemm);
  m.impl("grouped_gemm_wgrad_out", &grouped_gemm_wgrad_out);
}

}  // namespace moetrain::cuda
