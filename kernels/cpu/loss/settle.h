// Step 6 of a tile: divergences, losses and the factors of the gradient.
#pragma once

#include "loss/worker.h"

namespace {

// Losses, stats and factors of group g; the forward KL is D / (tau Z) + log(Z_student / Z_teacher).
void Worker::settle(int g) {
    const vf none = {};
    const int64_t first = begin + g * W;
    const int rows = group_rows(g);
    Rows& row = this->row[g];
    Measured* const tensor = this->tensor + g * layout.tensors;
    const vf counts = load(row.counts), weight = load(row.weight), cross = load(row.cross);
    const auto write = [&](float* out, vf v) { rows == W ? store(out, v, Whole{}) : store(out, v, Part{rows}); };

    vf weighted = none;
    for (int64_t j = 1; j < layout.tensors; j++) {
        const Measured& t = tensor[j];
        const vi teaches = load(t.alpha) > 0;
        const vf w = load(t.weight);
        const vf divergence = p.compares() ? load(t.d) : load(t.d) * load(t.inverse_z) + load(t.shift);
        weighted += w != 0 ? w * divergence : none;
        if (!p.student_margin) continue;
        const int64_t at = (j - 1) * p.rows + first;
        write(p.weights + at, w);
        write(p.margins + at, teaches ? load(t.margin) : none);
        write(p.kd + at, teaches ? divergence : none);
        write(p.teacher_scale + at, teaches ? load(t.scale) : none);
        write(p.pull + at, w != 0 ? w * load(t.distance) : none);
    }
    if (p.student_margin) write(p.student_margin + first, counts != 0 ? load(tensor[0].margin) : none);

    vf row_loss = none;
    if (p.kd_weight > 0) {
        row_loss = p.kd_weight * float(p.temperature * p.temperature) * weighted;
        // The slopes of all classes together take the place of the weights' sum, 1.
        const vf taught = load(tensor[0].factor), total = p.compares() ? load(row.slope) : taught;
        store(tensor[0].factor, taught != 0 ? total * load(tensor[0].inverse_z) : none);
    }
    if (p.ce_weight > 0) {
        const float smoothed = p.label_smoothing / float(p.classes);
        vf ce = log(load(row.z)) - (1 - p.label_smoothing) * load(row.at_label);
        if (smoothed > 0) ce -= smoothed * load(row.sum);
        row_loss += cross != 0 ? p.ce_weight * ce : none;
        const vf ce_scale = cross != 0 ? weight * p.gradient_scale * p.ce_weight : none;
        const vf factor = cross != 0 ? ce_scale / load(row.z) : none;
        store(row.factor, layout.separate_ce ? factor : none);
        if (!layout.separate_ce) store(tensor[0].factor, load(tensor[0].factor) + factor);
        store(row.everywhere, ce_scale * smoothed);
        store(row.one_hot, ce_scale * (1 - p.label_smoothing));
    }
    row_loss = weight > 0 ? weight * row_loss : none;
    if (p.row_loss) write(p.row_loss + first, row_loss);
    loss += __builtin_convertvector(row_loss, vd);
}

}  // namespace
