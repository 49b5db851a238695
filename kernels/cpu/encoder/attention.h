// Attention of encoders in float32, on CPUs with AVX-512. Raw pointers, sizes and strides, without Python and torch.
#pragma once

#include <cstdint>

namespace amtss {

// out[n, i, h] = sum_j softmax_j(scale * q[n, h, i] . k[n, h, j]) v[n, h, j] over the keys j whose mask is set; zeros
// where none is. The result of a row depends on its own keys only, not on the batch or the number of threads.
struct Attention {
    int64_t batch, heads, queries, keys, width;  // width of a head: a multiple of 32
    const float *q, *k, *v;
    int64_t q_stride[3], k_stride[3], v_stride[3];  // of batch, head, row; the width has stride 1
    const uint8_t* mask;                            // one byte for each query and key, or null: all keys
    int64_t mask_stride[3];                         // of batch, head, query; keys have stride 1
    float scale;
    float* out;  // [batch, queries, heads, width]
};

// Only for machines with `int8_supported()`.
void run(const Attention&, int threads);

// One head of one row of the batch; `scratch`: room for attention_scratch(p) floats.
inline int64_t padded_keys(const Attention& p) { return (p.keys + 31) / 32 * 32; }
inline int64_t attention_scratch(const Attention& p) { return (p.width + 12) * padded_keys(p); }
void attend_avx512(const Attention&, int64_t n, int64_t h, float* scratch);

}  // namespace amtss
