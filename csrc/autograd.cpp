// The gradients of the operators, in C++: no interpreter between a step's kernels, and no lock of it to wait for.
// A backward is made of operators of this library, called through the dispatcher, so it is the same for every device.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

namespace moetrain {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

template <class Signature>
struct Operator;

template <class Result, class... Arguments>
struct Operator<Result(Arguments...)> {
  explicit Operator(const char* name)
      : handle(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Result(Arguments...)>()) {}
  Result operator()(Arguments... arguments) const { return handle.call(arguments...); }
  c10::TypedOperatorHandle<Result(Arguments...)> handle;
};

using OfPlan = Tensor(const Tensor&, const Tensor&, const Tensor&);

Tensor call_of_plan(const char* name, const Tensor& x, const Tensor& first, const Tensor& second) {
  return Operator<OfPlan>(name)(x, first, second);
}

// permute_rows and unpermute_rows are each other's adjoints.
template <bool kPermute>
struct Permute : Function<Permute<kPermute>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& row_token, const Tensor& slot_row) {
    ctx->save_for_backward({row_token, slot_row});
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_of_plan(kPermute ? "moetrain::permute_rows" : "moetrain::unpermute_rows", x, row_token, slot_row);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const char* adjoint = kPermute ? "moetrain::unpermute_rows" : "moetrain::permute_rows";
    return {call_of_plan(adjoint, grads[0], saved[0], saved[1]), {}, {}};
  }
};

struct CombineRows : Function<CombineRows> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Tensor& weights, const Tensor& slot_row) {
    ctx->save_for_backward({rows, weights, slot_row});
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_of_plan("moetrain::combine_rows", rows, weights, slot_row);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const Operator<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&)> run(
        "moetrain::combine_rows_backward");
    const auto saved = ctx->get_saved_variables();
    auto [rows, weights] = run(grads[0], saved[0], saved[1], saved[2]);
    return {rows, weights, {}};
  }
};

struct GroupedGemm : Function<GroupedGemm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& w, const Tensor& tokens_per_expert) {
    // The gradient of x needs the weight and that of the weight x: what nobody needs is not kept alive.
    ctx->save_for_backward({w.requires_grad() ? x : Tensor(), x.requires_grad() ? w : Tensor(), tokens_per_expert});
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_of_plan("moetrain::grouped_gemm", x, w, tokens_per_expert);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor grad = grads[0].contiguous();
    Tensor dx, dw;
    if (ctx->needs_input_grad(0)) dx = call_of_plan("moetrain::grouped_gemm_dgrad", grad, saved[1], saved[2]);
    if (ctx->needs_input_grad(1)) dw = call_of_plan("moetrain::grouped_gemm_wgrad", grad, saved[0], saved[2]);
    return {dx, dw, {}};
  }
};

using MaybeTensor = std::optional<Tensor>;

struct ExpertLayer : Function<ExpertLayer> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const MaybeTensor& weights, const Tensor& fc1,
                               const Tensor& fc2, const Tensor& row_token, const Tensor& slot_row,
                               const Tensor& tokens_per_expert, bool save) {
    static const Operator<std::tuple<Tensor, Tensor>(const Tensor&, const MaybeTensor&, const Tensor&, const Tensor&,
                                                     const Tensor&, const Tensor&, const Tensor&, bool)>
        run("moetrain::expert_layer_forward");
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, z] = run(x, weights, fc1, fc2, row_token, slot_row, tokens_per_expert, save);
    ctx->mark_non_differentiable({z});
    ctx->set_materialize_grads(false);
    if (save) {
      ctx->save_for_backward(
          {x, weights.value_or(Tensor()), fc1, fc2, row_token, slot_row, tokens_per_expert, z});
    }
    return {y, z};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const Operator<std::tuple<Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const MaybeTensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
        const Tensor&, const Tensor&, std::array<bool, 4>)>
        run("moetrain::expert_layer_backward");
    if (!grads[0].defined()) return variable_list(8);
    const auto s = ctx->get_saved_variables();
    TORCH_CHECK(!s.empty(), "moetrain: expert_layer: the forward was told that no gradient is wanted (save)");
    const MaybeTensor weights = s[1].defined() ? MaybeTensor(s[1]) : std::nullopt;
    // An absent tensor has no edge, so the edges after it move up.
    const size_t fc1 = weights ? 2 : 1;
    const std::array<bool, 4> wanted = {ctx->needs_input_grad(0), weights && ctx->needs_input_grad(1),
                                        ctx->needs_input_grad(fc1), ctx->needs_input_grad(fc1 + 1)};
    const auto [dx, dweights, dfc1, dfc2] = run(grads[0], s[0], weights, s[2], s[3], s[4], s[5], s[6], s[7], wanted);
    const auto given = [&](int i, const Tensor& gradient) { return wanted[i] ? gradient : Tensor(); };
    return {given(0, dx), given(1, dweights), given(2, dfc1), given(3, dfc2), {}, {}, {}, {}};
  }
};

