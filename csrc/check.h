// Argument checks shared by the torch-facing units. Every message names the operator, the argument, what it
// is and what it must be; they surface in Python as ValueError.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

namespace moetrain {

#define MOETRAIN_CHECK(condition, ...) TORCH_CHECK_VALUE(condition, "moetrain: ", __VA_ARGS__)

inline void check_dim(const at::Tensor& t, int64_t dim, const char* op, const char* name) {
  MOETRAIN_CHECK(t.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, it has shape ", t.sizes());
}

inline void check_dtype(const at::Tensor& t, at::ScalarType dtype, const char* op, const char* name) {
  MOETRAIN_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype, ", it is ", t.scalar_type());
}

inline void check_float_or_bf16(const at::Tensor& t, const char* op, const char* name) {
  MOETRAIN_CHECK(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16, op, ": ", name,
                 " must be float32 or bfloat16, it is ", t.scalar_type());
}

inline void check_same_device(const at::Tensor& t, const at::Tensor& like, const char* op, const char* name) {
  MOETRAIN_CHECK(t.device() == like.device(), op, ": ", name, " is on ", t.device(), " and must be on ",
                 like.device());
}

// A tensor of indices: int64, on the device of `like`, contiguous.
inline at::Tensor checked_index(const at::Tensor& t, int64_t dim, const at::Tensor& like, const char* op,
                                const char* name) {
  check_dim(t, dim, op, name);
  check_dtype(t, at::kLong, op, name);
  check_same_device(t, like, op, name);
  return t.contiguous();
}

// The checks of the three grouped GEMMs; `rows` holds one row a routed token.
inline void check_groups(const at::Tensor& rows, const at::Tensor& tokens_per_expert, int64_t num_experts,
                         const char* op) {
  check_float_or_bf16(rows, op, "the rows");
  check_dim(rows, 2, op, "the rows");
  check_dim(tokens_per_expert, 1, op, "tokens_per_expert");
  check_dtype(tokens_per_expert, at::kLong, op, "tokens_per_expert");
  check_same_device(tokens_per_expert, rows, op, "tokens_per_expert");
  MOETRAIN_CHECK(tokens_per_expert.size(0) == num_experts, op, ": tokens_per_expert has ",
                 tokens_per_expert.size(0), " entries for ", num_experts, " experts");
}

// Threads for a loop over `elements` numbers; 1 inside somebody else's parallel region.
inline int num_threads(int64_t elements) {
  constexpr int64_t kWorthAThread = 1 << 15;
  return elements < kWorthAThread || at::in_parallel_region() ? 1 : at::get_num_threads();
}

}  // namespace moetrain
