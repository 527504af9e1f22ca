// The schemas of the library, and nothing else: one line an operator. Kernels register themselves in
// cpu/, comm/ and cuda/; autograd formulas and fake kernels live in moetrain/ops/*.py.
#include <torch/library.h>
#include <torch/version.h>

#include <string>

#include "cpu/isa.h"

namespace {

std::string build_info() {
#ifdef MOETRAIN_WITH_CUDA
  const std::string cuda = "cuda";
#else
  const std::string cuda = "cpu";
#endif
  return std::string(TORCH_VERSION) + ";" + moetrain::isa_name(moetrain::widest_isa()) + ";" + cuda;
}

}  // namespace

TORCH_LIBRARY(moetrain, m) {
  // "torch version of the build; instruction set chosen for this CPU; cpu|cuda"
  m.def("build_info() -> str", &build_info);

  m.def(
      "plan_permutation(Tensor expert_ids, int num_experts) -> "
      "(Tensor row_token, Tensor row_slot, Tensor slot_row, Tensor tokens_per_expert)");
  m.def("permute_rows(Tensor x, Tensor row_token, Tensor slot_row) -> Tensor");
  m.def("unpermute_rows(Tensor rows, Tensor row_token, Tensor slot_row) -> Tensor");
  m.def("combine_rows(Tensor rows, Tensor weights, Tensor slot_row) -> Tensor");
  m.def(
      "combine_rows_backward(Tensor grad, Tensor rows, Tensor weights, Tensor slot_row) -> "
      "(Tensor grad_rows, Tensor grad_weights)");

  m.def("grouped_gemm(Tensor x, Tensor w, Tensor tokens_per_expert) -> Tensor");
  m.def("grouped_gemm_dgrad(Tensor grad, Tensor w, Tensor tokens_per_expert) -> Tensor");
  m.def("grouped_gemm_wgrad(Tensor grad, Tensor x, Tensor tokens_per_expert) -> Tensor");
  m.def("gathered_grouped_gemm(Tensor x, Tensor w, Tensor row_source, Tensor tokens_per_expert) -> Tensor");
  m.def(
      "grouped_gemm_wgrad_out(Tensor grad, Tensor x, Tensor tokens_per_expert, Tensor(a!) out, bool accumulate) -> ()");

  // z is the output of fc1, kept for the backward when save is set, else empty.
  m.def(
      "expert_layer_forward(Tensor x, Tensor? weights, Tensor fc1, Tensor fc2, Tensor row_token, Tensor slot_row, "
      "Tensor tokens_per_expert, bool save) -> (Tensor y, Tensor z)");
  // wanted: gradients of x, weights, fc1, fc2; one that is not wanted comes back with no elements.
  m.def(
      "expert_layer_backward(Tensor grad, Tensor x, Tensor? weights, Tensor fc1, Tensor fc2, Tensor row_token, "
      "Tensor slot_row, Tensor tokens_per_expert, Tensor z, bool[4] wanted) -> "
      "(Tensor dx, Tensor dweights, Tensor dfc1, Tensor dfc2)");

  // z: the activations [T, r], in the order of the rows.
  m.def(
      "generated_experts(Tensor x, Tensor down, Tensor down_bias, Tensor up, Tensor up_bias, Tensor row_token, "
      "Tensor tokens_per_set) -> (Tensor y, Tensor z)");
  m.def(
      "generated_experts_backward(Tensor grad, Tensor x, Tensor down, Tensor up, Tensor row_token, "
      "Tensor tokens_per_set, Tensor z) -> "
      "(Tensor dx, Tensor ddown, Tensor ddown_bias, Tensor dup, Tensor dup_bias)");

  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, str measure, bool causal, float scale, Tensor? valid) -> "
      "(Tensor out, Tensor lse, Tensor importance)");
  m.def(
      "importance_from_lse(Tensor q, Tensor k, Tensor lse, str measure, bool causal, float scale, Tensor? valid) -> "
      "Tensor");

  m.def("all_to_all(Tensor x, SymInt[] output_splits, SymInt[] input_splits, str group_name) -> Tensor");
}
