// Loops over the elements of an array, one vector at a time.
#pragma once

#include "simd.h"

namespace {

constexpr float infinity = __builtin_inff(), nan = __builtin_nanf("");

// A whole vector of a row, or its last elements.
struct Whole {};
struct Part {
    int n;
};
constexpr bool is_part(Whole) { return false; }
constexpr bool is_part(Part) { return true; }

inline vf load(const float* p, Whole, float) { return load(p); }
inline vf load(const float* p, Part part, float rest) { return load_first(p, part.n, rest); }
inline void store(float* p, vf v, Whole) { store(p, v); }
inline void store(float* p, vf v, Part part) { store_first(p, part.n, v); }

// Calls f(i, Whole or Part) for each vector of [0, n).
template <class F>
inline void sweep(int64_t n, F f) {
    int64_t i = 0;
    for (; i + W <= n; i += W) f(i, Whole{});
    if (i < n) f(i, Part{int(n - i)});
}

// Calls f(accumulator, i, Whole or Part) for each vector of [0, n). Two accumulators take turns: consecutive sums do
// not wait for each other.
template <class Accumulator, class F>
inline void sweep_pairs(Accumulator& even, Accumulator& odd, int64_t n, F f) {
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        f(even, i, Whole{});
        f(odd, i + W, Whole{});
    }
    if (i + W <= n) {
        f(even, i, Whole{});
        i += W;
    }
    if (i < n) f(odd, i, Part{int(n - i)});
}

template <class... Arrays>
inline void clear(Arrays&... arrays) {
    (store(arrays, vf{}), ...);
}

}  // namespace
