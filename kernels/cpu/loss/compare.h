// Steps 4 and 5 of a tile: student and teachers class by class, once their normalisers and weights are known. For the
// stats: the distance sum |q - p| of each teacher. For every divergence but the forward KL: the divergence of each
// teacher, and the slopes of the gradient. A row's slopes are kept in the place of its first teacher's exponentials, or,
// where these are not kept, in a row of their own.
#pragma once

#include "loss/contrast.h"
#include "loss/gradient.h"
#include "loss/worker.h"

namespace {

// Stands for the student's logits of -inf, so that those of a teacher differ from them by a number or -inf.
constexpr float lowest = -3e38f;

// Probabilities of a block: kept exponentials, or those of its logits, times a factor.
struct Probabilities {
    const float* kept;  // null: computed from the logits
    const float* logits;
    float origin, factor;
    Exponent exponent;

    template <class Size>
    vf operator()(int64_t i, Size part) const {
        const vf e = kept ? load(kept + i, part, 0) : exp(load(logits + i, part, -infinity) - origin, exponent);
        return factor * e;
    }
};

// The probabilities of tensor j in the block [from, from + count) of a row.
inline Probabilities probabilities(const Worker& w, int lane, int64_t j, int64_t from, const float* logits) {
    const Exponent& exponent = w.soft[j].exponent;
    const float inverse_z = w.tensor[j].inverse_z[lane];
    if (!w.layout.keep) return {nullptr, logits, w.running[j].origin, inverse_z, exponent};
    const float shift = w.kept_origins(lane, j)[from / w.layout.span] - w.last_origin(lane, j);
    return {w.kept_row(lane, j) + from, logits, 0, shift == 0 ? inverse_z : inverse_z * exp(shift, exponent), exponent};
}

// The origin of a row's exponentials, its maximum.
inline float origin_of(const Worker& w, int lane, int64_t j) {
    return w.layout.keep ? w.last_origin(lane, j) : w.running[j].origin;
}

void Worker::pull_row(int lane) {
    if (row->student[lane] == 0) return;
    for (int64_t j = 1; j < layout.tensors; j++) running[j].d = 0;
    for (int64_t from = 0, end; from < p.classes; from = end) {
        end = block_end(from);
        const int64_t count = end - from, n = begin + lane;
        const auto logits = [&](int64_t j) { return layout.keep ? nullptr : read(matrix(j), n, from, count, teacher); };
        const Probabilities q = probabilities(*this, lane, 0, from, logits(0));
        sweep(count, [&](int64_t i, auto part) { store(fresh + i, q(i, part), part); });
        for (int64_t j = 1; j < layout.tensors; j++) {
            if (tensor[j].weight[lane] == 0 || is_list(j)) continue;
            const Probabilities p = probabilities(*this, lane, j, from, logits(j));
            vf even = {}, odd = {};
            sweep_pairs(even, odd, count, [&](vf& total, int64_t i, auto part) {
                const vf difference = load(fresh + i, part, 0) - p(i, part);
                total += difference < 0 ? -difference : difference;
            });
            running[j].d += sum(even + odd);
        }
    }
    for (int64_t j = 1; j < layout.tensors; j++) tensor[j].distance[lane] = float(running[j].d);
}

void Worker::pull_columns(int g) {
    const int64_t lanes = layout.lanes, size = p.classes * lanes;
    Measured* const tensor = this->tensor + g * layout.tensors;
    const vf inverse = load(tensor[0].inverse_z);
    for (int64_t j = 1; j < layout.tensors; j++) {
        const vf inverse_z = load(tensor[j].inverse_z);
        vf total = {};
        for (int64_t i = g * W; i < size; i += lanes) {
            const vf difference = load(kept + i) * inverse - load(kept + j * size + i) * inverse_z;
            total += difference < 0 ? -difference : difference;
        }
        store(tensor[j].distance, total);
    }
}

// Along the classes of one row, block by block.
void Worker::compare_row(int lane) {
    if (row->student[lane] == 0) return;
    const int64_t n = begin + lane;
    const Mixing mixing(p);
    for (int64_t j = 1; j < layout.tensors; j++) running[j].d = 0;
    double slope = 0;
    const bool terms_are_slopes = p.divergence == Divergence::reverse_kl;
    for (int64_t from = 0, end; from < p.classes; from = end) {
        end = block_end(from);
        const int64_t count = end - from;
        // Slopes that nobody needs, of a teacher without weight or without a gradient, are written aside.
        float* const slopes = !p.gradient ? gradient : layout.keep ? kept_slopes(lane) + from : this->slopes + from;
        const float* const s = read(p.student, n, from, count, teacher);
        const Probabilities student_q = probabilities(*this, lane, 0, from, s);
        const float top = origin_of(*this, lane, 0), inverse = soft[0].inverse;
        sweep(count, [&](int64_t i, auto part) {
            store(fresh + i, student_q(i, part), part);
            store(student + i, max(set(lowest), (load(s + i, part, -infinity) - top) * inverse), part);
        });
        bool empty = true;
        for (int64_t j = 1; j < layout.tensors; j++) {
            const float factor = tensor[j].factor[lane];
            if (is_list(j) || tensor[j].alpha[lane] == 0 || (factor == 0 && tensor[j].weight[lane] == 0 && !p.kd)) continue;
            const float* const t = read(matrix(j), n, from, count, teacher);
            const Probabilities teacher_p = probabilities(*this, lane, j, from, t);
            const float top = origin_of(*this, lane, j), inverse = soft[j].inverse, shift = tensor[j].shift[lane];
            float* const to = factor == 0 ? gradient : slopes;
            const bool first = factor == 0 || empty;
            empty = empty && factor == 0;
            with_comparison(p.divergence, [&](auto kind) {
                vf even = {}, odd = {};
                sweep_pairs(even, odd, count, [&](vf& total, int64_t i, auto part) {
                    // Both products are rounded alike: equal logits differ by 0.
                    const vf a = (load(t + i, part, -infinity) - top) * inverse;
                    const vf d = a - load(student + i, part, lowest) + shift;
                    const auto c = contrast<kind.value>(teacher_p(i, part), load(fresh + i, part, 0), d, mixing);
                    total += c.term;
                    const vf sum = first ? vf{} : load(to + i, part, 0);
                    store(to + i, fma(set(-factor), c.slope, sum), part);
                });
                running[j].d += sum(even + odd);
            });
        }
        if (!empty && !terms_are_slopes) slope += sum_block(slopes, count);
    }
    for (int64_t j = 1; j < layout.tensors; j++) {
        tensor[j].d[lane] = float(running[j].d);
        if (terms_are_slopes && tensor[j].factor[lane] != 0) slope -= tensor[j].factor[lane] * running[j].d;
    }
    row->slope[lane] = float(slope);
}

// One class of W rows at a time.
void Worker::compare_columns(int g) {
    const int64_t lanes = layout.lanes, size = p.classes * lanes;
    const float* const student_a = kept + layout.tensors * size;
    float* const teacher_a = kept + (layout.tensors + 2) * size;
    float* const slopes = teacher_a;
    Measured* const tensor = this->tensor + g * layout.tensors;
    const vf inverse_zs = load(tensor[0].inverse_z), none = {};
    const Mixing mixing(p);
    vf slope = none;
    for (int64_t j = 1; j < layout.tensors; j++) {
        Measured& t = tensor[j];
        const vf inverse_z = load(t.inverse_z), factor = load(t.factor), shift = load(t.shift);
        const float inverse = soft[j].inverse, inverse_s = soft[0].inverse;
        vf total = none;
        with_comparison(p.divergence, [&](auto kind) {
            for (int64_t i = g * W; i < size; i += lanes) {
                const vf b = max(set(lowest), load(student_a + i) * inverse_s);
                const vf d = load(teacher_a + (j - 1) * size + i) * inverse - b + shift;
                const vf probability = load(kept + j * size + i) * inverse_z, q = load(kept + i) * inverse_zs;
                const auto c = contrast<kind.value>(probability, q, d, mixing);
                total += c.term;
                const vf own = factor != 0 ? factor * c.slope : none;
                slope -= own;
                // The slopes overwrite the logits of the first teacher.
                store(slopes + i, (j == 1 ? none : load(slopes + i)) - own);
            }
        });
        store(t.d, total);
    }
    store(row[g].slope, slope);
}

}  // namespace
