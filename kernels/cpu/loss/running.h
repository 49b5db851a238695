// The sums of one row, over its blocks.
#pragma once

#include "exp.h"
#include "loss/sums.h"

namespace {

// The sum of the logits of a block, which label smoothing needs.
inline float sum_block(const float* x, int64_t n) {
    vf even = {}, odd = {};
    sweep_pairs(even, odd, n, [&](vf& total, int64_t i, auto part) { total += load(x + i, part, 0); });
    return sum(even + odd);
}

// Count, sum and squares of finite numbers: of each lane in double, from floats less some number near them.
struct LaneSpread {
    vd count = {}, sum = {}, squares = {};

    void take(vf a) {
        const vi masked = a == set(-infinity);
        const vd v = __builtin_convertvector(masked ? vf{} : a, vd);
        count += __builtin_convertvector(masked ? vf{} : set(1), vd);
        sum += v;
        squares += v * v;
    }
};

// The standard deviation from these sums, 0 without a number.
inline double deviation(double count, double sum, double squares) {
    const double n = count > 1 ? count : 1, mean = sum / n, variance = squares / n - mean * mean;
    return variance < 0 ? 0 : __builtin_sqrt(variance);
}

// The same of a row.
struct RowSpread {
    double count = 0, sum = 0, squares = 0;
    float base = 0;

    void add(const float* x, int64_t n, float origin) {
        if (count == 0) base = origin;
        LaneSpread lanes;
        sweep(n, [&](int64_t i, auto part) { lanes.take(load(x + i, part, -infinity) - base); });
        for (int lane = 0; lane < W; lane++) {
            count += lanes.count[lane];
            sum += lanes.sum[lane];
            squares += lanes.squares[lane];
        }
    }
};

// The sums over the blocks of one row so far, with exponentials of logits less `origin`.
struct Running {
    Top top = {-infinity, -infinity};
    float origin = 0;  // the maximum at some time before, or 0 while that was -inf
    double z = 0, d = 0;
    RowSpread spread;  // of the logits, for the stats

    // Moves the origin to the maximum so far and rescales the sums, where the student's origin has moved by
    // `student_shift`; `ratio` is the factor of this tensor's logits in d. Returns the old origin less the new one.
    double rebase(double student_shift, const Exponent& e, float ratio = 1) {
        const float moved = top.first == -infinity ? 0 : top.first;
        const double shift = double(origin) - moved;
        origin = moved;
        if (z != 0 && (shift != 0 || student_shift != 0)) {
            const double factor = exp(float(shift), e);
            d = factor == 0 ? 0 : factor * (d + (shift * ratio - student_shift) * z);
            z *= factor;
        }
        return shift;
    }
};

}  // namespace
