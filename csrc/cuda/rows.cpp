// Torch-facing side of rows.cu: the plan, and moving rows by it.
#include "cuda/rows.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "cuda/torch_side.h"

namespace moetrain::cuda {

Tensor gather(const Tensor& x, const Tensor& index, const char* op) {
  Tensor out = at::empty({index.size(0), x.size(1)}, x.options());
  check_launch(moetrain_cuda_gather_rows(x.const_data_ptr(), x.size(0), index.const_data_ptr<int64_t>(),
                                         index.size(0), x.size(1) * x.element_size(), out.data_ptr(),
                                         current_stream(x)),
               op);
  return out;
}

Tensor combine(const Tensor& rows, const std::optional<Tensor>& weights, const Tensor& slot_row, const char* op) {
  Tensor out = at::empty({slot_row.size(0), rows.size(1)}, rows.options());
  check_launch(moetrain_cuda_combine_rows(rows.const_data_ptr(), rows.size(0),
                                          weights ? weights->const_data_ptr<float>() : nullptr,
                                          slot_row.const_data_ptr<int64_t>(), slot_row.size(0), slot_row.size(1),
                                          rows.size(1), dtype_code(rows), out.data_ptr(), current_stream(rows)),
               op);
  return out;
}

Tensor checked_weights(const Tensor& weights, const Tensor& slot_row, const Tensor& rows, const char* op) {
  check_dtype(weights, at::kFloat, op, "weights");
  check_same_device(weights, rows, op, "weights");
  MOETRAIN_CHECK(weights.sizes() == slot_row.sizes(), op, ": weights have shape ", weights.sizes(),
                 ", the plan is for ", slot_row.sizes());
  return weights.contiguous();
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> plan_permutation(const Tensor& expert_ids, int64_t num_experts) {
  const char* op = "plan_permutation";
  const Tensor ids = checked_index(expert_ids, 2, expert_ids, op, "expert_ids");
  MOETRAIN_CHECK(num_experts >= 1 && num_experts <= kMoetrainPlanMaxExperts, op, ": num_experts must be 1 to ",
                 kMoetrainPlanMaxExperts, " on CUDA, it is ", num_experts);
  MOETRAIN_CHECK(ids.numel() < std::numeric_limits<int32_t>::max(), op, ": too many slots: ", ids.numel());
  const c10::DeviceGuard guard(ids.device());
  const auto stream = current_stream(ids);
  const int64_t slots = ids.numel(), slots_per_token = std::max<int64_t>(ids.size(1), 1);
  const int64_t blocks = (slots + kMoetrainPlanChunk - 1) / kMoetrainPlanChunk;
  const int64_t* id = ids.const_data_ptr<int64_t>();

  Tensor block_counts = at::empty({blocks, num_experts}, ids.options().dtype(at::kInt));
  Tensor tokens_per_expert = at::empty({num_experts}, ids.options());
  Tensor first_row = at::empty({num_experts}, ids.options());
  Tensor status = at::empty({2}, ids.options());
  check_launch(moetrain_cuda_plan_count(id, slots, num_experts, block_counts.data_ptr<int32_t>(),
                                        tokens_per_expert.data_ptr<int64_t>(), first_row.data_ptr<int64_t>(),
                                        status.data_ptr<int64_t>(), stream),
               op);
  const Tensor on_host = status.cpu();  // the one wait: R decides how much to allocate
  const int64_t rows = on_host.const_data_ptr<int64_t>()[0], bad = on_host.const_data_ptr<int64_t>()[1];
  MOETRAIN_CHECK(bad >= slots, op, ": expert_ids[", bad / slots_per_token, ", ", bad % slots_per_token,
                 "] is illegal; legal values are -1 (unused slot) to ", num_experts - 1);

  Tensor row_token = at::empty({rows}, ids.options());
  Tensor row_slot = at::empty({rows}, ids.options());
  Tensor slot_row = at::empty_like(ids);
  check_launch(moetrain_cuda_plan_place(id, slots, slots_per_token, num_experts, block_counts.data_ptr<int32_t>(),
                                        first_row.data_ptr<int64_t>(), row_token.data_ptr<int64_t>(),
                                        row_slot.data_ptr<int64_t>(), slot_row.data_ptr<int64_t>(), stream),
               op);
  return {row_token, row_slot, slot_row, tokens_per_expert};
}

Tensor permute_rows(const Tensor& x, const Tensor& row_token, const Tensor& slot_row) {
  const char* op = "permute";
  check_dim(x, 2, op, "x");
  MOETRAIN_CHECK(slot_row.dim() == 2 && slot_row.size(0) == x.size(0), op, ": the plan is for ",
                 slot_row.size(0), " tokens, x has ", x.size(0));
  const c10::DeviceGuard guard(x.device());
  return gather(x.contiguous(), checked_index(row_token, 1, x, op, "row_token"), op);
}

Tensor combine_checked(const Tensor& rows, const std::optional<Tensor>& weights, const Tensor& slot_row,
                       const char* op) {
  check_dim(rows, 2, op, "rows");
  check_float_or_bf16(rows, op, "rows");
  const Tensor slots = checked_index(slot_row, 2, rows, op, "slot_row");
  const c10::DeviceGuard guard(rows.device());
  return combine(rows.contiguous(), weights, slots, op);
}

Tensor unpermute_rows(const Tensor& rows, const Tensor& row_token, const Tensor& slot_row) {
  MOETRAIN_CHECK(row_token.dim() == 1 && row_token.size(0) == rows.size(0), "unpermute: the plan is for ",
                 row_token.numel(), " rows, there are ", rows.size(0));
  return combine_checked(rows, std::nullopt, slot_row, "unpermute");
}

Tensor combine_rows(const Tensor& rows, const Tensor& weights, const Tensor& slot_row) {
  return combine_checked(rows, checked_weights(weights, slot_row, rows, "combine"), slot_row, "combine");
}

std::tuple<Tensor, Tensor> combine_rows_backward(const Tensor& grad, const Tensor& rows, const Tensor& weights,
                                                 const Tensor& slot_row) {
  const char* op = "combine backward";
  check_dim(rows, 2, op, "rows");
  check_float_or_bf16(rows, op, "rows");
  check_dtype(grad, rows.scalar_type(), op, "grad");
  check_same_device(grad, rows, op, "grad");
  const Tensor slots = checked_index(slot_row, 2, rows, op, "slot_row");
  MOETRAIN_CHECK(grad.dim() == 2 && grad.size(0) == slots.size(0) && grad.size(1) == rows.size(1), op,
                 ": grad has shape ", grad.sizes(), ", expected [", slots.size(0), ", ", rows.size(1), "]");
  const c10::DeviceGuard guard(rows.device());
  const Tensor g = grad.contiguous(), r = rows.contiguous();
  const Tensor w = checked_weights(weights, slots, rows, op);
  Tensor grad_rows = at::empty(rows.sizes(), rows.options());
  Tensor grad_weights = at::empty(slots.sizes(), w.options());
  check_launch(moetrain_cuda_combine_rows_backward(
                   g.const_data_ptr(), r.const_data_ptr(), rows.size(0), w.const_data_ptr<float>(),
                   slots.const_data_ptr<int64_t>(), slots.size(0), slots.size(1), rows.size(1), dtype_code(rows),
                   grad_rows.data_ptr(), grad_weights.data_ptr<float>(), current_stream(rows)),
               op);
  return {grad_rows, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) {
  m.impl("plan_permutation", &plan_permutation);
  m.impl("permute_rows", &permute_rows);
  m.impl("unpermute_rows", &unpermute_rows);
  m.impl("combine_rows", &combine_rows);
  m.impl("combine_rows_backward", &combine_rows_backward);
}

}  // namespace moetrain::cuda
