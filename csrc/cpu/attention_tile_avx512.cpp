#include "cpu/attention_vec_avx512.h"

namespace moetrain {

// 24 of 32 registers accumulate.
AttentionTile<float> attention_tile_avx512() { return float_attention_tile<Avx512, 12, 2>("avx512"); }

}  // namespace moetrain
