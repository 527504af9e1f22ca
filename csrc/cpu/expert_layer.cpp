// Torch-facing side of the fused expert layer: y = combine(fc2 (silu(gate) * up)), gate, up = fc1 x, for routed rows.
// bf16 on AMX runs chunks of rows through both products while they are in L2 (expert_layer_amx); everything else is
// composed of grouped products, whose packing does the gathers, and passes over rows.
// Legend: T tokens, K slots a token, R routed rows sorted by expert, E experts, D hidden size, F expert width.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/expert_layer_amx.h"
#include "cpu/groups.h"
#include "cpu/rows_kernel.h"
#include "cpu/swiglu.h"

namespace moetrain {
namespace {

using at::Tensor;

// The arguments of both directions, checked, and the pointers and sizes that the kernels want.
struct Layer {
  Tensor x, weights, fc1, fc2, row_token, slot_row;
  std::vector<int64_t> first, row_slot;
  int64_t T, K, R, E, D, F;

  const float* weight() const { return weights.defined() ? weights.const_data_ptr<float>() : nullptr; }
  const int64_t* token() const { return row_token.const_data_ptr<int64_t>(); }
  int threads() const { return gemm_threads(R * D * F); }
};

// The slot of every row; slot_row must name each row once, or rows of the output would stay unwritten.
std::vector<int64_t> slots_of_rows(const Tensor& slot_row, int64_t rows, const char* op) {
  const int64_t* row = slot_row.const_data_ptr<int64_t>();
  std::vector<int64_t> slot(rows, -1);
  int64_t used = 0;
  for (int64_t i = 0; i < slot_row.numel(); ++i) {
    if (row[i] < 0) continue;
    MOETRAIN_CHECK(row[i] < rows && slot[row[i]] < 0, op, ": slot_row names row ", row[i], " at flat position ", i,
                   "; it must name each of ", rows, " rows once");
    slot[row[i]] = i;
    ++used;
  }
  MOETRAIN_CHECK(used == rows, op, ": slot_row names ", used, " rows, there are ", rows,
                 "; was the plan made for another tensor?");
  return slot;
}

Layer check(const Tensor& x, const std::optional<Tensor>& weights, const Tensor& fc1, const Tensor& fc2,
            const Tensor& row_token, const Tensor& slot_row, const Tensor& tokens_per_expert, const char* op) {
  Layer l;
  check_dim(x, 2, op, "x");
  check_float_or_bf16(x, op, "x");
  for (const Tensor* w : {&fc1, &fc2}) {
    check_dim(*w, 3, op, w == &fc1 ? "fc1" : "fc2");
    check_dtype(*w, x.scalar_type(), op, w == &fc1 ? "fc1" : "fc2");
    check_same_device(*w, x, op, w == &fc1 ? "fc1" : "fc2");
  }
  l.x = x.contiguous(), l.fc1 = fc1.contiguous(), l.fc2 = fc2.contiguous();
  l.row_token = checked_index(row_token, 1, x, op, "row_token");
  l.slot_row = checked_index(slot_row, 2, x, op, "slot_row");
  l.T = x.size(0), l.K = slot_row.size(1), l.R = row_token.size(0);
  l.E = fc1.size(0), l.D = x.size(1), l.F = fc2.size(2);
  MOETRAIN_CHECK(slot_row.size(0) == l.T, op, ": the plan is for ", slot_row.size(0), " tokens, x has ", l.T);
  MOETRAIN_CHECK(fc1.size(1) == 2 * l.F && fc1.size(2) == l.D && fc2.size(0) == l.E && fc2.size(1) == l.D, op,
                 ": fc1 is ", fc1.sizes(), " and fc2 ", fc2.sizes(), "; with x of ", l.D,
                 " columns they must be [E, 2F, ", l.D, "] and [E, ", l.D, ", F]");
  check_dim(tokens_per_expert, 1, op, "tokens_per_expert");
  check_dtype(tokens_per_expert, at::kLong, op, "tokens_per_expert");
  MOETRAIN_CHECK(tokens_per_expert.size(0) == l.E, op, ": tokens_per_expert has ", tokens_per_expert.size(0),
                 " entries for ", l.E, " experts");
  l.first = first_rows(tokens_per_expert, l.R, op);
  l.row_slot = slots_of_rows(l.slot_row, l.R, op);
  for (int64_t r = 0; r < l.R; ++r) {
    MOETRAIN_CHECK(l.token()[r] == l.row_slot[r] / l.K, op, ": row_token[", r, "] is ", l.token()[r],
                   ", slot_row says ", l.row_slot[r] / l.K);
  }
  if (weights) {
    check_dtype(*weights, at::kFloat, op, "weights");
    check_same_device(*weights, x, op, "weights");
    MOETRAIN_CHECK(weights->sizes() == slot_row.sizes(), op, ": weights have shape ", weights->sizes(),
                   ", the plan is for ", slot_row.sizes());
    l.weights = weights->contiguous();
  }
  return l;
}

#if defined(__x86_64__)
bool use_amx(const Layer& l) {
  return l.x.scalar_type() == at::kBFloat16 && amx::fits(l.F) && widest_isa() == Isa::kAmx;
}

amx::ExpertLayer for_amx(const Layer& l) {
  return {l.T, l.K, l.R, l.E, l.D, l.F, data<bf16>(l.x), l.weight(), data<bf16>(l.fc1), data<bf16>(l.fc2),
          l.token(), l.row_slot.data(), l.first.data()};
}
#endif

template <class T>
void experts(const Layer& l, const Tensor& z, const Tensor& rows) {
  multiply(fprop_groups(data<T>(l.x), l.token(), data<T>(l.fc1), data<T>(z), l.first, 2 * l.F, l.D), l.threads());
  const Tensor hidden = at::empty({l.R, l.F}, l.x.options());
  swiglu(data<T>(z), l.R, l.F, data<T>(hidden), l.threads());
  multiply(fprop_groups<T>(data<T>(hidden), nullptr, data<T>(l.fc2), data<T>(rows), l.first, l.D, l.F), l.threads());
}

template <class T>
std::tuple<Tensor, Tensor> forward(const Layer& l, bool save) {
  Tensor z = at::empty({save ? l.R : 0, 2 * l.F}, l.x.options());
  const Tensor rows = at::empty({l.R, l.D}, l.x.options());
#if defined(__x86_64__)
  if (use_amx(l)) {
    amx::forward(for_amx(l), save ? data<bf16>(z) : nullptr, data<bf16>(rows), l.threads());
  } else
#endif
  {
    experts<T>(l, save ? z : at::empty({l.R, 2 * l.F}, l.x.options()), rows);
  }
  Tensor y = at::empty({l.T, l.D}, l.x.options());
  combine_rows(data<T>(rows), l.weight(), l.slot_row.const_data_ptr<int64_t>(), l.T, l.K, l.D, data<T>(y),
               num_threads(l.R * l.D));
  return {y, z};
}

enum Wanted { kX, kWeights, kFc1, kFc2 };

// Everything that backward writes, allocated: an unwanted gradient has no elements.
struct Gradients {
  Tensor x, weights, fc1, fc2, x_rows, z, weighted;

