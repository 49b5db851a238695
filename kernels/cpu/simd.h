// Vectors of W floats on each instruction set: the operations that GCC and Clang vector types do not have. Arithmetic,
// comparisons, shifts and `mask ? a : b` are those of the compiler. Included by one file per instruction set;
// everything is local to that file.
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
typedef double vd __attribute__((vector_size(8 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vu16 __attribute__((vector_size(2 * W)));
typedef int16_t vs16 __attribute__((vector_size(4 * W)));
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

// A number plus `magic` is rounded to a multiple of the last bit of `magic`.
#if defined(__AVX512F__)
// A multiple of 1/32.
constexpr float magic = 0x1.8p18f;
#else
// A multiple of 1. The lowest nine bits of t = magic + n hold n + 191; shifted into the exponent of a float, they give
// 2^(n + 64).
constexpr float magic = 0x1.8p23f + 191;
#endif

// max(bound, x): x where x is NaN.
// power(f, t): 2^(n + f) for t = magic + n with n in [-191, 60], and f the remainder of the rounding. Subnormal results
//     are rounded.
// low_pairs(a, b): a0 b0 a1 b1 of each four lanes; high_pairs: a2 b2 a3 b3.
// low_halves(a, b): a0 a1 b0 b1 of each four lanes; high_halves: a2 a3 b2 b3.
// load_quads: four floats from each of W / 4 addresses; store_quad<i>: lanes 4 i to 4 i + 3.
#if defined(__AVX512F__)
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf max(vf bound, vf x) { return _mm512_max_ps(bound, x); }
inline vf min(vf bound, vf x) { return _mm512_min_ps(bound, x); }
inline vf power(vf f, vf t) {
    // The fraction of n is the lowest five bits of t, which index the tables. Its integer part is added to the
    // exponent.
    const vf low = {0x1.000000p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f,
                    0x1.2387a6p+0f, 0x1.29e9e0p+0f, 0x1.306fe0p+0f, 0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f,
                    0x1.4bfdaep+0f, 0x1.5342b6p+0f, 0x1.5ab07ep+0f, 0x1.6247ecp+0f};
    const vf high = {0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f, 0x1.93737cp+0f,
                     0x1.9c4918p+0f, 0x1.a5503cp+0f, 0x1.ae89fap+0f, 0x1.b7f770p+0f, 0x1.c199bep+0f, 0x1.cb720ep+0f,
                     0x1.d5818ep+0f, 0x1.dfc974p+0f, 0x1.ea4afap+0f, 0x1.f50766p+0f};
    const vf fraction = _mm512_permutex2var_ps(low, (__m512i)t, high);
    const vf p = f * fma(f, set(0x1.ebfd1cp-3f), set(0x1.62e584p-1f));
    return _mm512_scalef_ps(fma(fraction, p, fraction), t - magic);
}
inline void stream(float* p, vf v) { _mm512_stream_ps(p, v); }
inline vf widen(vu16 h) { return _mm512_cvtph_ps((__m256i)h); }
inline vf low_pairs(vf a, vf b) { return _mm512_unpacklo_ps(a, b); }
inline vf high_pairs(vf a, vf b) { return _mm512_unpackhi_ps(a, b); }
inline vf low_halves(vf a, vf b) { return (vf)_mm512_unpacklo_pd((__m512d)a, (__m512d)b); }
inline vf high_halves(vf a, vf b) { return (vf)_mm512_unpackhi_pd((__m512d)a, (__m512d)b); }
inline vf load_quads(const float* p, int64_t stride) {
    const __m512 one = _mm512_castps128_ps512(_mm_loadu_ps(p));
    const __m512 two = _mm512_insertf32x4(one, _mm_loadu_ps(p + stride), 1);
    const __m512 three = _mm512_insertf32x4(two, _mm_loadu_ps(p + 2 * stride), 2);
    return _mm512_insertf32x4(three, _mm_loadu_ps(p + 3 * stride), 3);
}
template <int i>
inline void store_quad(float* p, vf v) {
    _mm_storeu_ps(p, _mm512_extractf32x4_ps(v, i));
}
#else
#if defined(__AVX2__)
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf max(vf bound, vf x) { return _mm256_max_ps(bound, x); }
inline vf min(vf bound, vf x) { return _mm256_min_ps(bound, x); }
inline void stream(float* p, vf v) { _mm256_stream_ps(p, v); }
inline vf widen(vu16 h) { return _mm256_cvtph_ps((__m128i)h); }
inline vf low_pairs(vf a, vf b) { return _mm256_unpacklo_ps(a, b); }
inline vf high_pairs(vf a, vf b) { return _mm256_unpackhi_ps(a, b); }
inline vf low_halves(vf a, vf b) { return (vf)_mm256_unpacklo_pd((__m256d)a, (__m256d)b); }
inline vf high_halves(vf a, vf b) { return (vf)_mm256_unpackhi_pd((__m256d)a, (__m256d)b); }
inline vf load_quads(const float* p, int64_t stride) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
}
template <int i>
inline void store_quad(float* p, vf v) {
    _mm_storeu_ps(p, _mm256_extractf128_ps(v, i));
}
#elif defined(__x86_64__)
inline vf fma(vf a, vf b, vf c) { return a * b + c; }
inline vf max(vf bound, vf x) { return _mm_max_ps(bound, x); }
inline vf min(vf bound, vf x) { return _mm_min_ps(bound, x); }
inline void stream(float* p, vf v) { _mm_stream_ps(p, v); }
inline vf widen(vu16 h) {
    // A multiplication changes the bias of the exponent from 15 to 127, also for subnormal numbers.
    const vi bits = __builtin_convertvector(h, vi), magnitude = bits & 0x7fff;
    const vi finite = (vi)((vf)(magnitude << 13) * set(0x1p112f));
    const vi special = (magnitude << 13) | 0x7f800000;
    return (vf)((magnitude >= 0x7c00 ? special : finite) | (bits & 0x8000) << 16);
}
inline vf low_pairs(vf a, vf b) { return _mm_unpacklo_ps(a, b); }
inline vf high_pairs(vf a, vf b) { return _mm_unpackhi_ps(a, b); }
inline vf low_halves(vf a, vf b) { return _mm_movelh_ps(a, b); }
inline vf high_halves(vf a, vf b) { return _mm_movehl_ps(b, a); }
#else
inline vf fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
inline vf max(vf bound, vf x) { return vmaxq_f32(bound, x); }
inline vf min(vf bound, vf x) { return vminq_f32(bound, x); }
inline void stream(float* p, vf v) { vst1q_f32(p, v); }
inline vf widen(vu16 h) { return vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)h)); }
inline vf low_pairs(vf a, vf b) { return vzip1q_f32(a, b); }
inline vf high_pairs(vf a, vf b) { return vzip2q_f32(a, b); }
inline vf low_halves(vf a, vf b) { return (vf)vzip1q_f64((float64x2_t)a, (float64x2_t)b); }
inline vf high_halves(vf a, vf b) { return (vf)vzip2q_f64((float64x2_t)a, (float64x2_t)b); }
#endif
#endif
#if !defined(__AVX2__)
inline vf load_quads(const float* p, int64_t) { return load(p); }
template <int i>
inline void store_quad(float* p, vf v) {
    store(p, v);
}
#endif

