#include "cpu/expert_layer_amx.h"

#include <omp.h>

#include <vector>

#include "cpu/amx.h"
#include "cpu/scratch.h"

namespace moetrain::amx {
namespace {

// x (or grad), the activation and the gradient of z of a chunk stay in L2 between the products that use them.
constexpr int64_t kChunkBytes = 5 << 18;
constexpr int64_t kMaxChunk = 512, kMinChunk = 64;

struct Chunk {
  int64_t expert, row, rows;  // rows row, row + 1, ... of all
  int64_t before, of;         // rows of the expert before it, and in all
};

// The chunk's part of the panel that holds columns f, f + 1, ... of a matrix of `width` columns.
template <class T>
T* panel_of(T* matrix, const Chunk& c, int64_t width, int64_t f) {
  return matrix + (c.row - c.before) * width + f * c.of + c.before * kPanelColumns;
}

struct Buffers {
  Scratch strip, input, hidden, sums, dots;
};

// Rows of one expert at a time. Smaller chunks while threads would stand idle; no bit of the result depends on it.
std::vector<Chunk> cut(const ExpertLayer& l, int64_t bytes_a_row, int threads) {
  int64_t rows = kChunkBytes / bytes_a_row / kBlock * kBlock;
  rows = rows > kMaxChunk ? kMaxChunk : rows < kMinChunk ? kMinChunk : rows;
  const int64_t share = l.rows / (4 * threads) / kBlock * kBlock;
  if (threads > 1 && share < rows) rows = share > kMinChunk ? share : kMinChunk;
  std::vector<Chunk> chunks;
  for (int64_t e = 0; e < l.experts; ++e) {
    const int64_t count = l.first_row[e + 1] - l.first_row[e];
    if (count == 0) continue;
    // Equal chunks, because a short last one would pass over all weights for a few rows.
    const int64_t parts = (count + rows - 1) / rows;
    const int64_t even = ((count + parts - 1) / parts + kBlock - 1) / kBlock * kBlock;
    for (int64_t r = l.first_row[e]; r < l.first_row[e + 1]; r += even) {
      chunks.push_back({e, r, smaller(even, l.first_row[e + 1] - r), r - l.first_row[e], count});
    }
  }
  return chunks;
}

// e^x for x in [-87, 87] by a Taylor polynomial on [-ln 2 / 2, ln 2 / 2]; relative error below 3e-6, a thousandth of
// what rounding to bf16 does next.
inline __m512 exponential(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693147182f), x);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  for (const float coefficient : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(coefficient));
  }
  return _mm512_scalef_ps(p, n);
}

inline __m512 sigmoid(__m512 x) {
  const __m512 bounded = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(87.0f)), _mm512_set1_ps(-87.0f));
  const __m512 d = _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), bounded)));
  const __m512 guess = _mm512_rcp14_ps(d);  // one Newton step: 2^-14 becomes 2^-28
  return _mm512_mul_ps(guess, _mm512_fnmadd_ps(d, guess, _mm512_set1_ps(2.0f)));
}

inline __m512 swiglu(__m512 gate, __m512 up) { return _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), up); }

// ---------------------------------------------------------------------------------------------- forward

// A block of fc1's output stands transposed: rows are 32 of the F outputs, columns 32 tokens. Rounds gate and up to
// bf16 (so that backward, which reads them from memory, sees the same numbers), keeps them if asked, and puts
// silu(gate) * up where fc2 wants it: as pairs of f, which is how the rounded vectors stand anyway.
struct SwiGLU {
  const float* gates;  // blocks of the gate strip
  const Chunk& chunk;
  int64_t width;
  bf16* z;        // or null
  bool stream;    // z
  bf16* hidden;   // panel of pairs
  int64_t tiles;  // of the panel along F

