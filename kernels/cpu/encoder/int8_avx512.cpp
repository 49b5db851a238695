// The product of a tile of rows: first their codes, then 12 rows by 32 outputs at a time.
#include <algorithm>
#include <cstring>

#include "exp.h"
#include "encoder/int8.h"
#include "encoder/outer.h"

namespace amtss {
namespace {

// The scale and the offset of the codes of a row.
struct Code {
    float step;
    int32_t zero;
};

// Writes the codes a + zero of n values. The bytes up to the next multiple of 16 are arbitrary.
Code quantize(const float* x, int64_t n, uint8_t* codes) {
    // The range always includes 0. `finite` is NaN if a value is NaN or infinite, which minimum and maximum may miss.
    __m512 least[4] = {}, largest[4] = {}, finite[4] = {};
    const auto look = [&](int v, __m512 values) INLINE {
        least[v] = _mm512_min_ps(least[v], values);
        largest[v] = _mm512_max_ps(largest[v], values);
        finite[v] = _mm512_fmadd_ps(values, _mm512_setzero_ps(), finite[v]);
    };
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
        for (int v = 0; v < 4; v++) look(v, _mm512_loadu_ps(x + i + 16 * v));
    for (; i < n; i += 16) look(0, _mm512_maskz_loadu_ps(first(n - i), x + i));
    for (int v = 1; v < 4; v++) {
        least[0] = _mm512_min_ps(least[0], least[v]);
        largest[0] = _mm512_max_ps(largest[0], largest[v]);
        finite[0] = _mm512_add_ps(finite[0], finite[v]);
    }
    const float low = _mm512_reduce_min_ps(least[0]);
    float step = _mm512_reduce_max_ps(largest[0]) / 255 - low / 255;
    // The codes of a row of zeros are 0, not NaN.
    if (step < 1e-30f) step = 1e-30f;
    step += _mm512_reduce_add_ps(finite[0]);
    const __m512 inverse = _mm512_set1_ps(1 / step);
    const int32_t zero = _mm_cvtss_si32(_mm_set_ss(-low * _mm512_cvtss_f32(inverse)));
    for (i = 0; i < n; i += 16) {
        const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(first(n - i), x + i), inverse);
        const __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(zero));
        // Saturated: where both ends were rounded up, the largest code would be 256.
        _mm_storeu_si128((__m128i*)(codes + i), _mm512_cvtusepi32_epi8(code));
    }
    return {step, zero};
}

// x * P(X < x) for a standard normal X. For x >= 0, P(X > x) e^(x^2 / 2) is a polynomial in 1 / (1 + 0.23 x), within
// 6e-8 of its value.
inline vf gelu(vf x, const Exponent& half) {
    const vf size = x > 0 ? x : -x;
    const vf t = 1 / fma(size, set(0.23f), set(1));
    vf p = fma(t, set(-0x1.43edf0p-4f), set(0x1.2c6d8ep-2f));
    p = fma(t, p, set(-0x1.230a2ap-2f));
    p = fma(t, p, set(0x1.3bcb3ap-2f));
    p = fma(t, p, set(-0x1.34a4c6p-5f));
    p = fma(t, p, set(0x1.f1cf76p-4f));
    p = fma(t, p, set(0x1.5d2984p-4f));
    p = fma(t, p, set(0x1.7aae90p-4f));
    p = fma(t, p, set(-0x1.0d6c90p-15f));
    return max(set(0), x) - size * p * exp(-size * size, half);
}

// As _mm512_dpbusd_epi32, for which GCC 12 copies the sums between registers.
INLINE inline void add_products(__m512i& sum, __m512i codes, __m512i weights) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(weights));
}

// Scales the sums of 16 outputs of a row and writes them.
struct Outputs {
    __m512 scale, bias;
    __mmask16 mask;
    int64_t start;

