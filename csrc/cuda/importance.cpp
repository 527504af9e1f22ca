// Torch-facing side of importance.cu. Legend: S sequence, B batch, H query heads, G key heads, d head dimension.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include "cuda/torch_side.h"

namespace moetrain::cuda {
namespace {

int measure_code(const std::string& measure, const char* op) {
  constexpr std::array<const char*, 5> kNames = {"self_weight", "row_max", "row_entropy", "col_max", "col_sum"};
  const auto found = std::find(kNames.begin(), kNames.end(), measure);
  MOETRAIN_CHECK(found != kNames.end(), op, ": measure is '", measure,
                 "'; legal values are self_weight, row_max, row_entropy, col_max and col_sum");
  return static_cast<int>(found - kNames.begin());
}

void check_shapes(const Tensor& q, const Tensor& k, const Tensor& lse, const std::optional<Tensor>& valid,
                  const char* op) {
  check_dim(q, 4, op, "q");
  check_dim(k, 4, op, "k");
  MOETRAIN_CHECK(q.scalar_type() == at::kFloat || q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf, op,
                 ": q must be float32, bfloat16 or float16, it is ", q.scalar_type());
  check_dtype(k, q.scalar_type(), op, "k");
  check_dtype(lse, at::kFloat, op, "lse");
  check_same_device(k, q, op, "k");
  check_same_device(lse, q, op, "lse");
  const int64_t seq = q.size(0), batch = q.size(1), heads = q.size(2), groups = k.size(2);
  MOETRAIN_CHECK(k.size(0) == seq && k.size(1) == batch && k.size(3) == q.size(3), op, ": q is ", q.sizes(), ", k is ",
                 k.sizes(), "; sequence, batch and head dimension must agree");
  MOETRAIN_CHECK(groups > 0 ? heads % groups == 0 : heads == 0, op, ": ", heads,
                 " query heads must be a multiple of the ", groups, " key heads");
  MOETRAIN_CHECK(lse.sizes() == at::IntArrayRef({batch, heads, seq}), op, ": lse has shape ", lse.sizes(),
                 ", it must be [", batch, ", ", heads, ", ", seq, "]");
  MOETRAIN_CHECK(heads <= 65535 && batch <= 65535 && seq < (int64_t{1} << 30), op, ": q is ", q.sizes(),
                 "; CUDA takes up to 65535 sequences and heads, and 2^30 tokens");
  MOETRAIN_CHECK(q.scalar_type() != at::kBFloat16 || q.size(3) <= kMoetrainImportanceMaxWidth, op,
                 ": the head dimension is ", q.size(3), "; bfloat16 on CUDA takes up to ",
                 kMoetrainImportanceMaxWidth);
  if (!valid) return;
  check_dtype(*valid, at::kBool, op, "valid");
  check_same_device(*valid, q, op, "valid");
  MOETRAIN_CHECK(valid->sizes() == at::IntArrayRef({batch, seq}), op, ": valid has shape ", valid->sizes(),
                 ", it must be [", batch, ", ", seq, "]");
}

// As the kernels read it: heads contiguous; float16, which training here does not use, goes through float32.
Tensor readable(const Tensor& t) {
  if (t.scalar_type() == at::kHalf) return t.to(at::kFloat).contiguous();
  return t.stride(3) == 1 ? t : t.contiguous();
}

Tensor importance_from_lse(const Tensor& q, const Tensor& k, const Tensor& lse, std::string measure, bool causal,
                           double scale, const std::optional<Tensor>& valid) {
  const char* op = "importance_from_lse";
  const int code = measure_code(measure, op);
  check_shapes(q, k, lse, valid, op);
  const c10::DeviceGuard guard(q.device());
  const Tensor from_q = readable(q), from_k = readable(k), sums = lse.contiguous();
  const Tensor mask = valid ? valid->contiguous() : Tensor();
  Tensor per_head = at::empty(sums.sizes(), sums.options());
  Tensor out = at::empty({q.size(0), q.size(1)}, sums.options());
  MoetrainImportance call = {};
  call.measure = code;
  call.q = from_q.const_data_ptr(), call.k = from_k.const_data_ptr();
  for (int i = 0; i < 3; ++i) call.q_strides[i] = from_q.stride(i), call.k_strides[i] = from_k.stride(i);
  call.lse = sums.const_data_ptr<float>();
  call.valid = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
  call.per_head = per_head.data_ptr<float>(), call.out = out.data_ptr<float>();
  call.seq = q.size(0), call.batch = q.size(1), call.heads = q.size(2), call.groups = k.size(2);
  call.width = q.size(3);
  call.scale = static_cast<float>(scale);
  call.causal = causal;
  call.dtype = dtype_code(from_q);
  check_launch(moetrain_cuda_importance(&call, current_stream(q)), op);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) { m.impl("importance_from_lse", &importance_from_lse); }

}  // namespace moetrain::cuda
