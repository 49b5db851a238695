// Exponential and logarithm of vectors. Included by one file per instruction set.
#pragma once

#include "simd.h"

namespace {

// e^(x / tau) = 2^(x (hi + lo)); for x below `low` it is 0 in float.
struct Exponent {
    float hi, lo, low;

    explicit Exponent(double tau) {
        const double factor = 1.4426950408889634 / tau;
        hi = float(factor);
        lo = float(factor - hi);
        low = float(-152 / factor);
    }
};

// e^(x / tau) for x up to 40 tau, within 1.8 ulp (subnormal results included); 0 at -inf, NaN at NaN.
inline vf exp(vf x, const Exponent& e) {
    x = max(set(e.low), x);
    const vf t = fma(x, set(e.hi), set(magic));
    return power(reduce(x, e.hi, e.lo, t - magic), t);
}

inline float exp(float x, const Exponent& e) { return exp(set(x), e)[0]; }

// log(x) for positive normal x; NaN at NaN.
inline vf log(vf x) {
    // x = 2^n m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh((m - 1) / (m + 1)).
    const vi bits = (vi)x - 0x3f3504f3;
    const vf n = __builtin_convertvector(bits >> 23, vf);
    const vf m = (vf)((bits & 0x7fffff) + 0x3f3504f3);
    const vf s = (m - 1) / (m + 1), z = s * s;
    vf p = fma(z, set(0.14937392f), set(0.19988717f));
    p = z * fma(z, p, set(0.33333388f));
    const vf log_m = fma(s + s, p, s + s);
    const vf y = fma(n, set(0x1.62e4p-1f), fma(n, set(0x1.7f7d1cp-20f), log_m));
    return x == x ? y : x;
}

}  // namespace
