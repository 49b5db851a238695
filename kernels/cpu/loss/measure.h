// Step 2 of a tile: the largest logits, Z and D of each tensor and row.
#pragma once

#include <cmath>

#include "loss/worker.h"

namespace {

// Along the classes of one row, block by block, with a running maximum.
void Worker::measure_row(int lane) {
    const int64_t n = begin + lane;
    Rows& row = *this->row;
    if (row.student[lane] == 0) return;
    int32_t slots = 0;
    for (int64_t j = 0; j < layout.tensors; j++) {
        running[j] = {};
        slot[lane * layout.tensors + j] = j == 0 || (tensor[j].alpha[lane] != 0 && !is_list(j)) ? slots++ : 0;
    }
    const bool cross = row.cross[lane] != 0;
    const int64_t label = row.margin_label[lane];
    double cross_z = 0, cross_sum = 0;
    Running& s = running[0];
    for (int64_t j = 1; list && j < layout.tensors; j++) {
        list[j - 1].taken = is_list(j) && tensor[j].alpha[lane] != 0;
        if (list[j - 1].taken) read_list(j, n);
    }
    for (int64_t from = 0, b = 0, end; from < p.classes; from = end, b++) {
        end = block_end(from);
        const int64_t count = end - from;
        // Only the block of the label, or every block of a row without a label, needs its second largest logit.
        const bool two = label < end && (label >= from || label < 0);
        // The sums f(best, origin) of the block x. The origin stays the maximum of earlier blocks until a logit lies
        // far above it. So only the first block is read for its maximum before its exponentials are computed.
        const auto measure = [&](Running& t, const auto& x, auto f) {
            const auto add_up = [&] { return two ? f(BestTwo{}, t.origin) : f(Best{}, t.origin); };
            const Softness& own = soft[&t - running];
            if (t.top.first == -infinity) {
                t.top.first = largest(x, count);
                t.rebase(0, own.exponent, own.ratio);
                t.top.first = -infinity;
            }
            Sums sums = add_up();
            t.top = merge(t.top, sums.top);
            if (sums.top.first - t.origin > own.slack || std::fabs(sums.d) == infinity) {
                t.rebase(0, own.exponent, own.ratio);
                sums = add_up();
            }
            return sums;
        };
        const auto exponentials = [&](int64_t j, float origin) -> float* {
            if (!layout.keep) return fresh;
            kept_origins(lane, j)[b] = origin;
            return kept_row(lane, j) + from;
        };
        const float before = s.origin;
        const float block_z = with_block(p.student, n, from, count, teacher, [&](const auto& x) {
            return measure(s, x, [&](auto best, float origin) {
                return exp_block<decltype(best)>(x, student, exponentials(0, origin), count, origin, soft[0].exponent, ahead(0, n, end));
            });
        }).z;
        s.z += block_z;
        const double student_shift = double(before) - s.origin;
        for (int64_t j = 1; list && j < layout.tensors; j++) {
            if (!list[j - 1].taken) continue;
            list[j - 1].rebase(student_shift, soft[0].exponent);
            list[j - 1].rest += sum_rest(j, b, layout.keep ? kept_row(lane, 0) + from : fresh, count, block_z);
        }
        if (cross) {
            if (cross_z != 0) cross_z *= exp(float(student_shift), sharp);
            cross_sum += student_shift * from + sum_block(student, count);
            if (layout.separate_ce)
                cross_z += exp_block<Best>(Row<float>{student, 1, 0, 0}, student, exponentials(layout.tensors, s.origin), count, 0,
                                     sharp, ahead(0, n, end)).z;
        }
        for (int64_t j = 1; j < layout.tensors; j++) {
            if (tensor[j].alpha[lane] == 0 || is_list(j)) continue;
            Running& t = running[j];
            const Exponent exponent = soft[j].exponent;
            const float ratio = soft[j].ratio;
            if (student_shift != 0) t.rebase(student_shift, exponent, ratio);
            const Sums sums = with_block(matrix(j), n, from, count, teacher, [&](const auto& x) {
                return measure(t, x, [&](auto best, float origin) {
                    float* const e = exponentials(j, origin);
                    const Ahead next = ahead(j, n, end);
                    using Of = decltype(best);
                    // Other divergences follow from the logits once the normalisers are known.
                    if (p.compares()) return exp_block<Of, false>(x, nullptr, e, count, origin, exponent, next);
                    const Sums sums = divergence_block<false, Of>(x, student, e, count, origin, ratio, exponent, next);
                    if (sums.d == sums.d) return sums;
                    return divergence_block<true, Of>(x, student, e, count, origin, ratio, exponent, next);
                });
            });
            t.z += sums.z;
            t.d += sums.d;
            if (p.teacher_scale) t.spread.add(read(matrix(j), n, from, count, teacher), count, t.origin);
        }
    }
    // Rescale all sums to the maximum of the whole row.
    const double student_shift = s.rebase(0, soft[0].exponent);
    if (cross) {
        cross_z *= exp(float(student_shift), sharp);
        cross_sum += student_shift * p.classes;
    }
    for (int64_t j = 1; j < layout.tensors; j++) running[j].rebase(student_shift, soft[j].exponent, soft[j].ratio);
    if (layout.keep) {
        for (int64_t j = 0; j < layout.tensors; j++)
            if (j == 0 || slot_of(lane, j) != 0) last_origin(lane, j) = running[j].origin;
        if (layout.separate_ce) last_origin(lane, layout.tensors) = s.origin;
    }
    for (int64_t j = 0; j < layout.tensors; j++) {
        if (j > 0 && tensor[j].alpha[lane] == 0) continue;
        if (is_list(j)) {
            list[j - 1].rebase(student_shift, soft[0].exponent);
            measure_list(j, lane);
            continue;
        }
        const Running& t = running[j];
        tensor[j].z[lane] = t.top.first == -infinity ? nan : float(t.z);
        tensor[j].d[lane] = float(t.d / p.temperature);
        const float at_label = label < 0 ? t.top.first : read(matrix(j), n, label);
        tensor[j].label[lane] = at_label - t.top.first;
        if (j > 0 && p.teacher_scale) tensor[j].scale[lane] = float(deviation(t.spread.count, t.spread.sum, t.spread.squares));
        tensor[j].other[lane] = (at_label >= t.top.first ? t.top.second : t.top.first) - t.top.first;
    }
    if (cross) {
        row.z[lane] = layout.separate_ce ? float(cross_z) : tensor[0].z[lane];
        row.sum[lane] = float(cross_sum);
        row.at_label[lane] = read(p.student, n, row.label[lane]) - s.top.first;
    }
}

// `measure_row` leaves `label` and `other` as logits less their maximum; this makes exponentials of them, a group at a
// time.
void Worker::finish_rows() {
    for (int64_t j = 0; j < layout.tensors; j++) {
        Measured& t = tensor[j];
        const vf label = load(t.label);
        if (p.weighting == Weighting::label_nll) {
            store(t.label, label * soft[j].inverse);
        } else {
            store(t.label, exp(label, soft[j].exponent));
            store(t.other, exp(load(t.other), soft[j].exponent));
        }
    }
}

// Transposes the tile's logits of one tensor: columns[c, lane]. The values in lanes without a row are arbitrary.
void Worker::read_columns(const Matrix& m, float* columns) const {
    const int64_t classes = p.classes, lanes = layout.lanes;
    const float* x = (const float*)m.data + begin * m.row_stride;
    int64_t stride = m.row_stride;
    // Four classes are read at a time. With fewer classes, that reads into the next row, so there must be one.
    const bool in_place = m.type == Type::f32 && !m.place && m.column_stride == 1 && begin + lanes <= p.rows &&
                          (classes >= 4 || (begin + lanes < p.rows && stride >= classes));
    if (!in_place) {
        x = flat;
        if (m.type != Type::codes && m.column_stride == 1 && stride == classes && !m.place) {
            copy(m, begin, 0, rows * classes, flat);
        } else {
            stride = (classes + 3) / 4 * 4;
            for (int lane = 0; lane < rows; lane++)
                if (m.row(begin + lane) >= 0) copy(m, begin + lane, 0, classes, flat + lane * stride);
        }
    }
    for (int64_t c = 0; c < classes; c += 4) {
        if (c + 4 > classes && classes >= 4) c = classes - 4;
        float* const out = columns + c * lanes;
        for (int64_t lane = 0; lane < lanes; lane += W) {
            vf column[4];
            load_columns(x + lane * stride + c, stride, column);
            store(out + lane, column[0]);
            store(out + lanes + lane, column[1]);
            if (c + 2 < classes) store(out + 2 * lanes + lane, column[2]);
            if (c + 3 < classes) store(out + 3 * lanes + lane, column[3]);
        }
    }
}

// One class of W rows at a time. Overwrites the logits of tensor j with their exponentials.
void Worker::measure_columns(int64_t j, int g) {
    const int64_t lanes = layout.lanes, size = p.classes * lanes, end = size + g * W;
    float* const x = kept + j * size;
    // After the exponentials of all tensors: the student's logits less their maximum.
    float* const student_a = kept + layout.tensors * size;
    float* const sharp_e = student_a + size;
    float* const teacher_a = p.compares() && j > 0 ? sharp_e + j * size : nullptr;
    const Exponent soft = this->soft[j].exponent;
    const float ratio = this->soft[j].ratio, inverse_tau = this->soft[j].inverse;
    LaneSpread spread;
    Rows& row = this->row[g];
    Measured& t = tensor[g * layout.tensors + j];
    const vi used = load(j == 0 ? row.student : t.alpha) > 0;
    const vi label = load_bits<vi>(row.margin_label), cross_label = load_bits<vi>(row.label);
    const bool nll = p.weighting == Weighting::label_nll;
    const vf none = {}, one = set(1);
    vf maximum = set(-infinity);
    for (int64_t i = g * W; i < end; i += lanes) maximum = max(maximum, load(x + i));
    if (p.teacher_scale && j > 0) {
        const vf base = maximum == set(-infinity) ? none : maximum;
        for (int64_t i = g * W; i < end; i += lanes) spread.take(used ? load(x + i) - base : none);
        for (int lane = 0; lane < W; lane++)
            t.scale[lane] = float(deviation(spread.count[lane], spread.sum[lane], spread.squares[lane]));
    }
    vf z = none, d = none, sharp_z = none, total = none, at_cross_label = none;
    vf at_label = nll ? none : one;
    BestTwo best;
    vi c = {};
    for (int64_t i = g * W; i < end; i += lanes, c += 1) {
        const vf a = used ? load(x + i) - maximum : none, e = exp(a, soft);
        z += e;
        store(x + i, e);
        best.take(e);
        at_label = label == c ? (nll ? a : e) : at_label;
        if (j > 0) {
            if (teacher_a) store(teacher_a + i, a);
            const vf difference = fma(a, set(ratio), -load(student_a + i));
            d = fma(e, e != 0 ? difference : none, d);
            continue;
        }
        store(student_a + i, a);
        if (p.ce_weight == 0) continue;
        total += a;
        at_cross_label = cross_label == c ? a : at_cross_label;
        if (!layout.separate_ce) continue;
        const vf sharp_v = exp(a, sharp);
        sharp_z += sharp_v;
        store(sharp_e + i, sharp_v);
    }
    store(t.label, nll ? at_label * inverse_tau : at_label);
    store(t.other, at_label >= 1 ? best.second : one);
    store(t.z, z);
    store(t.d, d * float(1 / p.temperature));
    if (j > 0) return;
    store(row.z, layout.separate_ce ? sharp_z : z);
    store(row.sum, total);
    store(row.at_label, at_cross_label);
}

}  // namespace
