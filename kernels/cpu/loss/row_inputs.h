// Step 1 of a tile: labels, weights, priors and masks of its rows.
#pragma once

#include "loss/worker.h"

namespace {

// Which rows of group g count, which teachers teach them, and which logits must be read.
void Worker::read_row_inputs(int g) {
    const int64_t first = begin + g * W;
    const int rows = group_rows(g);
    Rows& row = this->row[g];
    Measured* const tensor = this->tensor + g * layout.tensors;
    const bool stats = p.student_margin;
    const vi none = {};
    const vf one = set(1), zero = {};
    // Loops over the lanes without a branch inside. With the constant bound W, the compiler vectorizes them.
    const auto each_row = [&](auto f) {
        if (rows == W)
            for (int lane = 0; lane < W; lane++) f(lane);
        else
            for (int lane = 0; lane < rows; lane++) f(lane);
    };
    clear(row.counts);
    for (int lane = rows; lane < W; lane++) row.label[lane] = -1;
    if (p.labels) {
        const int64_t *const labels = p.labels + first, ignored = p.ignore_index, unlabeled = p.unlabeled_index;
        each_row([&](int lane) {
            const int64_t label = labels[lane];
            row.label[lane] = (label == unlabeled) | (label == ignored) ? -1 : int32_t(label);
            row.counts[lane] = label == ignored ? 0 : 1;
        });
    } else {
        each_row([&](int lane) { row.label[lane] = -1, row.counts[lane] = 1; });
    }
    const vi label = load_bits<vi>(row.label);
    const vf counts = load(row.counts);
    vf weight = counts;
    if (p.sample_weight) weight *= rows == W ? load(p.sample_weight + first) : load_first(p.sample_weight + first, rows, 0);
    const vi alive = weight > 0;
    const vf cross = (label >= 0) & alive & (none - (p.ce_weight > 0)) ? one : zero;
    const vf reads_teachers = stats ? counts : alive & (none - (p.kd_weight > 0)) ? one : zero;
    vf reads_student = stats ? counts : cross;
    store(row.weight, weight);
    store(row.cross, cross);
    const vi margin_label = p.weighting == Weighting::top2_margin ? none - 1 : label;
    __builtin_memcpy(row.margin_label, &margin_label, sizeof margin_label);
    for (int64_t k = 0; k < p.teachers; k++) {
        Measured& t = tensor[1 + k];
        vf alpha = one;
        if (p.prior) {
            const float* const prior = p.prior + (p.prior_per_row ? k * p.rows + first : k);
            alpha = !p.prior_per_row ? set(*prior) : rows == W ? load(prior) : load_first(prior, rows, 0);
        }
        store(t.alpha, alpha * reads_teachers);
        if (p.mask) each_row([&, mask = p.mask + k * p.rows + first](int lane) { t.alpha[lane] = mask[lane] ? t.alpha[lane] : 0; });
        if (const int32_t* const place = p.teacher[k].place)
            each_row([&](int lane) { t.alpha[lane] = place[first + lane] >= 0 ? t.alpha[lane] : 0; });
        reads_student = load(t.alpha) > 0 ? one : reads_student;
    }
    store(row.student, reads_student);
    if (layout.by_columns) return;
    // `measure_row` skips some rows and tensors. Their sums are those of a single logit, e^0.
    for (int64_t j = 0; j < layout.tensors; j++) {
        store(tensor[j].z, one);
        clear(tensor[j].d, tensor[j].label, tensor[j].other, tensor[j].scale, tensor[j].distance);
    }
    store(row.z, one);
    clear(row.at_label, row.sum);
}

}  // namespace
