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

// The sums over the blocks of one row so far, with exponentials of logits less `origin`.
struct Running {
    Top top = {-infinity, -infinity};
    float origin = 0;  // the maximum at some time before, or 0 while that was -inf
    double z = 0, d = 0;

    // Moves the origin to the maximum so far and rescales the sums, where the student's origin has moved by
    // `student_shift`. Returns the old origin less the new one.
    double rebase(double student_shift, const Exponent& e) {
        const float moved = top.first == -infinity ? 0 : top.first;
        const double shift = double(origin) - moved;
        origin = moved;
        if (z != 0 && (shift != 0 || student_shift != 0)) {
            const double factor = exp(float(shift), e);
            d = factor == 0 ? 0 : factor * (d + (shift - student_shift) * z);
            z *= factor;
        }
        return shift;
    }
};

}  // namespace