struct GeneratedExperts : Function<GeneratedExperts> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& down, const Tensor& down_bias,
                               const Tensor& up, const Tensor& up_bias, const Tensor& row_token,
                               const Tensor& tokens_per_set) {
    static const Operator<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                     const Tensor&, const Tensor&, const Tensor&)>
        run("moetrain::generated_experts");
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, z] = run(x, down, down_bias, up, up_bias, row_token, tokens_per_set);
    ctx->mark_non_differentiable({z});
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({x, down, up, row_token, tokens_per_set, z});
    return {y, z};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const Operator<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&)>
        run("moetrain::generated_experts_backward");
    if (!grads[0].defined()) return variable_list(7);
    const auto s = ctx->get_saved_variables();
    const auto [dx, ddown, ddown_bias, dup, dup_bias] = run(grads[0], s[0], s[1], s[2], s[3], s[4], s[5]);
    return {dx, ddown, ddown_bias, dup, dup_bias, {}, {}};
  }
};

Tensor permute_rows(const Tensor& x, const Tensor& row_token, const Tensor& slot_row) {
  return Permute<true>::apply(x, row_token, slot_row);
}

Tensor unpermute_rows(const Tensor& rows, const Tensor& row_token, const Tensor& slot_row) {
  return Permute<false>::apply(rows, row_token, slot_row);
}

Tensor combine_rows(const Tensor& rows, const Tensor& weights, const Tensor& slot_row) {
  return CombineRows::apply(rows, weights, slot_row);
}

Tensor grouped_gemm(const Tensor& x, const Tensor& w, const Tensor& tokens_per_expert) {
  return GroupedGemm::apply(x, w, tokens_per_expert);
}

std::tuple<Tensor, Tensor> expert_layer_forward(const Tensor& x, const MaybeTensor& weights, const Tensor& fc1,
                                                const Tensor& fc2, const Tensor& row_token, const Tensor& slot_row,
                                                const Tensor& tokens_per_expert, bool save) {
  const variable_list out = ExpertLayer::apply(x, weights, fc1, fc2, row_token, slot_row, tokens_per_expert, save);
  return {out[0], out[1]};
}

std::tuple<Tensor, Tensor> generated_experts(const Tensor& x, const Tensor& down, const Tensor& down_bias,
                                             const Tensor& up, const Tensor& up_bias, const Tensor& row_token,
                                             const Tensor& tokens_per_set) {
  const variable_list out = GeneratedExperts::apply(x, down, down_bias, up, up_bias, row_token, tokens_per_set);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(moetrain, Autograd, m) {
  m.impl("permute_rows", &permute_rows);
  m.impl("unpermute_rows", &unpermute_rows);
  m.impl("combine_rows", &combine_rows);
  m.impl("grouped_gemm", &grouped_gemm);
  m.impl("expert_layer_forward", &expert_layer_forward);
  m.impl("generated_experts", &generated_experts);
}

}  // namespace moetrain
