// Torch-facing side of rows_kernel: shapes, dtypes, allocation.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/rows_kernel.h"

namespace moetrain {
namespace {

using at::Tensor;

bf16* bf16_data(const Tensor& t) { return static_cast<bf16*>(t.data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor> plan_permutation(const Tensor& expert_ids, int64_t num_experts) {
  const char* op = "plan_permutation";
  const Tensor ids = checked_index(expert_ids, 2, expert_ids, op, "expert_ids");
  MOETRAIN_CHECK(num_experts >= 1, op, ": num_experts must be at least 1, it is ", num_experts);
  const int64_t tokens = ids.size(0), slots_per_token = ids.size(1);
  const int64_t* id = ids.const_data_ptr<int64_t>();

  Tensor tokens_per_expert = at::zeros({num_experts}, ids.options());
  int64_t* count = tokens_per_expert.data_ptr<int64_t>();
  const int64_t bad = count_tokens(id, ids.numel(), num_experts, count);
  MOETRAIN_CHECK(bad < 0, op, ": expert_ids[", bad / std::max<int64_t>(slots_per_token, 1), ", ",
                 bad % std::max<int64_t>(slots_per_token, 1), "] is ", bad < 0 ? 0 : id[bad],
                 "; legal values are -1 (unused slot) to ", num_experts - 1);

  std::vector<int64_t> next_row(num_experts, 0);
  for (int64_t e = 1; e < num_experts; ++e) next_row[e] = next_row[e - 1] + count[e - 1];
  const int64_t rows = next_row.back() + count[num_experts - 1];
  Tensor row_token = at::empty({rows}, ids.options());
  Tensor row_slot = at::empty({rows}, ids.options());
  Tensor slot_row = at::empty({tokens, slots_per_token}, ids.options());
  place_slots(id, tokens, slots_per_token, next_row.data(), row_token.data_ptr<int64_t>(),
              row_slot.data_ptr<int64_t>(), slot_row.data_ptr<int64_t>());
  return {row_token, row_slot, slot_row, tokens_per_expert};
}

void check_range(const Tensor& index, int64_t lowest, int64_t end, const char* op, const char* name) {
  const int64_t* value = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i) {
    MOETRAIN_CHECK(value[i] >= lowest && value[i] < end, op, ": ", name, " holds ", value[i],
                   " at flat position ", i, "; legal values are ", lowest, " to ", end - 1);
  }
}

// slot_row must name every row exactly once, so that the backward writes each of them.
void check_slots(const Tensor& slot_row, int64_t rows, const char* op) {
  const int64_t* row = slot_row.const_data_ptr<int64_t>();
  int64_t used = 0;
  for (int64_t i = 0; i < slot_row.numel(); ++i) used += row[i] >= 0;
  MOETRAIN_CHECK(used == rows, op, ": slot_row names ", used, " rows, there are ", rows,
                 "; was the plan made for another tensor?");
  check_range(slot_row, -1, rows, op, "slot_row");
}

Tensor gather(const Tensor& x, const Tensor& index) {
  const Tensor from = x.contiguous();
  Tensor out = at::empty({index.numel(), x.size(1)}, x.options());
  gather_rows(from.const_data_ptr(), index.const_data_ptr<int64_t>(), index.numel(),
              x.size(1) * x.element_size(), out.data_ptr(), num_threads(out.numel()));
  return out;
}

Tensor permute_rows(const Tensor& x, const Tensor& row_token, const Tensor& slot_row) {
  const char* op = "permute";
  check_dim(x, 2, op, "x");
  const Tensor token = checked_index(row_token, 1, x, op, "row_token");
  MOETRAIN_CHECK(slot_row.dim() == 2 && slot_row.size(0) == x.size(0), op, ": the plan is for ",
                 slot_row.size(0), " tokens, x has ", x.size(0));
  check_range(token, 0, x.size(0), op, "row_token");
  return gather(x, token);
}

Tensor combine(const Tensor& rows, const std::optional<Tensor>& weights, const Tensor& slot_row, const char* op) {
  check_dim(rows, 2, op, "rows");
  check_float_or_bf16(rows, op, "rows");
  const Tensor slots = checked_index(slot_row, 2, rows, op, "slot_row");
  check_slots(slots, rows.size(0), op);
  const float* weight = weights ? weights->const_data_ptr<float>() : nullptr;
  const Tensor from = rows.contiguous();
  Tensor out = at::empty({slots.size(0), rows.size(1)}, rows.options());
  const int threads = num_threads(rows.numel());
  if (rows.scalar_type() == at::kFloat) {
    combine_rows(from.const_data_ptr<float>(), weight, slots.const_data_ptr<int64_t>(), slots.size(0),
                 slots.size(1), rows.size(1), out.data_ptr<float>(), threads);
  } else {
    combine_rows<bf16>(bf16_data(from), weight, slots.const_data_ptr<int64_t>(), slots.size(0), slots.size(1),
                       rows.size(1), bf16_data(out), threads);
  }
  return out;
}

Tensor unpermute_rows(const Tensor& rows, const Tensor& row_token, const Tensor& slot_row) {
  MOETRAIN_CHECK(row_token.dim() == 1 && row_token.size(0) == rows.size(0), "unpermute: the plan is for ",
                 row_token.numel(), " rows, there are ", rows.size(0));
  return combine(rows, std::nullopt, slot_row, "unpermute");
}

Tensor checked_weights(const Tensor& weights, const Tensor& slot_row, const Tensor& rows, const char* op) {
  check_dtype(weights, at::kFloat, op, "weights");
  check_same_device(weights, rows, op, "weights");
  MOETRAIN_CHECK(weights.sizes() == slot_row.sizes(), op, ": weights have shape ", weights.sizes(),
                 ", the plan is for ", slot_row.sizes());
  return weights.contiguous();
}

Tensor combine_rows_op(const Tensor& rows, const Tensor& weights, const Tensor& slot_row) {
  return combine(rows, checked_weights(weights, slot_row, rows, "combine"), slot_row, "combine");
}

std::tuple<Tensor, Tensor> combine_rows_backward_op(const Tensor& grad, const Tensor& rows, const Tensor& weights,
                                                    const Tensor& slot_row) {
  const char* op = "combine backward";
  check_dim(rows, 2, op, "rows");
  check_float_or_bf16(rows, op, "rows");
  check_dtype(grad, rows.scalar_type(), op, "grad");
  const Tensor slots = checked_index(slot_row, 2, rows, op, "slot_row");
  check_slots(slots, rows.size(0), op);
  MOETRAIN_CHECK(grad.dim() == 2 && grad.size(0) == slots.size(0) && grad.size(1) == rows.size(1), op,
                 ": grad has shape ", grad.sizes(), ", expected [", slots.size(0), ", ", rows.size(1), "]");
  const Tensor g = grad.contiguous(), r = rows.contiguous();
  const Tensor w = checked_weights(weights, slots, rows, op);
  Tensor grad_rows = at::empty(rows.sizes(), rows.options());
  Tensor grad_weights = at::empty(slots.sizes(), w.options());
  const int threads = num_threads(rows.numel());
  if (rows.scalar_type() == at::kFloat) {
    combine_rows_backward(g.const_data_ptr<float>(), r.const_data_ptr<float>(), w.const_data_ptr<float>(),
                          slots.const_data_ptr<int64_t>(), slots.size(0), slots.size(1), rows.size(1),
                          grad_rows.data_ptr<float>(), grad_weights.data_ptr<float>(), threads);
  } else {
    combine_rows_backward<bf16>(bf16_data(g), bf16_data(r), w.const_data_ptr<float>(),
                                slots.const_data_ptr<int64_t>(), slots.size(0), slots.size(1), rows.size(1),
                                bf16_data(grad_rows), grad_weights.data_ptr<float>(), threads);
  }
  return {grad_rows, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(moetrain, CPU, m) {
  m.impl("plan_permutation", &plan_permutation);
  m.impl("permute_rows", &permute_rows);
  m.impl("unpermute_rows", &unpermute_rows);
  m.impl("combine_rows", &combine_rows_op);
  m.impl("combine_rows_backward", &combine_rows_backward_op);
}

}  // namespace moetrain
