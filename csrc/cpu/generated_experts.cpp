// Torch-facing side of HyperMoE's generated experts: y[t] = up_g relu(down_g x[t] + down_bias_g) + up_bias_g for the set
// g of token t. Gathers and scatters ride on the packing and the stores of the grouped products, so no pass over rows is
// left but the biases'. Legend: T tokens, G sets, D hidden size, r bottleneck; rows are tokens sorted by set.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/bias_kernel.h"
#include "cpu/groups.h"

namespace moetrain {
namespace {

using at::Tensor;

struct Sets {
  Tensor x, down, up, row_token;
  std::vector<int64_t> first;
  int64_t T, G, D, r;

  const int64_t* token() const { return row_token.const_data_ptr<int64_t>(); }
  int threads() const { return gemm_threads(T * D * r); }
};

Sets check(const Tensor& x, const Tensor& down, const Tensor& up, const Tensor& row_token, const Tensor& tokens_per_set,
           const char* op) {
  Sets s;
  check_dim(x, 2, op, "x");
  check_float_or_bf16(x, op, "x");
  for (const Tensor* w : {&down, &up}) {
    const char* name = w == &down ? "down" : "up";
    check_dim(*w, 3, op, name);
    check_dtype(*w, x.scalar_type(), op, name);
    check_same_device(*w, x, op, name);
  }
  s.x = x.contiguous(), s.down = down.contiguous(), s.up = up.contiguous();
  s.T = x.size(0), s.D = x.size(1), s.G = down.size(0), s.r = down.size(1);
  MOETRAIN_CHECK(down.size(2) == s.D && up.size(0) == s.G && up.size(1) == s.D && up.size(2) == s.r, op, ": down is ",
                 down.sizes(), " and up ", up.sizes(), "; with x of ", s.D, " columns they must be [G, r, ", s.D,
                 "] and [G, ", s.D, ", r]");
  s.row_token = checked_index(row_token, 1, x, op, "row_token");
  MOETRAIN_CHECK(row_token.size(0) == s.T, op, ": row_token has ", row_token.size(0), " entries for ", s.T, " tokens");
  std::vector<bool> seen(s.T, false);
  for (int64_t i = 0; i < s.T; ++i) {
    const int64_t t = s.token()[i];
    MOETRAIN_CHECK(t >= 0 && t < s.T && !seen[t], op, ": row_token[", i, "] is ", t, "; it must name each of ", s.T,
                   " tokens once");
    seen[t] = true;
  }
  check_dim(tokens_per_set, 1, op, "tokens_per_set");
  check_dtype(tokens_per_set, at::kLong, op, "tokens_per_set");
  MOETRAIN_CHECK(tokens_per_set.size(0) == s.G, op, ": tokens_per_set has ", tokens_per_set.size(0), " entries for ",
                 s.G, " sets");
  s.first = first_rows(tokens_per_set, s.T, op);
  return s;
}

Tensor checked_bias(const Tensor& bias, int64_t groups, int64_t width, const Tensor& x, const char* op,
                    const char* name) {
  check_dtype(bias, x.scalar_type(), op, name);
  check_same_device(bias, x, op, name);
  MOETRAIN_CHECK(bias.dim() == 2 && bias.size(0) == groups && bias.size(1) == width, op, ": ", name, " has shape ",
                 bias.sizes(), ", it must be [", groups, ", ", width, "]");
  return bias.contiguous();
}

template <class T>
std::vector<Gemm<T>> to_tokens(std::vector<Gemm<T>> groups, T* y, const Sets& s) {
  for (size_t g = 0; g < groups.size(); ++g) groups[g].c = y, groups[g].c_index = s.token() + s.first[g];
  return groups;
}

template <class T>
std::tuple<Tensor, Tensor> forward(const Sets& s, const Tensor& down_bias, const Tensor& up_bias) {
  Tensor z = at::empty({s.T, s.r}, s.x.options()), y = at::empty({s.T, s.D}, s.x.options());
  multiply(fprop_groups(data<T>(s.x), s.token(), data<T>(s.down), data<T>(z), s.first, s.r, s.D), s.threads());
  add_bias(data<T>(z), nullptr, data<T>(down_bias), s.first.data(), s.G, s.r, true, num_threads(s.T * s.r));
  multiply(to_tokens(fprop_groups<T>(data<T>(z), nullptr, data<T>(s.up), data<T>(y), s.first, s.D, s.r), data<T>(y), s),
           s.threads());
  add_bias(data<T>(y), s.token(), data<T>(up_bias), s.first.data(), s.G, s.D, false, num_threads(s.T * s.D));
  return {y, z};
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
FiveTensors backward(const Sets& s, const Tensor& grad, const Tensor& z) {
  const auto like = s.x.options();
  Tensor dx = at::empty(s.x.sizes(), like), ddown = at::empty(s.down.sizes(), like), dup = at::empty(s.up.sizes(), like);
  Tensor ddown_bias = at::empty({s.G, s.r}, like), dup_bias = at::empty({s.G, s.D}, like);
  const Tensor dz = at::empty({s.T, s.r}, like);
  const int threads = gemm_threads(std::max(s.T, s.G) * s.D * s.r);  // a set without tokens has gradients to write
  sum_rows(data<T>(grad), s.token(), s.first.data(), s.G, s.D, data<T>(dup_bias), num_threads(s.T * s.D));
  multiply(dgrad_groups(data<T>(grad), s.token(), data<T>(s.up), data<T>(dz), s.first, s.D, s.r), threads);
  relu_backward(data<T>(z), s.T * s.r, data<T>(dz), num_threads(s.T * s.r));
  sum_rows<T>(data<T>(dz), nullptr, s.first.data(), s.G, s.r, data<T>(ddown_bias), num_threads(s.T * s.r));
  multiply(wgrad_groups<T, T>(data<T>(grad), s.token(), data<T>(z), nullptr, data<T>(dup), s.first, s.D, s.r, false),
           threads);
  multiply(wgrad_groups<T, T>(data<T>(dz), nullptr, data<T>(s.x), s.token(), data<T>(ddown), s.first, s.r, s.D, false),
           threads);
  multiply(to_tokens(dgrad_groups<T>(data<T>(dz), nullptr, data<T>(s.down), data<T>(dx), s.first, s.r, s.D),
                     data<T>(dx), s),
           threads);
  return {dx, ddown, ddown_bias, dup, dup_bias};
}

std::tuple<Tensor, Tensor> generated_experts(const Tensor& x, const Tensor& down, const Tensor& down_bias,
                                             const Tensor& up, const Tensor& up_bias, const Tensor& row_token,
                                             const Tensor& tokens_per_set) {
  const char* op = "generated_experts";
  const Sets s = check(x, down, up, row_token, tokens_per_set, op);
  const auto run = x.scalar_type() == at::kFloat ? &forward<float> : &forward<bf16>;
  return run(s, checked_bias(down_bias, s.G, s.r, x, op, "down_bias"),
             checked_bias(up_bias, s.G, s.D, x, op, "up_bias"));
}

FiveTensors generated_experts_backward(const Tensor& grad, const Tensor& x, const Tensor& down, const Tensor& up,
                                       const Tensor& row_token, const Tensor& tokens_per_set, const Tensor& z) {
  const char* op = "generated_experts backward";
  const Sets s = check(x, down, up, row_token, tokens_per_set, op);
  check_dtype(grad, x.scalar_type(), op, "grad");
  check_dtype(z, x.scalar_type(), op, "z");
  MOETRAIN_CHECK(grad.sizes() == x.sizes(), op, ": grad has shape ", grad.sizes(), ", x ", x.sizes());
  MOETRAIN_CHECK(z.dim() == 2 && z.size(0) == s.T && z.size(1) == s.r, op, ": z has shape ", z.sizes());
  const auto run = x.scalar_type() == at::kFloat ? &backward<float> : &backward<bf16>;
  return run(s, grad.contiguous(), z.contiguous());
}

}  // namespace

TORCH_LIBRARY_IMPL(moetrain, CPU, m) {
  m.impl("generated_experts", &generated_experts);
  m.impl("generated_experts_backward", &generated_experts_backward);
}

}  // namespace moetrain
