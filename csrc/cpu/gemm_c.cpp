// A plain C door to the kernel, with every form of it: the tests drive it through ctypes, where an operator offers only
// the forms that a layer needs.
#include "cpu/gemm_kernel.h"

namespace moetrain {
namespace {

template <class T, class Out>
void run(const void* a, int64_t a_stride, bool a_contiguous, const int64_t* a_index, const void* b, int64_t b_stride,
         bool b_contiguous, const int64_t* b_index, void* c, int64_t c_stride, const int64_t* c_index, bool accumulate,
         int64_t m, int64_t n, int64_t k, int threads) {
  const Gemm<T, Out> gemm{{static_cast<const T*>(a), a_stride, a_contiguous, a_index},
                          {static_cast<const T*>(b), b_stride, b_contiguous, b_index},
                          static_cast<Out*>(c), c_stride, m, n, k, c_index, accumulate};
  grouped_gemm(std::vector<Gemm<T, Out>>{gemm}, threads);
}

}  // namespace
}  // namespace moetrain

// form: 0 float operands and output, 1 bf16 operands and output, 2 bf16 operands and float output.
extern "C" __attribute__((visibility("default"))) void moetrain_cpu_gemm(
    int form, const void* a, int64_t a_stride, bool a_contiguous, const int64_t* a_index, const void* b,
    int64_t b_stride, bool b_contiguous, const int64_t* b_index, void* c, int64_t c_stride, const int64_t* c_index,
    bool accumulate, int64_t m, int64_t n, int64_t k, int threads) {
  using moetrain::bf16;
  const auto run = form == 0   ? &moetrain::run<float, float>
                   : form == 1 ? &moetrain::run<bf16, bf16>
                               : &moetrain::run<bf16, float>;
  run(a, a_stride, a_contiguous, a_index, b, b_stride, b_contiguous, b_index, c, c_stride, c_index, accumulate, m, n, k,
      threads);
}
