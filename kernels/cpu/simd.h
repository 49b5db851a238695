// A vector of W floats on each instruction set: the few operations that compilers do not write by themselves.
// Arithmetic, comparison, shifts and `mask ? a : b` are the compiler's own (GCC and Clang vector types).
// Included by one file per instruction set; everything is local to that file.
#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint16_t vu16 __attribute__((vector_size(2 * W)));
typedef uint8_t vu8 __attribute__((vector_size(W)));

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

inline vf set(float x) { return x - vf{}; }

template <class V>
inline V load_bits(const void* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

inline vf load(const float* p) { return load_bits<vf>(p); }
inline void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

// max and min return x where x is NaN. round: to the nearest integer. scale: p * 2^n for an integer n in [-151, 129].
#if defined(__AVX512F__)
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf max(vf bound, vf x) { return _mm512_max_ps(bound, x); }
inline vf min(vf bound, vf x) { return _mm512_min_ps(bound, x); }
inline vf round(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf scale(vf p, vf n) { return _mm512_scalef_ps(p, n); }
inline void stream(float* p, vf v) { _mm512_stream_ps(p, v); }
inline vf widen(vu16 h) { return _mm512_cvtph_ps((__m256i)h); }
#else
inline vf scale(vf p, vf n) {
    // 2^n may be subnormal where p * 2^n rounds to one: multiply by its two halves.
    const vi whole = __builtin_convertvector(n, vi), half = whole >> 1;
    return p * (vf)((half + 127) << 23) * (vf)((whole - half + 127) << 23);
}
#if defined(__AVX2__)
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf max(vf bound, vf x) { return _mm256_max_ps(bound, x); }
inline vf min(vf bound, vf x) { return _mm256_min_ps(bound, x); }
inline vf round(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void stream(float* p, vf v) { _mm256_stream_ps(p, v); }
inline vf widen(vu16 h) { return _mm256_cvtph_ps((__m128i)h); }
#elif defined(__x86_64__)
inline vf fma(vf a, vf b, vf c) { return a * b + c; }
inline vf max(vf bound, vf x) { return _mm_max_ps(bound, x); }
inline vf min(vf bound, vf x) { return _mm_min_ps(bound, x); }
inline vf round(vf x) { return _mm_cvtepi32_ps(_mm_cvtps_epi32(x)); }
inline void stream(float* p, vf v) { _mm_stream_ps(p, v); }
inline vf widen(vu16 h) {
    // The exponent moves from bias 15 to 127 by a multiplication, which also sets subnormals right.
    const vi bits = __builtin_convertvector(h, vi), magnitude = bits & 0x7fff;
    const vi finite = (vi)((vf)(magnitude << 13) * set(0x1p112f));
    const vi special = (magnitude << 13) | 0x7f800000;
    return (vf)((magnitude >= 0x7c00 ? special : finite) | (bits & 0x8000) << 16);
}
#else
inline vf fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
inline vf max(vf bound, vf x) { return vmaxq_f32(bound, x); }
inline vf min(vf bound, vf x) { return vminq_f32(bound, x); }
inline vf round(vf x) { return vrndnq_f32(x); }
inline void stream(float* p, vf v) { vst1q_f32(p, v); }
inline vf widen(vu16 h) { return vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)h)); }
#endif
#endif

// The first n lanes; those behind them are `rest`, or are not written.
#if defined(__AVX512F__)
inline vf load_first(const float* p, int n, float rest) { return _mm512_mask_loadu_ps(set(rest), __mmask16((1 << n) - 1), p); }
inline void store_first(float* p, int n, vf v) { _mm512_mask_storeu_ps(p, __mmask16((1 << n) - 1), v); }
#else
inline vf load_first(const float* p, int n, float rest) {
    float lane[W];
    for (int i = 0; i < W; i++) lane[i] = i < n ? p[i] : rest;
    return load(lane);
}
inline void store_first(float* p, int n, vf v) {
    for (int i = 0; i < n; i++) p[i] = v[i];
}
#endif

// x * (hi + lo) - n with the product exact to float's precision of the small difference.
#if defined(__x86_64__) && !defined(__FMA__)
inline vf reduce(vf x, float hi, float lo, vf n) {
    const __m128d factor = _mm_set1_pd(double(hi) + double(lo));
    const __m128d low = _mm_sub_pd(_mm_mul_pd(_mm_cvtps_pd(x), factor), _mm_cvtps_pd(n));
    const __m128d high = _mm_sub_pd(_mm_mul_pd(_mm_cvtps_pd(_mm_movehl_ps(x, x)), factor),
                                    _mm_cvtps_pd(_mm_movehl_ps(n, n)));
    return _mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high));
}
#else
inline vf reduce(vf x, float hi, float lo, vf n) { return fma(x, set(lo), fma(x, set(hi), -n)); }
#endif

inline vf widen_bf16(vu16 h) { return (vf)(__builtin_convertvector(h, vi) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
inline vu16 narrow_bf16(vf x) {
    const vi bits = (vi)x;
    const vi rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const vi kept = x == x ? rounded : bits | 0x400000;
    return __builtin_convertvector(kept >> 16, vu16);
}

// Orders streamed writes before what follows.
inline void fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// f of all lanes, halving the lanes at every step.
template <class T, class F>
inline T reduce_lanes(T* lane, F f) {
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lane[i] = f(lane[i], lane[i + half]);
    return lane[0];
}

inline float sum(vf v) {
    float lane[W];
    store(lane, v);
    return reduce_lanes(lane, [](float a, float b) { return a + b; });
}

}  // namespace
