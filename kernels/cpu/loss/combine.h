// Step 4 of a tile: the gradient.
#pragma once

#include "loss/gradient.h"
#include "loss/worker.h"

namespace {

// Along the classes of one row, block by block.
void Worker::combine_row(int lane) {
    const Rows& row = *this->row;
    const int64_t n = begin + lane, size = p.gradient_type == Type::f32 ? 4 : 2;
    char* const out = (char*)p.gradient + n * p.classes * size;
    if (!(row.weight[lane] > 0)) {
        __builtin_memset(out, 0, p.classes * size);
        return;
    }
    bool taught = false;
    for (int64_t j = 1; j < layout.tensors; j++) taught |= !is_list(j) && tensor[j].factor[lane] != 0;
    const float base = tensor[0].factor[lane];
    float own = base;
    bool lists = false;
    for (int64_t j = 1; list && j < layout.tensors; j++) {
        if (!list[j - 1].taken || tensor[j].factor[lane] == 0) continue;
        own += list[j - 1].per_rest;
        lists = true;
    }
    for (int64_t from = 0, b = 0, end; from < p.classes; from = end, b++) {
        end = block_end(from);
        const int64_t count = end - from;
        // The kept exponentials of slot j, rescaled to the origin of the whole row.
        const auto kept_term = [&](int64_t j, float factor, const Exponent& exponent) -> Term<Kept> {
            const float shift = kept_origins(lane, j)[b] - last_origin(lane, j);
            return {{kept_row(lane, j) + from}, shift == 0 ? factor : factor * exp(shift, exponent)};
        };
        // Calls f(term) with the exponentials of slot j, whose logits are matrix(source).
        const auto with_term = [&](int64_t j, int64_t source, float factor, const Exponent& exponent, auto f) {
            if (layout.keep) return f(kept_term(j, factor, exponent));
            with_block(matrix(source), n, from, count, teacher, [&](const auto& x) {
                f(recomputed(x, running[source].origin, exponent, ahead(source, n, end), factor));
            });
        };
        // Kept terms are added four at a time, which reads and writes their sum less often.
        Term<Kept> waiting[4];
        int terms = 0;
        bool empty = true;
        const auto with_waiting = [&](auto f) {
            switch (terms) {
                case 0: return f();
                case 1: return f(waiting[0]);
                case 2: return f(waiting[0], waiting[1]);
                case 3: return f(waiting[0], waiting[1], waiting[2]);
                default: return f(waiting[0], waiting[1], waiting[2], waiting[3]);
            }
        };
        const bool compares = p.compares() && taught;
        for (int64_t j = 1; j < layout.tensors && !p.compares(); j++) {
            const float factor = tensor[j].factor[lane];
            if (factor == 0 || is_list(j)) continue;
            if (!layout.keep) {
                with_term(j, j, factor, soft[j].exponent, [&](auto term) { add_block(gradient, count, empty, term); });
                empty = false;
                continue;
            }
            if (terms == 4) {
                with_waiting([&](auto... terms) { add_block(gradient, count, empty, terms...); });
                empty = false;
                terms = 0;
            }
            waiting[terms++] = kept_term(j, factor, soft[j].exponent);
        }
        float* const sum = !compares ? gradient : layout.keep ? kept_slopes(lane) + from : slopes + from;
        // Without cross entropy, the last sum is written directly to the output.
        char* const to = out + from * size;
        const bool cross = row.cross[lane] != 0;
        // The student's exponentials, where lists of teachers have changed them.
        float* listed_e = nullptr;
        if (lists && lists_in(b)) {
            if (empty && !compares) __builtin_memset(gradient, 0, count * sizeof(float));
            with_waiting([&](auto... terms) { add_block(sum, count, false, terms...); });
            terms = 0;
            empty = false;
            listed_e = layout.keep ? kept_row(lane, 0) + from : student;
            if (!layout.keep)
                with_block(p.student, n, from, count, teacher, [&](const auto& x) {
                    const float origin = running[0].origin;
                    sweep(count, [&](int64_t i, auto part) { store(student + i, exp(load(x, i, part) - origin, soft[0].exponent), part); });
                });
            combine_lists(n, b, count, base, layout.keep ? kept_term(0, 1, soft[0].exponent).factor : 1, listed_e, sum);
        }
        const auto finish = [&](auto out) {
            if (listed_e && !layout.keep)
                return finish_block(out, sum, count, false, Term<Kept>{{listed_e}, own});
            with_term(0, 0, own, soft[0].exponent, [&](auto own) {
                with_waiting([&](auto... terms) { finish_block(out, sum, count, empty && !compares, own, terms...); });
            });
        };
        if (own == 0 && !compares && !lists) {
            // The student's factor is 0 only if all teachers' factors are.
            __builtin_memset(gradient, 0, count * sizeof(float));
        } else if (cross) {
            finish(Stored{gradient});
        } else if (p.gradient_type == Type::bf16) {
            finish(Narrowed{(uint16_t*)fresh});
            copy_out(fresh, to, count * 2, p.stream);
            continue;
        } else {
            p.stream ? finish(Streamed{(float*)to}) : finish(Stored{(float*)to});
            continue;
        }
        if (layout.separate_ce && row.factor[lane] != 0)
            with_term(layout.tensors, 0, row.factor[lane], sharp, [&](auto term) { add_block(gradient, count, false, term); });
        if (cross) {
            const float everywhere = row.everywhere[lane];
            if (everywhere != 0)
                for (int64_t i = 0; i < count; i++) gradient[i] -= everywhere;
            const int64_t label = row.label[lane];
            if (label >= from && label < end) gradient[label - from] -= row.one_hot[lane];
        }
        write_block(gradient, to, p.gradient_type, count, p.stream, (uint16_t*)fresh);
    }
}

// One class of W rows at a time.
void Worker::combine_columns(int g) {
    const int64_t classes = p.classes, lanes = layout.lanes, size = classes * lanes;
    float* const student_a = kept + layout.tensors * size;
    float* const cross_e = student_a + size;
    const float* const slopes = cross_e + size;
    const Rows& row = this->row[g];
    const Measured* const tensor = this->tensor + g * layout.tensors;
    const vf alive = load(row.weight), none = {};
    // Exponentials with a factor of 0 may be NaN and must not count.
    const auto exponentials = [&](const float* e, vf factor) -> vf { return factor != 0 ? load(e) : none; };
    for (int64_t c = 0, i = g * W; c < classes; c++, i += lanes) {
        vf mixture = none;
        if (p.compares()) mixture = load(slopes + i);
        for (int64_t j = 1; j < layout.tensors && !p.compares(); j++) {
            const vf factor = load(tensor[j].factor);
            mixture = fma(factor, exponentials(kept + j * size + i, factor), mixture);
        }
        const vf factor = load(tensor[0].factor);
        vf v = factor * exponentials(kept + i, factor) - mixture;
        if (p.ce_weight > 0) {
            const vf sharp_factor = load(row.factor);
            if (layout.separate_ce) v = fma(sharp_factor, exponentials(cross_e + i, sharp_factor), v);
            v -= load(row.everywhere);
            v -= load_bits<vi>(row.label) == int(c) ? load(row.one_hot) : none;
        }
        // The gradient overwrites the student's logits, which are no longer needed.
        store(student_a + i, alive > 0 ? v : none);
    }
    // With fewer than four classes, a row is written past its end; the next row then overwrites that.
    float* const out = flat + g * W * classes;
    for (int64_t c = 0; c < classes; c += 4) {
        if (c + 4 > classes && classes >= 4) c = classes - 4;
        const float* const column = student_a + c * lanes + g * W;
        store_columns(out + c, classes, load(column), load(column + lanes), c + 2 < classes ? load(column + 2 * lanes) : none,
                      c + 3 < classes ? load(column + 3 * lanes) : none);
    }
}

}  // namespace
