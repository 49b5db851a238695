// The sums of one block of a row: its largest logits, Z = sum e^a and D = sum e^a (a - b).
#pragma once

#include "exp.h"
#include "loss/logits.h"

namespace {

// The two largest logits of a row.
struct Top {
    float first, second;
};

inline Top merge(Top a, Top b) {
    const float smaller = a.first < b.first ? a.first : b.first;
    const float second = a.second > b.second ? a.second : b.second;
    return {a.first > b.first ? a.first : b.first, smaller > second ? smaller : second};
}

// The largest logit of each lane (Best), or the two largest (BestTwo).
struct Best {
    vf first = set(-infinity);

    void take(vf v) { first = max(first, v); }
    void take(const Best& other) { take(other.first); }
    Top top() const { return {largest_lane(first), -infinity}; }
};
struct BestTwo {
    vf first = set(-infinity), second = first;

    void take(vf v) {
        second = max(second, min(first, v));
        first = max(first, v);
    }
    void take(const BestTwo& other) {
        take(other.first);
        second = max(second, other.second);
    }
    Top top() const {
        float firsts[W], seconds[W];
        store(firsts, first);
        store(seconds, second);
        Top top = {-infinity, -infinity};
        for (int lane = 0; lane < W; lane++) top = merge(top, {firsts[lane], seconds[lane]});
        return top;
    }
};

template <class T>
inline float largest(const Row<T>& x, int64_t n) {
    Best even, odd;
    sweep_pairs(even, odd, n, [&](Best& best, int64_t i, auto part) { best.take(load(x, i, part)); });
    even.take(odd);
    return even.top().first;
}

// Compares the bits as integers, of which a vector holds twice as many as of floats: with all other bits of negative
// numbers flipped, integers have the order of the numbers.
inline float largest(const Row<bf16>& x, int64_t n) {
    const auto order = [](vs16 bits) { return bits ^ ((bits >> 15) & 0x7fff); };
    vs16 best = vs16{} - 0x7f81;  // the key of -inf
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        const vs16 key = order(load_bits<vs16>(x.p + i));
        best = key > best ? key : best;
    }
    best = order(best);
    float found = -infinity;
    for (int lane = 0; lane < 2 * W; lane++) {
        const float v = widen(bf16{uint16_t(best[lane])});
        found = v > found ? v : found;
    }
    for (; i < n; i++) found = x[i] > found ? x[i] : found;
    return found;
}

// The logits of the next block, which are prefetched during the work on this one.
struct Ahead {
    const char* p;
    int size;

    void fetch(int64_t i) const { __builtin_prefetch(p + i * size); }
};

// The sums and the largest logits of a block. With `Best`, the second largest is -inf.
struct Sums {
    float z, d;
    Top top;
};

template <class Maxima>
struct Lanes {
    vf z = {}, d = {};
    Maxima best;
};

template <class Maxima>
inline Sums add_up(const Lanes<Maxima>& even, const Lanes<Maxima>& odd) {
    Maxima best = even.best;
    best.take(odd.best);
    return {sum(even.z + odd.z), sum(even.d + odd.d), best.top()};
}

// For the student, and for the cross entropy: a = x - origin, y = e^(a / tau), z = sum y. If the origin is 0, `a` may
// be the memory of x; if it is null, nothing is written to it.
template <class Maxima, bool has_a = true, class T>
[[gnu::flatten]] inline Sums exp_block(Row<T> x, float* a, float* y, int64_t n, float origin, Exponent e, Ahead ahead) {
    Lanes<Maxima> even, odd;
    sweep_pairs(even, odd, n, [&](Lanes<Maxima>& sums, int64_t i, auto part) {
        ahead.fetch(i);
        const vf logit = load(x, i, part), shifted = logit - origin;
        const vf v = exp(shifted, e);
        sums.z += v;
        sums.best.take(logit);
        if (has_a) store(a + i, shifted, part);
        store(y + i, v, part);
    });
    return add_up(even, odd);
}

// For a teacher: y = e^(a / tau), z = sum y and d = sum y (a ratio - b), with a = x - origin and b the student's logits
// less their origin. With `masked`, y = 0 adds 0 to d even where b is -inf. Without, d is NaN there, and has the same bits
// elsewhere.
template <bool masked, class Maxima, class T>
[[gnu::flatten]] inline Sums divergence_block(Row<T> x, const float* b, float* y, int64_t n, float origin, float ratio, Exponent e, Ahead ahead) {
    Lanes<Maxima> even, odd;
    sweep_pairs(even, odd, n, [&](Lanes<Maxima>& sums, int64_t i, auto part) {
        ahead.fetch(i);
        const vf logit = load(x, i, part), a = logit - origin;
        const vf v = exp(a, e);
        vf difference = fma(a, set(ratio), -load(b + i, part, 0));
        // Lanes after the last class hold -inf.
        if (masked || is_part(part)) difference = v != 0 ? difference : vf{};
        sums.z += v;
        sums.d = fma(v, difference, sums.d);
        sums.best.take(logit);
        store(y + i, v, part);
    });
    return add_up(even, odd);
}

}  // namespace
