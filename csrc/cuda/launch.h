// What the torch-free .cu files offer to bindings.cpp. Every launcher returns a cudaError_t as an int (0: launched),
// works on `stream` without waiting, and accepts empty inputs. dtype: 0 float, 1 bfloat16.
//   T tokens, K slots a token, R routed rows, E experts, N out, K (of a GEMM) in.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

extern "C" {

// Slots that one block of the plan takes; the caller gives block_counts room for ceil(T * K / this) * E.
constexpr int64_t kMoetrainPlanChunk = 1024;
// Experts whose counters fit into the shared memory that every device grants.
constexpr int64_t kMoetrainPlanMaxExperts = 12288;

// status[0] = R, status[1] = first illegal slot (or INT64_MAX). Also leaves first_row[E] and block_counts for
// moetrain_cuda_plan_place.
int moetrain_cuda_plan_count(const int64_t* expert_ids, int64_t slots, int64_t experts, int32_t* block_counts,
                             int64_t* tokens_per_expert, int64_t* first_row, int64_t* status, CUstream_st* stream);
int moetrain_cuda_plan_place(const int64_t* expert_ids, int64_t slots, int64_t slots_per_token, int64_t experts,
                             const int32_t* block_counts, const int64_t* first_row, int64_t* row_token,
                             int64_t* row_slot, int64_t* slot_row, CUstream_st* stream);

// out[i] = x[index[i]]; an index outside [0, x_rows) stops the kernel with a trap, as torch's own indexing does.
int moetrain_cuda_gather_rows(const void* x, int64_t x_rows, const int64_t* index, int64_t count, size_t row_bytes,
                              void* out, CUstream_st* stream);

// weights null: ones.
int moetrain_cuda_combine_rows(const void* rows, int64_t num_rows, const float* weights, const int64_t* slot_row,
                               int64_t tokens, int64_t slots_per_token, int64_t width, int dtype, void* out,
                               CUstream_st* stream);
int moetrain_cuda_combine_rows_backward(const void* grad, const void* rows, int64_t num_rows, const float* weights,
                                        const int64_t* slot_row, int64_t tokens, int64_t slots_per_token,
                                        int64_t width, int dtype, void* grad_rows, float* grad_weights,
                                        CUstream_st* stream);

// c = product of one kind; rows = R, the number of routed rows. All matrices contiguous.
//   kind 0, fprop: a = x [R, K],    b = w [E, N, K], c = y  [R, N]
//   kind 1, dgrad: a = dy [R, N],   b = w [E, N, K], c = dx [R, K]
//   kind 2, wgrad: a = dy [R, N],   b = x [R, K],    c = dw [E, N, K]
int moetrain_cuda_grouped_gemm_fp32(int kind, const void* a, const void* b, void* c,
                                    const int64_t* tokens_per_expert, int64_t rows, int64_t experts, int64_t n,
                                    int64_t k, CUstream_st* stream);
int moetrain_cuda_grouped_gemm_bf16(int kind, const void* a, const void* b, void* c,
                                    const int64_t* tokens_per_expert, int64_t rows, int64_t experts, int64_t n,
                                    int64_t k, CUstream_st* stream);

const char* moetrain_cuda_error_string(int error);

}  // extern "C"