  void operator()(int64_t strip, int64_t block, const float* ups) const {
    const int64_t f = strip - width;  // the strips of up are the rows after those of gate
    const int64_t rows = smaller(kBlock, chunk.rows - block * kBlock);
    for (int64_t half = 0; half < 2; ++half) {
      __m512i gate[16], up[16];
      to_pairs_of_rows(gates + block * kBlockFloats, half, gate);
      to_pairs_of_rows(ups, half, up);
      bf16* to = hidden + ((2 * block + half) * tiles + f / kTileDepth) * kTileElements;
#pragma GCC unroll 4
      for (int p = 0; p < 16; ++p) {
        const __m512 even = swiglu(first_of_pairs(gate[p]), first_of_pairs(up[p]));
        const __m512 odd = swiglu(second_of_pairs(gate[p]), second_of_pairs(up[p]));
        _mm512_store_si512(to + p * 32, to_pairs(even, odd));
      }
      if (z && half * kHalf < rows) {
        transpose(gate);
        transpose(up);
        const int64_t count = smaller(kHalf, rows - half * kHalf), first = block * kBlock + half * kHalf;
        bf16* to_gate = panel_of(z, chunk, 2 * width, f) + first * kPanelColumns;
        bf16* to_up = panel_of(z, chunk, 2 * width, width + f) + first * kPanelColumns;
        for (int64_t i = 0; i < count; ++i) {
          store_row(to_gate + i * kPanelColumns, gate[i], kPanelColumns, stream);
          store_row(to_up + i * kPanelColumns, up[i], kPanelColumns, stream);
        }
      }
    }
  }
};

void forward_chunk(const ExpertLayer& l, const Chunk& chunk, bf16* z, bool stream, bf16* out,
                   Buffers& buffers) {
  const int64_t D = l.hidden, F = l.width, blocks = blocks_of(chunk.rows);
  const int64_t tiles_d = tiles_of(D), tiles_f = tiles_of(F);
  bf16* const strip = buffers.strip.at_least<bf16>(kStripElements);
  bf16* const input = buffers.input.at_least<bf16>(blocks * kBlock * tiles_d * kTileDepth);
  bf16* const hidden = buffers.hidden.at_least<bf16>(blocks * kBlock * tiles_f * kTileDepth);
  float* const gates = buffers.sums.at_least<float>(2 * blocks * kBlockFloats);
  float* const ups = gates + blocks * kBlockFloats;

  const Source x = {{l.x, D, true, l.row_token + chunk.row}};
  pack<Form::kPairs>(x, 0, chunk.rows, 0, D, input);
  const Source fc1 = {{l.fc1 + chunk.expert * 2 * F * D, D, true}};
  const Panel inputs = {input, blocks, tiles_d};
  const auto gate_strip = [&](int64_t f) { return Strips{fc1, f, smaller(kBlock, F - f), 0, D}; };
  const auto up_strip = [&](int64_t f) { return Strips{fc1, F + f, smaller(kBlock, F - f), 0, D}; };
  for (int64_t f = 0; f < F; f += kBlock) {
    multiply_strips<Form::kRows>(gate_strip(f), up_strip(f), inputs, 0, false, strip, gates, NoFinish{});
    multiply_strips<Form::kRows>(up_strip(f), gate_strip(f + kBlock), inputs, 0, false, strip, ups,
                                SwiGLU{gates, chunk, F, z, stream, hidden, tiles_f});
  }

  const Source fc2 = {{l.fc2 + chunk.expert * D * F, F, true}};
  const Panel activations = {hidden, blocks, tiles_f};
  const auto out_strip = [&](int64_t d) { return Strips{fc2, d, smaller(kBlock, D - d), 0, F}; };
  for (int64_t d = 0; d < D; d += kBlock) {
    multiply_strips<Form::kRows>(out_strip(d), out_strip(d + kBlock), activations, 0, false, strip, gates,
                                [&](int64_t d, int64_t block, const float* c) {
                                  const int64_t first = block * kBlock;
                                  store_transposed(
                                      c, smaller(kBlock, chunk.rows - first), smaller(kBlock, D - d), false,
                                      [&](int64_t i) { return out + (chunk.row + first + i) * D + d; });
                                });
  }
}

// ---------------------------------------------------------------------------------------------- backward

// The block is grad fc2 for 32 rows of the chunk and 32 of F: the gradient of the activation but for the row's weight.
struct SwiGLUBackward {
  const ExpertLayer& layer;
  const Chunk& chunk;
  const bf16* z;
  bf16* dz;
  bf16* weighted;  // or null
  bf16* panel;     // dz as rows: tiles of gate, then of up
  int64_t tiles;   // of F; the panel has twice as many
  float* dots;     // 16 partial sums a row

