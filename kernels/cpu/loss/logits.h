// Reading logits: four types, any strides, as float vectors.
#pragma once

#include "loss/core.h"
#include "loss/sweep.h"

namespace {

using namespace amtss;

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    __builtin_memcpy(&y, &bits, sizeof y);
    return y;
}
inline float widen(f16 x) { return widen(vu16{} + x.bits)[0]; }

// A row of logits of one type. Only codes have `row_max` and `step`.
template <class T>
struct Row {
    const T* p;
    int64_t stride;
    float row_max, step;

    float operator[](int64_t i) const { return widen(p[i * stride]); }
};
template <>
inline float Row<uint8_t>::operator[](int64_t i) const {
    const uint8_t code = p[i * stride];
    return code == 255 ? -infinity : row_max - step * code;
}

// Vectors of W consecutive logits of a row whose stride is 1.
inline vf load(const Row<float>& row, int64_t i, Whole) { return load(row.p + i); }
inline vf load(const Row<bf16>& row, int64_t i, Whole) { return widen_bf16(load_bits<vu16>(row.p + i)); }
inline vf load(const Row<f16>& row, int64_t i, Whole) { return widen(load_bits<vu16>(row.p + i)); }
inline vf load(const Row<uint8_t>& row, int64_t i, Whole) {
    const vi code = __builtin_convertvector(load_bits<vu8>(row.p + i), vi);
    return code == 255 ? set(-infinity) : row.row_max - row.step * __builtin_convertvector(code, vf);
}
inline vf load(const Row<float>& row, int64_t i, Part part) { return load_first(row.p + i, part.n, -infinity); }
template <class T>
inline vf load(const Row<T>& row, int64_t i, Part part) {
    float lane[W];
    for (int rest = 0; rest < W; rest++) lane[rest] = rest < part.n ? row[i + rest] : -infinity;
    return load(lane);
}

// Calls f(row) with row n in its own type.
template <class F>
inline auto with_row(const Matrix& m, int64_t n, F f) {
    n = m.row(n);
    const int64_t offset = n * m.row_stride;
    switch (m.type) {
        case Type::f32: return f(Row<float>{(const float*)m.data + offset, m.column_stride, 0, 0});
        case Type::bf16: return f(Row<bf16>{(const bf16*)m.data + offset, m.column_stride, 0, 0});
        case Type::f16: return f(Row<f16>{(const f16*)m.data + offset, m.column_stride, 0, 0});
        default:
            return f(Row<uint8_t>{(const uint8_t*)m.data + offset, m.column_stride, m.row_max[n], m.step[n]});
    }
}

// Copies `count` logits of row n from class `begin` on, as floats.
inline void copy(const Matrix& m, int64_t n, int64_t begin, int64_t count, float* to) {
    with_row(m, n, [&](auto row) {
        int64_t i = 0;
        if (row.stride == 1)
            for (; i + W <= count; i += W) store(to + i, load(row, begin + i, Whole{}));
        for (; i < count; i++) to[i] = row[begin + i];
    });
}

// `count` consecutive floats, the logits of row n from class `begin` on: in place where they are that already,
// otherwise copied into `buffer`.
inline const float* read(const Matrix& m, int64_t n, int64_t begin, int64_t count, float* buffer) {
    if (m.type == Type::f32 && m.column_stride == 1) return (const float*)m.data + m.row(n) * m.row_stride + begin;
    copy(m, n, begin, count, buffer);
    return buffer;
}

// Calls f(row) with a row of stride 1 whose element 0 is row n's logit of class `begin`: in place and in its own type,
// or, if the classes of the matrix have another stride, copied into `buffer` as floats.
template <class F>
inline auto with_block(const Matrix& m, int64_t n, int64_t begin, int64_t count, float* buffer, F f) {
    if (m.column_stride != 1) return f(Row<float>{read(m, n, begin, count, buffer), 1, 0, 0});
    return with_row(m, n, [&](auto row) {
        row.p += begin;
        return f(row);
    });
}

inline float read(const Matrix& m, int64_t n, int64_t c) {
    return with_row(m, n, [&](auto row) { return row[c]; });
}

}  // namespace
