// Outer products with their sums in registers: up to 12 rows by two vectors of columns. AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <utility>

#define INLINE __attribute__((always_inline))

namespace {

// 24 sums, two vectors of columns and one broadcast value fill the registers.
constexpr int most_rows = 12;

inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : __mmask16((1u << n) - 1); }

// Calls f(0), ... f(R - 1) with constants. In a loop, the compiler would keep an array of sums in memory.
template <class F, int... r>
INLINE inline void each(std::integer_sequence<int, r...>, F f) {
    (f(std::integral_constant<int, r>{}), ...);
}

template <int R>
using Rows = std::make_integer_sequence<int, R>;

// Row r of a matrix, as one of four addresses plus 0, 1 or 2 strides: few registers, no multiplication.
template <class T>
struct RowAddress {
    const T *zero, *three, *six, *nine;
    int64_t stride;

    INLINE RowAddress(const T* p, int64_t stride)
        : zero(p), three(p + 3 * stride), six(p + 6 * stride), nine(p + 9 * stride), stride(stride) {}
    template <int r>
    INLINE const T* operator[](std::integral_constant<int, r>) const {
        return (r < 3 ? zero : r < 6 ? three : r < 9 ? six : nine) + r % 3 * stride;
    }
};

// Calls f<R>(...) for R = rows, which is 1 to 12.
#define FOR_ROWS(rows, f, ...)                                                                                   \
    do {                                                                                                         \
        using F = decltype(&f<1>);                                                                               \
        static constexpr F table[] = {nullptr, f<1>, f<2>, f<3>, f<4>, f<5>, f<6>, f<7>, f<8>, f<9>, f<10>, f<11>, f<12>}; \
        table[rows](__VA_ARGS__);                                                                                \
    } while (false)

// Calls f(begin, end) for blocks of at most 12 of n rows. The blocks have nearly one size, because small ones are
// inefficient.
template <class F>
inline void row_blocks(int64_t n, F f) {
    const int64_t blocks = (n + most_rows - 1) / most_rows;
    for (int64_t b = 0; b < blocks; b++) f(n * b / blocks, n * (b + 1) / blocks);
}

}  // namespace