  void operator()(int64_t f, int64_t block, const float* c) const {
    const int64_t F = layer.width, first = block * kBlock;
    const int64_t rows = smaller(kBlock, chunk.rows - first);
    const auto at = [&](auto* matrix, int64_t width, int64_t column) {
      return panel_of(matrix, chunk, width, column) + first * kPanelColumns;
    };
    const bf16 *gates = at(z, 2 * F, f), *ups = at(z, 2 * F, F + f);
    bf16 *dgates = at(dz, 2 * F, f), *dups = at(dz, 2 * F, F + f), *activations = at(weighted, F, f);
    for (int64_t i = 0; i < kBlock; ++i, c += kBlock) {
      bf16* to = panel + ((2 * block + i / kHalf) * 2 * tiles + f / kTileDepth) * kTileElements + i % kHalf * 32;
      if (i >= rows) {  // the panel is read whole
        _mm512_store_si512(to, _mm512_setzero_si512());
        _mm512_store_si512(to + tiles * kTileElements, _mm512_setzero_si512());
        continue;
      }
      const int64_t r = first + i, column = i * kPanelColumns;
      const __m512i gate = _mm512_loadu_si512(gates + column), up = _mm512_loadu_si512(ups + column);
      const float w = layer.weights ? layer.weights[layer.row_slot[chunk.row + r]] : 1.0f;
      const Half low = half(low_half(gate), low_half(up), _mm512_load_ps(c), w);
      const Half high = half(high_half(gate), high_half(up), _mm512_load_ps(c + kHalf), w);
      const __m512i dgate = to_row(low.dgate, high.dgate), dup = to_row(low.dup, high.dup);
      _mm512_store_si512(to, dgate);
      _mm512_store_si512(to + tiles * kTileElements, dup);
      _mm512_storeu_si512(dgates + column, dgate);
      _mm512_storeu_si512(dups + column, dup);
      if (weighted) _mm512_storeu_si512(activations + column, to_row(low.weighted, high.weighted));
      float* dot = dots + r * 16;
      _mm512_store_ps(dot, _mm512_add_ps(_mm512_load_ps(dot), _mm512_add_ps(low.dot, high.dot)));
    }
  }

  struct Half {
    __m512 dgate, dup, weighted, dot;
  };

  static Half half(__m512 gate, __m512 up, __m512 gradient, float weight) {
    const __m512 w = _mm512_set1_ps(weight), one = _mm512_set1_ps(1.0f);
    const __m512 sig = sigmoid(gate), silu = _mm512_mul_ps(gate, sig), hidden = _mm512_mul_ps(silu, up);
    const __m512 dh = _mm512_mul_ps(gradient, w);
    // silu'(g) = sig (1 + g (1 - sig))
    const __m512 slope = _mm512_mul_ps(sig, _mm512_fmadd_ps(gate, _mm512_sub_ps(one, sig), one));
    return {_mm512_mul_ps(_mm512_mul_ps(dh, up), slope), _mm512_mul_ps(dh, silu), _mm512_mul_ps(hidden, w),
            _mm512_mul_ps(gradient, hidden)};
  }
};

