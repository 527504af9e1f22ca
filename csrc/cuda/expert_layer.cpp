// The experts of one rank as one operator on the GPU: gather, fc1, SwiGLU, fc2, weighted combine, and their gradients.
// Nothing waits for the device. Legend: T tokens, K slots a token, R routed rows, E experts, D hidden, F expert width.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "cuda/gemm.h"
#include "cuda/rows.h"
#include "cuda/torch_side.h"

namespace moetrain::cuda {
namespace {

// The arguments of both directions, checked and contiguous.
struct Layer {
  Tensor x, fc1, fc2, row_token, slot_row, counts;
  std::optional<Tensor> weights;

  int64_t width() const { return fc2.size(2); }
};

void check_weights(const Tensor& w, const Tensor& x, at::IntArrayRef shape, const char* op, const char* name) {
  check_dtype(w, x.scalar_type(), op, name);
  check_same_device(w, x, op, name);
  MOETRAIN_CHECK(w.sizes() == shape, op, ": ", name, " must have shape ", shape, ", it has ", w.sizes());
}

Layer checked(const Tensor& x, const std::optional<Tensor>& weights, const Tensor& fc1, const Tensor& fc2,
              const Tensor& row_token, const Tensor& slot_row, const Tensor& tokens_per_expert, const char* op) {
  check_dim(x, 2, op, "x");
  check_dim(fc2, 3, op, "fc2");
  check_groups(x, tokens_per_expert, fc2.size(0), op);
  const int64_t experts = fc2.size(0), hidden = x.size(1), width = fc2.size(2);
  check_weights(fc1, x, {experts, 2 * width, hidden}, op, "fc1");
  check_weights(fc2, x, {experts, hidden, width}, op, "fc2");
  const Tensor slots = checked_index(slot_row, 2, x, op, "slot_row");
  MOETRAIN_CHECK(slots.size(0) == x.size(0), op, ": the plan is for ", slots.size(0), " tokens, x has ", x.size(0));
  Layer layer = {x.contiguous(), fc1.contiguous(), fc2.contiguous(), checked_index(row_token, 1, x, op, "row_token"),
                 slots, tokens_per_expert.contiguous(), std::nullopt};
  if (weights) layer.weights = checked_weights(*weights, slots, x, op);
  return layer;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& weights, const Tensor& fc1,
                                   const Tensor& fc2, const Tensor& row_token, const Tensor& slot_row,
                                   const Tensor& tokens_per_expert, bool save) {
  const char* op = "expert_layer";
  const Layer l = checked(x, weights, fc1, fc2, row_token, slot_row, tokens_per_expert, op);
  const c10::DeviceGuard guard(x.device());
  const Activated fc1_out = swiglu_product({l.x, l.row_token}, l.fc1, l.counts, save, op);
  const Tensor rows = row_product(Product::kForward, {fc1_out.h, std::nullopt}, l.fc2, l.counts, op);
  return {combine(rows, l.weights, l.slot_row, op), fc1_out.z};
}

// The pass between the products: dh (the gradient of fc2's input before the routing weight; may be absent when only hw
// is wanted) becomes hw = weight * h in place, and dz and the weights' gradients are computed.
struct Between {
  Tensor hw, dz, dweights;
};

Between activation_backward(const Layer& l, const Tensor& z, const Tensor& dh, bool want_hw, bool want_dz,
                            bool want_weights, const char* op) {
  const auto empty = [&](bool wanted, at::IntArrayRef shape, const at::TensorOptions& options) {
    return wanted ? at::empty(shape, options) : at::empty({0}, options);
  };
  Between to;
  if (want_hw) to.hw = dh.defined() ? dh : at::empty({z.size(0), l.width()}, z.options());
  to.dz = empty(want_dz, z.sizes(), z.options());
  to.dweights = empty(want_weights, l.slot_row.sizes(), z.options().dtype(at::kFloat));
  check_launch(moetrain_cuda_swiglu_backward(
                   z.const_data_ptr(), dh.defined() ? dh.const_data_ptr() : nullptr, z.size(0),
                   l.weights ? l.weights->const_data_ptr<float>() : nullptr, l.slot_row.const_data_ptr<int64_t>(),
                   l.slot_row.numel(), l.width(), dtype_code(z), want_hw ? to.hw.data_ptr() : nullptr,
                   want_dz ? to.dz.data_ptr() : nullptr, want_weights ? to.dweights.data_ptr<float>() : nullptr,
                   current_stream(z)),
               op);
  return to;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x,
                                                    const std::optional<Tensor>& weights, const Tensor& fc1,
                                                    const Tensor& fc2, const Tensor& row_token,
                                                    const Tensor& slot_row, const Tensor& tokens_per_expert,
                                                    const Tensor& z, std::array<bool, 4> wanted) {
  const char* op = "expert_layer backward";
  const auto [want_x, want_weights_, want_fc1, want_fc2] = wanted;
  const bool want_weights = want_weights_ && weights.has_value(), want_dz = want_x || want_fc1;
  const Layer l = checked(x, weights, fc1, fc2, row_token, slot_row, tokens_per_expert, op);
  check_weights(grad, x, x.sizes(), op, "grad");
  check_weights(z, x, {l.row_token.size(0), 2 * l.width()}, op, "z (was the forward told to save it?)");
  const c10::DeviceGuard guard(x.device());
  // Torch's product cannot gather: rows are gathered once for both products that read them.
  const Routed grad_rows =
      prepared({grad.contiguous(), l.row_token}, through_torch(x, fc2.size(1), fc2.size(2)), op);
  Tensor dh;
  if (want_dz || want_weights) dh = row_product(Product::kInputGradient, grad_rows, l.fc2, l.counts, op);
  const Between between = activation_backward(l, z.contiguous(), dh, want_fc2, want_dz, want_weights, op);

  const Tensor none = at::empty({0}, x.options());
  Tensor dx = none, dfc1 = none, dfc2 = none;
  if (want_fc2) dfc2 = weight_gradient(grad_rows, {between.hw, std::nullopt}, l.counts, op);
  const Routed dz = {between.dz, std::nullopt};
  if (want_x) dx = combine(row_product(Product::kInputGradient, dz, l.fc1, l.counts, op), std::nullopt, l.slot_row, op);
  if (want_fc1) dfc1 = weight_gradient(dz, {l.x, l.row_token}, l.counts, op);
  return {dx, between.dweights, dfc1, dfc2};
}

}  // namespace

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) {
  m.impl("expert_layer_forward", &forward);
  m.impl("expert_layer_backward", &backward);
}

}  // namespace moetrain::cuda