  Gradients(const Layer& l, const std::array<bool, 4>& wanted) {
    const auto like = l.x.options();
    const auto make = [&](bool want, at::IntArrayRef shape) { return want ? at::empty(shape, like) : at::empty({0}, like); };
    x = make(wanted[kX], {l.T, l.D});
    x_rows = make(wanted[kX], {l.R, l.D});
    fc1 = make(wanted[kFc1], l.fc1.sizes());
    fc2 = make(wanted[kFc2], l.fc2.sizes());
    z = at::empty({l.R, 2 * l.F}, like);
    weighted = at::empty({l.R, l.F}, like);  // the activation times the row's weight
    const bool dweights = wanted[kWeights] && l.weights.defined();
    weights = dweights ? at::zeros(l.weights.sizes(), l.weights.options()) : at::empty({0}, like.dtype(at::kFloat));
  }
};

template <class T>
T* if_any(const Tensor& t) {
  return t.numel() > 0 ? data<T>(t) : nullptr;
}

template <class T>
void backward_of_experts(const Layer& l, const Tensor& grad, const Tensor& z, const Gradients& to) {
  // An expert without rows still has a gradient to write.
  const int threads = gemm_threads(std::max(l.R, l.E) * l.D * l.F);
#if defined(__x86_64__)
  if (use_amx(l)) {
    amx::backward(for_amx(l), data<bf16>(grad), data<bf16>(z),
                  {if_any<bf16>(to.x_rows), if_any<float>(to.weights), if_any<bf16>(to.fc1), if_any<bf16>(to.fc2),
                   data<bf16>(to.z), to.fc2.numel() > 0 ? data<bf16>(to.weighted) : nullptr},
                  threads);
    return;
  }
#endif
  multiply(dgrad_groups(data<T>(grad), l.token(), data<T>(l.fc2), data<T>(to.weighted), l.first, l.D, l.F), threads);
  swiglu_backward(data<T>(z), l.weight(), l.row_slot.data(), l.R, l.F, data<T>(to.weighted), data<T>(to.z),
                  if_any<float>(to.weights), threads);
  if (to.x_rows.numel() > 0) {
    multiply(dgrad_groups<T>(data<T>(to.z), nullptr, data<T>(l.fc1), data<T>(to.x_rows), l.first, 2 * l.F, l.D),
             threads);
  }
  if (to.fc2.numel() > 0) {
    multiply(wgrad_groups<T, T>(data<T>(grad), l.token(), data<T>(to.weighted), nullptr, data<T>(to.fc2), l.first, l.D,
                                l.F, false),
             threads);
  }
  if (to.fc1.numel() > 0) {
    multiply(wgrad_groups<T, T>(data<T>(to.z), nullptr, data<T>(l.x), l.token(), data<T>(to.fc1), l.first, 2 * l.F,
                                l.D, false),
             threads);
  }
}

template <class T>
Gradients backward(const Layer& l, const Tensor& grad, const Tensor& z, const std::array<bool, 4>& wanted) {
  const Gradients to(l, wanted);
  backward_of_experts<T>(l, grad, z, to);
  if (wanted[kX]) {
    combine_rows<T>(data<T>(to.x_rows), nullptr, l.slot_row.const_data_ptr<int64_t>(), l.T, l.K, l.D, data<T>(to.x),
                    num_threads(l.R * l.D));
  }
  return to;
}

std::tuple<Tensor, Tensor> expert_layer_forward(const Tensor& x, const std::optional<Tensor>& weights,
                                                const Tensor& fc1, const Tensor& fc2, const Tensor& row_token,
                                                const Tensor& slot_row, const Tensor& tokens_per_expert, bool save) {
  const Layer l = check(x, weights, fc1, fc2, row_token, slot_row, tokens_per_expert, "expert_layer");
  return x.scalar_type() == at::kFloat ? forward<float>(l, save) : forward<bf16>(l, save);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> expert_layer_backward(
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weights, const Tensor& fc1, const Tensor& fc2,
    const Tensor& row_token, const Tensor& slot_row, const Tensor& tokens_per_expert, const Tensor& z,
    std::array<bool, 4> wanted) {
  const char* op = "expert_layer backward";
  const Layer l = check(x, weights, fc1, fc2, row_token, slot_row, tokens_per_expert, op);
  check_dtype(grad, x.scalar_type(), op, "grad");
  check_dtype(z, x.scalar_type(), op, "z");
  MOETRAIN_CHECK(grad.sizes() == x.sizes(), op, ": grad has shape ", grad.sizes(), ", x ", x.sizes());
  MOETRAIN_CHECK(z.dim() == 2 && z.size(0) == l.R && z.size(1) == 2 * l.F, op, ": z has shape ", z.sizes(),
                 ", it must be [", l.R, ", ", 2 * l.F, "]");
  const Tensor g = grad.contiguous(), saved = z.contiguous();
  const Gradients to = x.scalar_type() == at::kFloat ? backward<float>(l, g, saved, wanted)
                                                     : backward<bf16>(l, g, saved, wanted);
  return {to.x, to.weights, to.fc1, to.fc2};
}

}  // namespace

TORCH_LIBRARY_IMPL(moetrain, CPU, m) {
  m.impl("expert_layer_forward", &expert_layer_forward);
  m.impl("expert_layer_backward", &expert_layer_backward);
}

}  // namespace moetrain
