// Step 3 of a tile: from the sums to margins, teacher weights, losses and the factors of the gradient.
#pragma once

#include "loss/worker.h"

namespace {

// Margins, teacher weights, KL = D / (tau Z) + log(Z_student / Z_teacher), losses and factors of group g.
void Worker::weigh(int g) {
    const vf none = {};
    const int64_t first = begin + g * W;
    const int rows = group_rows(g);
    Rows& row = this->row[g];
    Measured* const tensor = this->tensor + g * layout.tensors;
    const vf counts = load(row.counts), weight = load(row.weight), cross = load(row.cross);
    const auto write = [&](float* out, vf v) { rows == W ? store(out, v, Whole{}) : store(out, v, Part{rows}); };
    const auto margin = [&](const Measured& t) -> vf {
        if (p.weighting == Weighting::label_nll) return load(t.label) - log(load(t.z));
        return (load(t.label) - load(t.other)) / load(t.z);
    };

    vf best = set(-infinity);
    vi chosen = {};  // 0: no teacher yet
    for (int64_t j = 1; j < layout.tensors; j++) {
        const vf m = margin(tensor[j]);
        store(tensor[j].margin, m);
        // Of equal margins, the first is chosen. A NaN stays chosen.
        const vi first = chosen == 0, larger = m > best, new_nan = (m != m) & (best == best);
        const vi better = (load(tensor[j].alpha) > 0) & (first | larger | new_nan);
        best = better ? m : best;
        chosen = better ? vi{} + int(j) : chosen;
    }

    const float beta = float(p.weight_temperature < 1e-30 ? 1e-30 : p.weight_temperature);
    vf total = none;
    for (int64_t j = 1; j < layout.tensors; j++) {
        const vf m = load(tensor[j].margin), alpha = load(tensor[j].alpha);
        vf mass = alpha;
        if (p.weight_temperature == 0)
            mass = chosen == int(j) ? set(1) : none;
        else if (beta != infinity)
            mass = alpha * exp(m == best ? none : (m - best) / beta, sharp);
        mass = alpha > 0 ? mass : none;
        total += mass;
        store(tensor[j].weight, mass);
    }

    const vf scale = weight * p.gradient_scale, taught_scale = scale * (p.kd_weight * float(p.temperature));
    const vf student_z = load(tensor[0].z), inverse_total = 1 / total;
    const vi distils = vi{} - (p.kd_weight > 0);
    vf divergence = none;
    for (int64_t j = 1; j < layout.tensors; j++) {
        Measured& t = tensor[j];
        const vi teaches = load(t.alpha) > 0;
        const vf z = load(t.z), inverse_z = 1 / z, w = teaches ? load(t.weight) * inverse_total : none;
        const vf kl = load(t.d) * inverse_z + log(student_z / z);
        divergence += w != 0 ? w * kl : none;
        store(t.factor, (w != 0) & distils ? taught_scale * w * inverse_z : none);
        if (p.student_margin) {
            const int64_t at = (j - 1) * p.rows + first;
            write(p.weights + at, w);
            write(p.margins + at, teaches ? load(t.margin) : none);
            write(p.kd + at, teaches ? kl : none);
        }
    }
    if (p.student_margin) write(p.student_margin + first, counts != 0 ? margin(tensor[0]) : none);

    vf row_loss = none;
    store(tensor[0].factor, none);
    if (p.kd_weight > 0) {
        row_loss = p.kd_weight * float(p.temperature * p.temperature) * divergence;
        store(tensor[0].factor, chosen != 0 ? taught_scale * (1 / student_z) : none);
    }
    if (p.ce_weight > 0) {
        const float smoothed = p.label_smoothing / float(p.classes);
        vf ce = log(load(row.z)) - (1 - p.label_smoothing) * load(row.at_label);
        if (smoothed > 0) ce -= smoothed * load(row.sum);
        row_loss += cross != 0 ? p.ce_weight * ce : none;
        const vf ce_scale = cross != 0 ? scale * p.ce_weight : none;
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
