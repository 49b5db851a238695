// The divergences: their terms, and the slopes that make their gradient.
#pragma once

#include "exp.h"
#include "loss/core.h"

namespace {

using namespace amtss;

// The same operations on vectors of float and on a double.
inline vf all(vf, float x) { return set(x); }
inline double all(double, float x) { return x; }
inline double fma(double a, double b, double c) { return a * b + c; }
inline double max(double bound, double x) { return x < bound ? bound : x; }
inline vf less_size(vf x) { return (vf)((vi)x | int32_t(0x80000000)); }  // -|x|
inline double less_size(double x) { return -__builtin_fabs(x); }

// log(a / b) of normal numbers; 0 where they are equal.
inline vf log_quotient(vf a, vf b) {
    // a = 2^n m with m / b in (2/3, 3/2); log(m / b) = 2 atanh((m - b) / (m + b)). The bits of a number are nearly its
    // logarithm.
    const vi n = ((vi)a - (vi)b + (1 << 22)) >> 23;
    const vf m = (vf)((vi)a - (n << 23)), s = (m - b) / (m + b), z = s * s, twice = s + s;
    const vf p = z * fma(z, fma(z, set(0x1.36e466p-3f), set(0x1.992b0ap-3f)), set(0x1.5555b4p-2f));
    const vf whole = __builtin_convertvector(n, vf);
    return fma(whole, set(0x1.62e4p-1f), fma(whole, set(0x1.7f7d1cp-20f), fma(twice, p, twice)));
}
inline double log_quotient(double a, double b) { return __builtin_log(a / b); }

// Of one class: what it adds to D(p, q), and the slope q dD/dq. The gradient of D with respect to a scaled logit is the
// slope less q times the sum of all slopes, so that slopes may differ from these by a constant times q.
template <class V>
struct Contrast {
    V term, slope;
};

// The numbers that a divergence needs.
struct Mixing {
    float beta, rest;  // divergence_beta, 1 - divergence_beta
    float p, q;        // m = p times the teacher's probability + q times the student's

    explicit Mixing(const Problem& problem) : beta(problem.divergence_beta), rest(1 - beta), p(beta), q(rest) {
        if (problem.divergence == Divergence::skew_reverse_kl) p = rest, q = beta;
    }
};

// `p`, `q`: probabilities of teacher and student. `d`: log p - log q, from the logits; any number or -inf where both
// are 0. Where p = q and d = 0, term and slope are exactly 0. Terms of a probability 0 are 0, and NaN stays NaN.
template <Divergence divergence, class V>
inline Contrast<V> contrast(V p, V q, V d, const Mixing& mixing) {
    const V none = {};
    const auto number = [&](float x) { return all(none, x); };
    if constexpr (divergence == Divergence::forward_kl) return {p != 0 ? p * d : none, -p};
    if constexpr (divergence == Divergence::reverse_kl) {
        const V term = q != 0 ? -q * d : none;
        return {term, term};
    }
    if constexpr (divergence == Divergence::tvd) {
        const V difference = q - p, half = 0.5f * q;
        return {0.5f * (difference < 0 ? -difference : difference), difference > 0 ? half : difference < 0 ? -half : difference};
    }
    // m = large + share (small - large) is exactly p where p = q, also where both are too small for their logarithm.
    const auto below = p <= q;
    const V small = below ? p : q, larger = below ? q : p, large = max(number(0x1p-126f), larger);
    const V share = below ? number(mixing.p) : number(mixing.q);
    const V m = fma(share, small - larger, large), log_x = log_quotient(m, large);
    // small log(small / large); where small is 0, whatever the logits say.
    const V beyond = max(number(-200), less_size(d)) * small;
    const V p_term = (below ? beyond : none) - p * log_x;  // p log(p / m)
    const V q_term = (below ? none : beyond) - q * log_x;  // q log(q / m)
    if constexpr (divergence == Divergence::jsd) return {share * beyond - m * log_x, mixing.rest * q_term};
    const V tilt = (p - q) * (q / m);
    if constexpr (divergence == Divergence::skew_forward_kl) return {p_term, -(mixing.rest * mixing.rest) * tilt};
    return {q_term, fma(number(mixing.beta * mixing.rest), tilt, q_term)};
}

// Calls f with the divergence as a type: f(std::integral_constant<Divergence, ...>) without the standard library.
template <Divergence divergence>
struct Kind {
    static constexpr Divergence value = divergence;
};
template <class F>
inline void with_comparison(Divergence divergence, F f) {
    switch (divergence) {
        case Divergence::reverse_kl: return f(Kind<Divergence::reverse_kl>{});
        case Divergence::jsd: return f(Kind<Divergence::jsd>{});
        case Divergence::skew_forward_kl: return f(Kind<Divergence::skew_forward_kl>{});
        case Divergence::skew_reverse_kl: return f(Kind<Divergence::skew_reverse_kl>{});
        case Divergence::tvd: return f(Kind<Divergence::tvd>{});
        // The forward KL needs no comparison class by class.
        case Divergence::forward_kl: return;
    }
}

// The same with the forward KL.
template <class F>
inline void with_divergence(Divergence divergence, F f) {
    divergence == Divergence::forward_kl ? f(Kind<Divergence::forward_kl>{}) : with_comparison(divergence, f);
}

}  // namespace