float sum_of_16(const float* x) {
  float s[8];
  for (int i = 0; i < 8; ++i) s[i] = x[i] + x[i + 8];
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

void backward_chunk(const ExpertLayer& l, const Chunk& chunk, const bf16* grad, const bf16* z,
                    const ExpertLayerGradients& to, Buffers& buffers) {
  const int64_t D = l.hidden, F = l.width, blocks = blocks_of(chunk.rows);
  const int64_t tiles_d = tiles_of(D), tiles_f = tiles_of(F);
  bf16* const strip = buffers.strip.at_least<bf16>(kStripElements);
  bf16* const input = buffers.input.at_least<bf16>(blocks * kBlock * tiles_d * kTileDepth);
  bf16* const hidden = buffers.hidden.at_least<bf16>(blocks * kBlock * 2 * tiles_f * kTileDepth);
  const int64_t width = 4 * kBlock;
  float* const sums = buffers.sums.at_least<float>(width / kBlock * blocks * kBlockFloats);
  float* const dots = buffers.dots.at_least<float>(chunk.rows * 16);
  __builtin_memset(dots, 0, chunk.rows * 16 * sizeof(float));

  const Source gradients = {{grad, D, true, l.row_token + chunk.row}};
  pack<Form::kRows>(gradients, 0, chunk.rows, 0, D, input);
  const Source fc2 = {{l.fc2 + chunk.expert * D * F, F, false}};
  const Panel inputs = {input, blocks, tiles_d};
  const auto strips_at = [&](int64_t f) { return Strips{fc2, f, smaller(width, F - f), 0, D}; };
  for (int64_t f = 0; f < F; f += width) {
    multiply_strips<Form::kPairs>(
        strips_at(f), strips_at(f + width), inputs, 0, false, strip, sums,
        SwiGLUBackward{l, chunk, z, to.dz, to.weighted, hidden, tiles_f, dots});
  }
  if (to.dweights) {
    for (int64_t r = 0; r < chunk.rows; ++r) to.dweights[l.row_slot[chunk.row + r]] = sum_of_16(dots + r * 16);
  }
  if (!to.dx_rows) return;

  // dz fc1 in two parts, because gate and up are padded to whole tiles each.
  const Source gate = {{l.fc1 + chunk.expert * 2 * F * D, D, false}};
  const Source up = {{gate.data + F * D, D, false}};
  const Panel dz = {hidden, blocks, 2 * tiles_f};
  const auto gate_strip = [&](int64_t d) { return Strips{gate, d, smaller(width, D - d), 0, F}; };
  const auto up_strip = [&](int64_t d) { return Strips{up, d, smaller(width, D - d), 0, F}; };
  for (int64_t d = 0; d < D; d += width) {
    multiply_strips<Form::kPairs>(gate_strip(d), up_strip(d), dz, 0, false, strip, sums, NoFinish{});
    multiply_strips<Form::kPairs>(up_strip(d), gate_strip(d + width), dz, tiles_f, true, strip, sums,
                                 [&](int64_t d, int64_t block, const float* c) {
                                   const int64_t first = block * kBlock;
                                   store_block(c, smaller(kBlock, chunk.rows - first), smaller(kBlock, D - d), false,
                                               [&](int64_t i) { return to.dx_rows + (chunk.row + first + i) * D + d; });
                                 });
  }
}

Buffers& my_buffers() {
  thread_local Buffers buffers;
  return buffers;
}

template <class Run>
void for_chunks(const std::vector<Chunk>& chunks, int threads, const Run& run) {
  const int64_t count = static_cast<int64_t>(chunks.size());
#pragma omp parallel num_threads(threads)
  {
    const TileRegisters tiles;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) run(chunks[i], my_buffers());
    _mm_sfence();  // streaming stores are weakly ordered
  }
}

// dfc1 = sum over rows of dz[r]^T x[token of r], and dfc2 of grad[token of r]^T weighted[r].
void weight_gradients(const ExpertLayer& l, const bf16* grad, const ExpertLayerGradients& to, int threads) {
  const int64_t D = l.hidden, F = l.width;
  std::vector<Product<bf16>> fc1, fc2;
  for (int64_t e = 0; e < l.experts; ++e) {
    const int64_t r = l.first_row[e], rows = l.first_row[e + 1] - r, panel = rows * kPanelColumns;
    const Source tokens = {{l.x, D, false, l.row_token + r}}, gradients = {{grad, D, false, l.row_token + r}};
    if (to.dfc1) {
      const Source dz = {{to.dz + r * 2 * F, kPanelColumns, false}, panel};
      fc1.push_back({dz, tokens, to.dfc1 + e * 2 * F * D, D, 2 * F, D, rows});
    }
    if (to.dfc2) {
      const Source weighted = {{to.weighted + r * F, kPanelColumns, false}, panel};
      fc2.push_back({gradients, weighted, to.dfc2 + e * D * F, F, D, F, rows});
    }
  }
  grouped_gemm(fc1, threads);
  grouped_gemm(fc2, threads);
}

}  // namespace

void forward(const ExpertLayer& l, bf16* z, bf16* out, int threads) {
  const size_t bytes = l.rows * 2 * l.width * sizeof(bf16);
  constexpr size_t kFitsTheCaches = 4 << 20;
  const bool stream = z && bytes > kFitsTheCaches && reinterpret_cast<uintptr_t>(z) % 64 == 0 && is_mapped(z, bytes);
  const auto chunks = cut(l, 2 * (l.hidden + l.width), threads);
  for_chunks(chunks, threads, [&](const Chunk& c, Buffers& buffers) { forward_chunk(l, c, z, stream, out, buffers); });
}

void backward(const ExpertLayer& l, const bf16* grad, const bf16* z, const ExpertLayerGradients& to, int threads) {
  const auto chunks = cut(l, 2 * (l.hidden + 2 * l.width), threads);
  for_chunks(chunks, threads, [&](const Chunk& c, Buffers& buffers) { backward_chunk(l, c, grad, z, to, buffers); });
  weight_gradients(l, grad, to, threads);
}

}  // namespace moetrain::amx
