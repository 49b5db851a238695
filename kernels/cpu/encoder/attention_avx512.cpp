// One head. The keys are transposed once, so that a vector holds the scores of 16 keys; then 12 queries are processed
// at a time.
#include "encoder/attention.h"

#include <algorithm>

#include "exp.h"
#include "encoder/outer.h"

namespace amtss {
namespace {

// c = a b: R rows of n columns, up to a multiple of 32; b has `inner` rows.
template <int R>
void product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t inner, int64_t n, float* c,
             int64_t c_stride) {
    constexpr Rows<R> rows;
    const RowAddress<float> row(a, a_stride);
    for (int64_t j = 0; j < n; j += 32) {
        __m512 low[R], high[R];
        each(rows, [&](auto r) INLINE { low[r] = high[r] = _mm512_setzero_ps(); });
        for (int64_t i = 0; i < inner; i++) {
            const __m512 b_low = _mm512_loadu_ps(b + i * b_stride + j), b_high = _mm512_loadu_ps(b + i * b_stride + j + 16);
            each(rows, [&](auto r) INLINE {
                const __m512 value = _mm512_set1_ps(row[r][i]);
                low[r] = _mm512_fmadd_ps(value, b_low, low[r]);
                high[r] = _mm512_fmadd_ps(value, b_high, high[r]);
            });
        }
        each(rows, [&](auto r) INLINE {
            _mm512_storeu_ps(c + r * c_stride + j, low[r]);
            _mm512_storeu_ps(c + r * c_stride + j + 16, high[r]);
        });
    }
}

// transposed[d, j] = k[j, d], and 0 after the last key.
void transpose(const float* k, int64_t stride, int64_t keys, int64_t width, float* transposed, int64_t transposed_stride) {
    int64_t j = 0;
    for (; j + W <= keys; j += W)
        for (int64_t d = 0; d < width; d += 4) {
            vf column[4];
            load_columns(k + j * stride + d, stride, column);
            for (int c = 0; c < 4; c++) store(transposed + (d + c) * transposed_stride + j, column[c]);
        }
    for (int64_t d = 0; d < width; d++)
        for (int64_t rest = j; rest < transposed_stride; rest++)
            transposed[d * transposed_stride + rest] = rest < keys ? k[rest * stride + d] : 0;
}

// Scores to probabilities. Masked keys and the padding get 0.
void softmax(float* scores, int64_t keys, int64_t padded, const uint8_t* mask, float scale, const Exponent& natural) {
    const auto counts = [&](int64_t j) -> __mmask16 {
        const __mmask16 there = first(keys - j);
        return mask ? _mm_test_epi8_mask(_mm_maskz_loadu_epi8(there, mask + j), _mm_set1_epi8(-1)) : there;
    };
    const vf none = set(-__builtin_inff());
    vf largest = none;
    for (int64_t j = 0; j < padded; j += W) {
        const vf score = _mm512_mask_mov_ps(none, counts(j), load(scores + j) * scale);
        store(scores + j, score);
        largest = max(largest, score);
    }
    const float top = _mm512_reduce_max_ps(largest);
    // All keys are masked.
    if (top == -__builtin_inff()) return std::fill(scores, scores + padded, 0.0f);
    vf sums{};
    for (int64_t j = 0; j < padded; j += W) {
        const vf e = exp(load(scores + j) - top, natural);
        store(scores + j, e);
        sums += e;
    }
    const float inverse = 1 / sum(sums);
    for (int64_t j = 0; j < padded; j += W) store(scores + j, load(scores + j) * inverse);
}

}  // namespace

void attend_avx512(const Attention& p, int64_t n, int64_t h, float* scratch) {
    const auto start = [&](const int64_t* stride) { return n * stride[0] + h * stride[1]; };
    const float *q = p.q + start(p.q_stride), *k = p.k + start(p.k_stride), *v = p.v + start(p.v_stride);
    const uint8_t* mask = p.mask ? p.mask + start(p.mask_stride) : nullptr;
    const int64_t padded = padded_keys(p), row = p.heads * p.width;
    float *const transposed = scratch, *const scores = scratch + p.width * padded;
    float* const out = p.out + n * p.queries * row + h * p.width;
    transpose(k, p.k_stride[2], p.keys, p.width, transposed, padded);
    const Exponent natural(1);
    row_blocks(p.queries, [&](int64_t from, int64_t to) {
        FOR_ROWS(to - from, product, q + from * p.q_stride[2], p.q_stride[2], transposed, padded, p.width, padded, scores,
                 padded);
        for (int64_t i = from; i < to; i++)
            softmax(scores + (i - from) * padded, p.keys, padded, mask ? mask + i * p.mask_stride[2] : nullptr, p.scale,
                    natural);
        FOR_ROWS(to - from, product, scores, padded, v, p.v_stride[2], p.keys, p.width, out + from * row, row);
    });
}

}  // namespace amtss
