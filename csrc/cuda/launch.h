// What the torch-free .cu files offer to the torch-facing units beside them. Every launcher returns a cudaError_t as
// an int (0: launched), works on `stream` without waiting, and accepts empty inputs. dtype: 0 float, 1 bfloat16.
//   T tokens, K slots a token, R routed rows, E experts, N out, K (of a GEMM) in, F expert width.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

extern "C" {

// ---- rows.cu

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

// ---- gemm_fp32.cu, gemm_bf16.cu

// One product over rows sorted by expert. All matrices contiguous.
//   kind 0, fprop:  a = x [R, K],    b = w [E, N, K],  c = y  [R, N]
//   kind 1, dgrad:  a = dy [R, N],   b = w [E, N, K],  c = dx [R, K]
//   kind 2, wgrad:  a = dy [R, N],   b = x [R, K],     c = dw [E, N, K]
//   kind 3, swiglu: fprop with N = 2 F; c = y may be null (not wanted); h [R, F] = silu(y[:, :F]) * y[:, F:], computed
//                   from y as rounded to the dtype
// A matrix of routed rows (a; in wgrad also b) is read through a_rows / b_rows unless that is null: routed row r is row
// a_rows[r] of a matrix of a_count rows; an index outside of it stops the kernel with a trap.
struct MoetrainGemm {
  int kind;
  const void* a;
  const void* b;
  void* c;
  void* h;
  const int64_t* a_rows;
  const int64_t* b_rows;
  int64_t a_count, b_count;
  const int64_t* tokens_per_expert;
  int64_t rows, experts, n, k;  // R, E, N, K
  bool wide;                    // wgrad of bfloat16: c is float
  bool accumulate;              // wgrad: c += instead of c =
};
int moetrain_cuda_grouped_gemm_fp32(const MoetrainGemm* gemm, CUstream_st* stream);
int moetrain_cuda_grouped_gemm_bf16(const MoetrainGemm* gemm, CUstream_st* stream);

// ends[e] = rows of the experts up to and with e, cut to `rows`; what torch's grouped product takes.
int moetrain_cuda_group_ends(const int64_t* tokens_per_expert, int64_t experts, int64_t rows, int32_t* ends,
                             CUstream_st* stream);
// Zeros the rows of c [rows, row_bytes] that no expert claims.
int moetrain_cuda_zero_unclaimed(const int32_t* ends, int64_t experts, int64_t rows, size_t row_bytes, void* c,
                                 CUstream_st* stream);

// ---- swiglu.cu

// h [R, F] = silu(z[:, :F]) * z[:, F:].
int moetrain_cuda_swiglu(const void* z, int64_t rows, int64_t width, int dtype, void* h, CUstream_st* stream);

// Per used slot with row r and weight w (weights null: 1), and h = SwiGLU(z[r]):
//   hw[r] = w h;  grad_weights[slot] = <dh[r], h> (0 for an unused slot);  dz[r] = SwiGLU'(z[r]) (w dh[r])
// dh [R, F] is the gradient of fc2's input before the weight. Outputs that are null are not computed; dh may be null
// when only hw is wanted, and hw may be dh itself.
int moetrain_cuda_swiglu_backward(const void* z, const void* dh, int64_t num_rows, const float* weights,
                                  const int64_t* slot_row, int64_t slots, int64_t width, int dtype, void* hw, void* dz,
                                  float* grad_weights, CUstream_st* stream);

// ---- importance.cu

enum MoetrainMeasure { kSelfWeight = 0, kRowMax = 1, kRowEntropy = 2, kColMax = 3, kColSum = 4 };
// Largest head dimension of the bfloat16 kernel.
constexpr int64_t kMoetrainImportanceMaxWidth = 256;

// The measure of softmax(scale q k^T), given its log-sum-exp, for each token, summed over the heads. Strides count
// elements; the head dimension is contiguous.
struct MoetrainImportance {
  int measure;
  const void* q;          // [S, B, H, d]
  const void* k;          // [S, B, G, d]
  int64_t q_strides[3];   // of S, B, H
  int64_t k_strides[3];   // of S, B, G
  const float* lse;       // [B, H, S]
  const bool* valid;      // [B, S] or null: all
  float* per_head;        // [B, H, S], room to work
  float* out;             // [S, B]
  int64_t seq, batch, heads, groups, width;
  float scale;
  bool causal;
  int dtype;
};
int moetrain_cuda_importance(const MoetrainImportance* call, CUstream_st* stream);

const char* moetrain_cuda_error_string(int error);

}  // extern "C"
