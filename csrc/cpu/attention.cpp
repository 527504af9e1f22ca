// Torch-facing side of attention_kernel. Legend: S positions, B sequences, H query heads, G key heads, d head width.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

#include "check.h"
#include "cpu/attention_kernel.h"

namespace moetrain {
namespace {

using at::Tensor;

Measure measure_of(c10::string_view name, const char* op) {
  constexpr std::pair<std::string_view, Measure> kMeasures[] = {{"self_weight", Measure::kSelfWeight},
                                                                {"row_max", Measure::kRowMax},
                                                                {"row_entropy", Measure::kRowEntropy},
                                                                {"col_max", Measure::kColMax},
                                                                {"col_sum", Measure::kColSum}};
  for (const auto& [known, measure] : kMeasures) {
    if (known == std::string_view(name.data(), name.size())) return measure;
  }
  MOETRAIN_CHECK(false, op, ": measure is '", name,
                 "'; it must be self_weight, row_max, row_entropy, col_max or col_sum");
}

bool of_rows(Measure measure) { return measure != Measure::kColMax && measure != Measure::kColSum; }

void check_heads(const Tensor& q, const Tensor& k, double scale, const char* op) {
  check_float_or_bf16(q, op, "q");
  check_dim(q, 4, op, "q");
  check_dim(k, 4, op, "k");
  check_dtype(k, q.scalar_type(), op, "k");
  check_same_device(k, q, op, "k");
  MOETRAIN_CHECK(k.size(0) == q.size(0) && k.size(1) == q.size(1) && k.size(3) == q.size(3) && k.size(2) > 0 &&
                     q.size(2) % k.size(2) == 0,
                 op, ": q is ", q.sizes(), " and k ", k.sizes(), "; they must be [S, B, H, d] and [S, B, G, d] with H a ",
                 "multiple of G");
  MOETRAIN_CHECK(scale > 0 && std::isfinite(scale), op, ": scale is ", scale, "; it must be above zero");
}

// Contiguous, or nothing; alive as long as the shape that points to it.
Tensor checked_valid(const std::optional<Tensor>& valid, const Tensor& q, const char* op) {
  if (!valid) return {};
  check_dim(*valid, 2, op, "valid");
  check_dtype(*valid, at::kBool, op, "valid");
  check_same_device(*valid, q, op, "valid");
  MOETRAIN_CHECK(valid->size(0) == q.size(1) && valid->size(1) == q.size(0), op, ": valid is ", valid->sizes(),
                 ", it must be [B, S] = [", q.size(1), ", ", q.size(0), "]");
  return valid->contiguous();
}

AttentionShape shape_of(const Tensor& q, const Tensor& k, bool causal, double scale, const Tensor& valid) {
  return {q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), causal, static_cast<float>(scale),
          valid.defined() ? valid.const_data_ptr<bool>() : nullptr};
}

// As the kernels read it: the strides are the tensor's, the last axis contiguous.
Tensor readable(const Tensor& t) { return t.size(3) <= 1 || t.stride(3) == 1 ? t : t.contiguous(); }

template <class T>
Heads<T> heads_of(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

int threads_for(const AttentionShape& shape) {
  return num_threads(shape.seq * shape.seq * shape.batch * shape.heads * shape.depth / 64);
}

Tensor workspace_of(size_t bytes) { return at::empty({static_cast<int64_t>(bytes)}, at::dtype(at::kByte)); }

Tensor per_head(const AttentionShape& shape) {
  return at::empty({shape.batch, shape.heads, shape.seq}, at::dtype(at::kFloat));
}

Tensor summed(const Tensor& statistic, const AttentionShape& shape) {
  Tensor sum = at::empty({shape.seq, shape.batch}, at::dtype(at::kFloat));
  sum_over_heads(statistic.const_data_ptr<float>(), shape, sum.mutable_data_ptr<float>(), num_threads(statistic.numel()));
  return sum;
}

template <class T>
void run_forward(Attention<T> a) {
  const int threads = threads_for(a.shape);
  const Tensor workspace = workspace_of(attention_workspace(a, threads));
  attention_forward(a, threads, workspace.mutable_data_ptr());
}

template <class T>
void run_from_lse(const FromLse<T>& a) {
  const int threads = threads_for(a.shape);
  if (a.measure == Measure::kSelfWeight) return self_weight(a, threads);
  if (of_rows(a.measure)) return run_forward<T>({a.shape, a.q, a.k, {}, nullptr, nullptr, a.statistic, a.measure});
  const Tensor workspace = workspace_of(received_workspace(a, threads));
  attention_received(a, threads, workspace.mutable_data_ptr());
}

template <class T>
Tensor importance(const AttentionShape& shape, const Tensor& q, const Tensor& k, const Tensor& lse, Measure measure) {
  const Tensor statistic = per_head(shape);
  run_from_lse<T>({shape, heads_of<T>(q), heads_of<T>(k), lse.const_data_ptr<float>(),
                   statistic.mutable_data_ptr<float>(), measure});
  return summed(statistic, shape);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const AttentionShape& shape, const Tensor& q, const Tensor& k,
                                           const Tensor& v, Measure measure) {
  const Tensor out = at::empty(q.sizes(), q.options()), lse = per_head(shape);
  const bool one_pass = of_rows(measure);
  const Tensor statistic = one_pass ? per_head(shape) : Tensor();
  run_forward<T>({shape, heads_of<T>(q), heads_of<T>(k), heads_of<T>(v), static_cast<T*>(out.mutable_data_ptr()),
                  lse.mutable_data_ptr<float>(), one_pass ? statistic.mutable_data_ptr<float>() : nullptr,
                  one_pass ? measure : Measure::kNone});
  return {out, lse, one_pass ? summed(statistic, shape) : importance<T>(shape, q, k, lse, measure)};
}

std::tuple<Tensor, Tensor, Tensor> attention_forward_op(const Tensor& q_given, const Tensor& k_given,
                                                        const Tensor& v_given, c10::string_view measure_name,
                                                        bool causal, double scale, const std::optional<Tensor>& valid_given) {
  const char* op = "attention_forward";
  check_heads(q_given, k_given, scale, op);
  check_dtype(v_given, q_given.scalar_type(), op, "v");
  check_same_device(v_given, q_given, op, "v");
  MOETRAIN_CHECK(v_given.sizes() == k_given.sizes(), op, ": v is ", v_given.sizes(), ", it must be as k, ",
                 k_given.sizes());
  const Measure measure = measure_of(measure_name, op);
  const Tensor q = readable(q_given), k = readable(k_given), v = readable(v_given);
  const Tensor valid = checked_valid(valid_given, q, op);
  const auto run = q.scalar_type() == at::kFloat ? &forward<float> : &forward<bf16>;
  return run(shape_of(q, k, causal, scale, valid), q, k, v, measure);
}

Tensor importance_from_lse(const Tensor& q_given, const Tensor& k_given, const Tensor& lse, c10::string_view measure_name,
                           bool causal, double scale, const std::optional<Tensor>& valid_given) {
  const char* op = "importance_from_lse";
  check_heads(q_given, k_given, scale, op);
  check_dtype(lse, at::kFloat, op, "lse");
  check_same_device(lse, q_given, op, "lse");
  const Tensor q = readable(q_given), k = readable(k_given);
  MOETRAIN_CHECK((lse.sizes() == at::IntArrayRef{q.size(1), q.size(2), q.size(0)}), op, ": lse is ", lse.sizes(),
                 ", it must be [B, H, S] of q, ", q.sizes());
  const Measure measure = measure_of(measure_name, op);
  const Tensor valid = checked_valid(valid_given, q, op);
  const auto run = q.scalar_type() == at::kFloat ? &importance<float> : &importance<bf16>;
  return run(shape_of(q, k, causal, scale, valid), q, k, lse.contiguous(), measure);
}

}  // namespace

TORCH_LIBRARY_IMPL(moetrain, CPU, m) {
  m.impl("attention_forward", &attention_forward_op);
  m.impl("importance_from_lse", &importance_from_lse);
}

}  // namespace moetrain
