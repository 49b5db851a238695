// The gradient of one block of a row: a sum of exponentials times factors, written in the type of the output.
#pragma once

#include <algorithm>

#include "exp.h"
#include "loss/logits.h"
#include "loss/sums.h"

namespace {

// The exponentials of a block: kept by the measuring step, or computed again from the logits.
struct Kept {
    const float* e;

    template <class Size>
    vf operator()(int64_t i, Size part) const {
        return load(e + i, part, 0);
    }
};
template <class T>
struct Recomputed {
    Row<T> x;
    float origin;
    Exponent exponent;
    Ahead ahead;

    template <class Size>
    vf operator()(int64_t i, Size part) const {
        ahead.fetch(i);
        return exp(load(x, i, part) - origin, exponent);
    }
};

// One term of a gradient: a factor times the exponentials of a block.
template <class Source>
struct Term {
    Source e;
    float factor;
};

template <class T>
inline Term<Recomputed<T>> recomputed(Row<T> x, float origin, Exponent e, Ahead ahead, float factor) {
    return {{x, origin, e, ahead}, factor};
}

// g = the sum of the terms if `first`, otherwise g += their sum.
template <class... Sources>
inline void add_block(float* g, int64_t n, bool first, Term<Sources>... terms) {
    sweep(n, [=](int64_t i, auto part) {
        vf v = first ? vf{} : load(g + i, part, 0);
        ((v = fma(set(terms.factor), terms.e(i, part), v)), ...);
        store(g + i, v, part);
    });
}

// Destinations of a gradient. `sweep` calls f as the function `sweep` does; the call operator writes a vector.
struct Stored {
    float* to;

    template <class F>
    void sweep(int64_t n, F f) const {
        ::sweep(n, f);
    }
    template <class Size>
    void operator()(int64_t i, vf v, Size part) const {
        store(to + i, v, part);
    }
};
// Past the cache: whole vectors begin at multiples of their size.
struct Streamed {
    float* to;

    template <class F>
    void sweep(int64_t n, F f) const {
        const int64_t before = std::min<int64_t>(-((uintptr_t)to / sizeof(float)) % W, n);
        if (before) f(0, Part{int(before)});
        ::sweep(n - before, [=](int64_t i, auto part) { f(before + i, part); });
    }
    void operator()(int64_t i, vf v, Whole) const { stream(to + i, v); }
    void operator()(int64_t i, vf v, Part part) const { store(to + i, v, part); }
};

// As bfloat16. Only whole vectors are written, so the memory must have room for one after the last element.
struct Narrowed {
    uint16_t* to;

    template <class F>
    void sweep(int64_t n, F f) const {
        ::sweep(n, f);
    }
    template <class Size>
    void operator()(int64_t i, vf v, Size) const {
        const vu16 narrow = narrow_bf16(v);
        __builtin_memcpy(to + i, &narrow, sizeof narrow);
    }
};

// out = own - (the sum of the terms) if `first`, otherwise out = own - (g + the sum of the terms). The product of `own`
// is rounded as the first term's is: where the student equals its only teacher, the result is exactly 0.
template <class Out, class Source, class... Sources>
inline void finish_block(Out out, const float* g, int64_t n, bool first, Term<Source> own, Term<Sources>... terms) {
    out.sweep(n, [=](int64_t i, auto part) {
        vf v = first ? vf{} : load(g + i, part, 0);
        ((v = fma(set(terms.factor), terms.e(i, part), v)), ...);
        out(i, own.factor * own.e(i, part) - v, part);
    });
}

// Copies bytes to a gradient; with `streaming`, past the cache.
inline void copy_out(const void* source, void* target, int64_t bytes, bool streaming) {
    const char* const from = (const char*)source;
    char* const to = (char*)target;
    int64_t done = streaming ? -(uintptr_t)to % sizeof(vf) : 0;
    if (done > bytes) done = bytes;
    __builtin_memcpy(to, from, done);
    for (; done + int64_t(sizeof(vf)) <= bytes; done += sizeof(vf)) {
        const vf v = load((const float*)(from + done));
        if (streaming)
            stream((float*)(to + done), v);
        else
            store((float*)(to + done), v);
    }
    __builtin_memcpy(to + done, from + done, bytes - done);
}

// Writes n elements of a gradient in its own type. `narrow`: room for n bfloat16, up to whole vectors.
inline void write_block(const float* g, void* out, Type type, int64_t n, bool streaming, uint16_t* narrow) {
    if (type == Type::f32) return copy_out(g, out, n * 4, streaming);
    for (int64_t i = 0; i < n; i += W) Narrowed{narrow}(i, load(g + i), Whole{});
    copy_out(narrow, out, n * 2, streaming);
}

}  // namespace
