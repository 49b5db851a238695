// Step 3 of a tile: from the sums to margins and the weights of the teachers.
#pragma once

#include "loss/worker.h"

namespace {

// Margins, weights and normalisers of group g, and the factors of the teachers in the gradient.
void Worker::weigh(int g) {
    const vf none = {};
    const Rows& row = this->row[g];
    Measured* const tensor = this->tensor + g * layout.tensors;
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

    const vf taught_scale = load(row.weight) * p.gradient_scale * (p.kd_weight * float(p.temperature));
    const vf student_z = load(tensor[0].z), inverse_total = 1 / total;
    const vi distils = vi{} - (p.kd_weight > 0);
    for (int64_t j = 1; j < layout.tensors; j++) {
        Measured& t = tensor[j];
        const vi teaches = load(t.alpha) > 0;
        const vf z = load(t.z), inverse_z = 1 / z, w = teaches ? load(t.weight) * inverse_total : none;
        store(t.weight, w);
        store(t.inverse_z, inverse_z);
        store(t.shift, log(student_z / z));
        store(t.factor, (w != 0) & distils ? p.compares() || is_list(j) ? taught_scale * w : taught_scale * w * inverse_z : none);
    }
    store(tensor[0].margin, margin(tensor[0]));
    store(tensor[0].inverse_z, 1 / student_z);
    store(tensor[0].factor, (chosen != 0) & distils ? taught_scale : none);
}

}  // namespace