    Outputs(const Int8Linear& p, int64_t start) : mask(first(p.outputs - start)), start(start) {
        scale = _mm512_maskz_loadu_ps(mask, p.scale + start);
        bias = p.bias ? _mm512_maskz_loadu_ps(mask, p.bias + start) : _mm512_setzero_ps();
    }
    INLINE void store(__m512i sum, float step, float* y) const {
        const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
        _mm512_mask_storeu_ps(y + start, mask, _mm512_fmadd_ps(value, _mm512_set1_ps(step), bias));
    }
};

// R rows of codes by one panel of 32 outputs.
template <int R>
void panel(const Int8Linear& p, const uint8_t* codes, int64_t stride, const Code* code, int64_t output, float* y) {
    constexpr Rows<R> rows;
    const int64_t quads = (p.inputs + 3) / 4;
    const int8_t* w = p.weight + output * quads * 4;
    const Outputs low_outputs(p, output), high_outputs(p, output + 16);
    const __m512i low_offset = _mm512_maskz_loadu_epi32(low_outputs.mask, p.offset + output);
    const __m512i high_offset = _mm512_maskz_loadu_epi32(high_outputs.mask, p.offset + output + 16);
    __m512i low[R], high[R];
    each(rows, [&](auto r) INLINE {
        const __m512i zero = _mm512_set1_epi32(code[r].zero);
        low[r] = _mm512_mullo_epi32(zero, low_offset), high[r] = _mm512_mullo_epi32(zero, high_offset);
        // Stores to several rows would otherwise wait for memory.
        __builtin_prefetch(y + r * p.outputs + output, 1);
        __builtin_prefetch(y + r * p.outputs + std::min(output + 16, p.outputs - 1), 1);
    });
    const RowAddress<uint8_t> row(codes, stride);
    for (int64_t q = 0; q < quads; q++) {
        const __m512i w_low = _mm512_loadu_si512(w + 128 * q), w_high = _mm512_loadu_si512(w + 128 * q + 64);
        // Prefetch the next panel: the weights of a model do not fit the caches.
        _mm_prefetch((const char*)(w + 128 * (q + quads)), _MM_HINT_T1);
        _mm_prefetch((const char*)(w + 128 * (q + quads) + 64), _MM_HINT_T1);
        each(rows, [&](auto r) INLINE {
            int32_t four;
            std::memcpy(&four, row[r] + 4 * q, sizeof four);
            const __m512i values = _mm512_set1_epi32(four);
            add_products(low[r], values, w_low);
            add_products(high[r], values, w_high);
        });
    }
    each(rows, [&](auto r) INLINE {
        low_outputs.store(low[r], code[r].step, y + r * p.outputs);
        high_outputs.store(high[r], code[r].step, y + r * p.outputs);
    });
    if (!p.gelu) return;
    // In a loop of its own, because it needs all registers.
    const Exponent half(2);
    for (int r = 0; r < R; r++)
        for (const Outputs* o : {&low_outputs, &high_outputs}) {
            float* const place = y + r * p.outputs + o->start;
            const vf value = gelu(_mm512_maskz_loadu_ps(o->mask, place), half);
            _mm512_mask_storeu_ps(place, o->mask, value);
        }
}

}  // namespace

void int8_rows_avx512(const Int8Linear& p, int64_t begin, int64_t end, uint8_t* codes) {
    // Not a multiple of a page, which would map the rows to the same few lines of the cache.
    const int64_t stride = (p.inputs + 15) / 16 * 16 + 16;
    Code code[most_tile_rows];
    for (int64_t r = 0; r < end - begin; r++)
        code[r] = quantize(p.x + (begin + r) * p.inputs, p.inputs, codes + r * stride);
    for (int64_t output = 0; output < p.outputs; output += 32)
        row_blocks(end - begin, [&](int64_t from, int64_t to) {
            FOR_ROWS(to - from, panel, p, codes + from * stride, stride, code + from, output,
                     p.y + (begin + from) * p.outputs);
        });
}

}  // namespace amtss