// Four columns of W rows, from row r at p + r * stride.
inline void load_columns(const float* p, int64_t stride, vf (&column)[4]) {
    const vf a = load_quads(p, 4 * stride), b = load_quads(p + stride, 4 * stride);
    const vf c = load_quads(p + 2 * stride, 4 * stride), d = load_quads(p + 3 * stride, 4 * stride);
    const vf ab = low_pairs(a, b), cd = low_pairs(c, d), ab_high = high_pairs(a, b), cd_high = high_pairs(c, d);
    column[0] = low_halves(ab, cd);
    column[1] = high_halves(ab, cd);
    column[2] = low_halves(ab_high, cd_high);
    column[3] = high_halves(ab_high, cd_high);
}

template <int i>
inline void store_rows(float* p, int64_t stride, vf a, vf b, vf c, vf d) {
    store_quad<i>(p, a);
    store_quad<i>(p + stride, b);
    store_quad<i>(p + 2 * stride, c);
    store_quad<i>(p + 3 * stride, d);
    if constexpr (4 * i + 4 < W) store_rows<i + 1>(p + 4 * stride, stride, a, b, c, d);
}

// The inverse of load_columns: writes four floats to each of W rows, in order.
inline void store_columns(float* p, int64_t stride, vf a, vf b, vf c, vf d) {
    const vf ab = low_pairs(a, b), cd = low_pairs(c, d), ab_high = high_pairs(a, b), cd_high = high_pairs(c, d);
    store_rows<0>(p, stride, low_halves(ab, cd), high_halves(ab, cd), low_halves(ab_high, cd_high),
                  high_halves(ab_high, cd_high));
}

#if !defined(__AVX512F__)
inline vf power(vf f, vf t) {
    vf p = fma(f, set(0x1.41fb2ep-13f), set(0x1.5f3f30p-10f));
    p = fma(f, p, set(0x1.3b2d50p-7f));
    p = fma(f, p, set(0x1.c6aee6p-5f));
    p = fma(f, p, set(0x1.ebfbdcp-3f));
    p = fma(f, p, set(0x1.62e430p-1f));
    p = fma(f, p, set(1));
    return p * (vf)((vi)t << 23) * 0x1p-64f;
}
#endif

// Loads or stores the first n lanes. The other lanes are `rest`, or are not written.
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

// x * (hi + lo) - n, where the difference is small and the product is exact enough for it to be a rounded float.
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

#if defined(__AVX512F__)
// One permutation of 16-bit words with zeros between them, instead of a conversion and a shift.
inline vf widen_bf16(vu16 h) {
    const vi places = {0x00000, 0x10000, 0x20000, 0x30000, 0x40000, 0x50000, 0x60000, 0x70000,
                       0x80000, 0x90000, 0xa0000, 0xb0000, 0xc0000, 0xd0000, 0xe0000, 0xf0000};
    return (vf)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)places, _mm512_castsi256_si512((__m256i)h));
}
#else
inline vf widen_bf16(vu16 h) { return (vf)(__builtin_convertvector(h, vi) << 16); }
#endif

// Rounds to nearest, ties to even. NaN stays NaN.
inline vu16 narrow_bf16(vf x) {
    // Unsigned: the sum may go beyond the largest signed integer, for a NaN.
    const vu bits = (vu)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const vu kept = x == x ? rounded : bits | 0x400000;
    return __builtin_convertvector(kept >> 16, vu16);
}

// Completes streamed writes before later ones.
inline void fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// Reductions over all lanes, in halves.
#if defined(__AVX512F__)
inline float sum(vf v) { return _mm512_reduce_add_ps(v); }
inline float largest_lane(vf v) { return _mm512_reduce_max_ps(v); }
#else
template <class F>
inline float reduce_lanes(vf v, F f) {
    float lane[W];
    store(lane, v);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lane[i] = f(lane[i], lane[i + half]);
    return lane[0];
}
inline float sum(vf v) {
    return reduce_lanes(v, [](float a, float b) { return a + b; });
}
inline float largest_lane(vf v) {
    return reduce_lanes(v, [](float a, float b) { return a > b ? a : b; });
}
#endif

}  // namespace
