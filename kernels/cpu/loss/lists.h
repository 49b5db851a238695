// Teachers that list the log-probabilities of some classes. All other classes are one more, the rest: a bucket has what
// is left of the teacher's mass, else it has none. Such a teacher takes no exponential of a class that it does not list:
// the student's are added up block by block, without the listed ones, so that a small rest is exact.
#pragma once

#include "loss/contrast.h"
#include "loss/gradient.h"
#include "loss/worker.h"

namespace {

// Sorts the list of teacher j by blocks, without its padding.
void Worker::read_list(int64_t j, int64_t n) {
    const Matrix& m = matrix(j);
    List& l = list[j - 1];
    const int64_t* const classes = m.classes + m.row(n) * m.listed;
    int32_t* const next = l.end + 1;
    for (int64_t b = 0; b <= layout.blocks; b++) l.end[b] = 0;
    with_row(m, n, [&](auto row) {
        for (int64_t i = 0; i < m.listed; i++)
            if (row[i] != -infinity) next[classes[i] / layout.span]++;
        for (int64_t b = 0; b < layout.blocks; b++) next[b] += l.end[b];
        l.count = l.end[layout.blocks];
        // Each place moves on to the end of its block.
        for (int64_t i = 0; i < m.listed; i++) {
            if (row[i] == -infinity) continue;
            const int32_t place = l.end[classes[i] / layout.span]++;
            l.classes[place] = int32_t(classes[i]);
            l.logprob[place] = row[i];
        }
    });
    l.rest = 0;
}

// The sum of the student's exponentials of block b whose classes teacher j does not list; `z`: of them all.
float Worker::sum_rest(int64_t j, int64_t b, float* e, int64_t count, float z) {
    const List& l = list[j - 1];
    const int32_t first = l.begin(b), last = l.end[b];
    if (first == last) return z;
    const int64_t from = b * layout.span;
    // The slopes are not known yet.
    for (int32_t i = first; i < last; i++) l.slope[i] = e[l.classes[i] - from], e[l.classes[i] - from] = 0;
    const float sum = sum_block(e, count);
    for (int32_t i = first; i < last; i++) e[l.classes[i] - from] = l.slope[i];
    return sum;
}

// What `measure_row` finds out about a teacher with logits.
void Worker::measure_list(int64_t j, int lane) {
    const List& l = list[j - 1];
    const int64_t label = row->margin_label[lane];
    float own = -infinity, first = -infinity, second = -infinity;
    double sum = 0, squares = 0, z = 0;
    for (int32_t i = 0; i < l.count; i++) {
        const float v = l.logprob[i];
        sum += v;
        if (l.classes[i] == label)
            own = v;
        else if (v > first)
            second = first, first = v;
        else if (v > second)
            second = v;
    }
    if (label < 0) own = first, first = second;
    const bool bucket = matrix(j).bucket;
    // The log-probabilities of a bucket have the right sum.
    const float origin = bucket ? 0 : own > first ? own : first;
    const double mean = sum / (l.count > 1 ? l.count : 1), inverse = 1 / matrix(j).temperature;
    for (int32_t i = 0; i < l.count; i++) {
        const double v = l.logprob[i];
        squares += (v - mean) * (v - mean);
        if (!bucket) z += __builtin_exp((v - origin) * inverse);
    }
    Measured& t = tensor[j];
    t.z[lane] = bucket ? 1 : float(z);
    t.label[lane] = own - origin;
    t.other[lane] = first - origin;
    t.scale[lane] = float(__builtin_sqrt(squares / (l.count > 1 ? l.count : 1)));
}

// The logits of block b of the student's row, with -inf where teacher j lists a class.
const float* Worker::rest_logits(int64_t j, int64_t n, int64_t b, int64_t count) {
    const List& l = list[j - 1];
    const int64_t from = b * layout.span;
    copy(p.student, n, from, count, fresh);
    for (int32_t i = l.begin(b); i < l.end[b]; i++) fresh[l.classes[i] - from] = -infinity;
    return fresh;
}

// The logarithm of the rest's sum where all of it is far below the student's maximum.
double Worker::measure_far_rest(int64_t j, int64_t n) {
    List& l = list[j - 1];
    float top = -infinity;
    for (int64_t from = 0, b = 0; from < p.classes; from += layout.span, b++) {
        const int64_t count = block_end(from) - from;
        top = std::max(top, largest(Row<float>{rest_logits(j, n, b, count), 1, 0, 0}, count));
    }
    l.rest = 0;
    l.far_origin = top;
    if (top == -infinity) return top;
    for (int64_t from = 0, b = 0; from < p.classes; from += layout.span, b++) {
        const int64_t count = block_end(from) - from;
        const float* const x = rest_logits(j, n, b, count);
        vf even = {}, odd = {};
        sweep_pairs(even, odd, count, [&](vf& total, int64_t i, auto part) {
            total += exp(load(x + i, part, -infinity) - top, soft[0].exponent);
        });
        l.rest += sum(even + odd);
    }
    return (double(top) - running[0].origin) / p.temperature + __builtin_log(l.rest);
}

// The divergence of teacher j over its classes and the rest, and the slopes of its gradient, in double: it is never
// negative by more than the rounding of a double.
void Worker::compare_list(int64_t j, int lane) {
    const int64_t n = begin + lane;
    const Matrix& m = matrix(j);
    Measured& t = tensor[j];
    List& l = list[j - 1];
    const double inverse_s = 1 / p.temperature, inverse_t = 1 / m.temperature, origin = running[0].origin;
    double listed = 0, mass = 0, top = -infinity;
    for (int32_t i = 0; i < l.count; i++) {
        // Until the slope is known, the student's logit is in its place.
        l.slope[i] = read(p.student, n, l.classes[i]);
        listed += __builtin_exp((l.slope[i] - origin) * inverse_s);
        top = l.logprob[i] > top ? l.logprob[i] : top;
    }
    if (m.bucket) top = 0;
    for (int32_t i = 0; i < l.count; i++) mass += __builtin_exp((l.logprob[i] - top) * inverse_t);
    const double log_mass = m.bucket ? 0 : top * inverse_t + __builtin_log(mass);

    const bool has_rest = l.count < p.classes, far = has_rest && l.rest < 0x1p-64 * (l.rest + listed);
    const double log_rest = far ? measure_far_rest(j, n) : __builtin_log(l.rest);
    const double log_z = __builtin_log(listed + (has_rest ? __builtin_exp(log_rest) : 0));
    const double rest_q = has_rest ? __builtin_exp(log_rest - log_z) : 0, left = 1 - mass;
    // Rounding may leave less than nothing.
    const double rest_p = has_rest && m.bucket ? left < 0 ? 0 : left : 0;

    const float factor = t.factor[lane];
    const Mixing mixing(p);
    double divergence = 0, distance = 0, slopes = 0, rest_slope = 0;
    with_divergence(p.divergence, [&](auto kind) {
        const auto take = [&](double probability, double q, double d) {
            const auto c = contrast<kind.value>(probability, q, d, mixing);
            divergence += c.term;
            slopes += c.slope;
            distance += __builtin_fabs(q - probability);
            return c.slope;
        };
        for (int32_t i = 0; i < l.count; i++) {
            const double log_p = l.logprob[i] * inverse_t - log_mass, log_q = (l.slope[i] - origin) * inverse_s - log_z;
            l.slope[i] = float(factor * take(__builtin_exp(log_p), __builtin_exp(log_q), log_p - log_q));
        }
        const bool nothing = rest_p == 0 && rest_q == 0;
        if (has_rest) rest_slope = take(rest_p, rest_q, nothing ? 0 : __builtin_log(rest_p) - (log_rest - log_z));
    });
    t.inverse_z[lane] = 1;
    t.shift[lane] = 0;
    t.d[lane] = float(divergence);
    t.distance[lane] = float(distance);
    // Of the forward KL, the slopes of a teacher add up to -1.
    if (factor != 0 && p.compares()) row->slope[lane] -= float(factor * slopes);
    l.per_rest = factor != 0 && !far && rest_q != 0 ? float(factor * rest_slope / rest_q * tensor[0].inverse_z[lane]) : 0;
    l.far_factor = factor != 0 && far && l.rest != 0 ? float(-factor * rest_slope / l.rest) : 0;
    if (factor == 0) l.taken = false;
}

// Whether the gradient of block b needs `combine_lists`.
bool Worker::lists_in(int64_t b) const {
    for (int64_t j = 1; j < layout.tensors; j++)
        if (const List& l = list[j - 1]; l.taken && (l.begin(b) != l.end[b] || l.far_factor != 0)) return true;
    return false;
}

// The gradient of a block is `own` times e, the student's exponentials, less `sums`. A listed class has another factor
// than `own`, which has the rests of all lists: its product goes into `sums`, in which nothing cancels, and e becomes 0.
void Worker::combine_lists(int64_t n, int64_t b, int64_t count, float base, float scale, float* e, float* sums) {
    const int64_t from = b * layout.span;
    int touched = 0;
    const auto each = [&](auto f) {
        for (int64_t j = 1; j < layout.tensors; j++)
            if (const List& l = list[j - 1]; l.taken) f(j, l);
    };
    each([&](int64_t, const List& l) {
        for (int32_t i = l.begin(b); i < l.end[b]; i++) {
            const int32_t c = l.classes[i] - int32_t(from);
            if (listed.mark[c]) continue;
            listed.mark[c] = 1;
            listed.classes[touched++] = c;
            listed.factor[c] = base;
        }
    });
    each([&](int64_t j, const List& l) {
        for (int32_t i = l.begin(b); i < l.end[b]; i++) {
            listed.mark[l.classes[i] - from] = 2;
            sums[l.classes[i] - from] -= l.slope[i];
        }
        for (int i = 0; i < touched; i++) {
            uint8_t& mark = listed.mark[listed.classes[i]];
            if (mark == 1) listed.factor[listed.classes[i]] += l.per_rest;
            mark = 1;
        }
        if (l.far_factor == 0) return;
        const Row<float> rest{rest_logits(j, n, b, count), 1, 0, 0};
        add_block(sums, count, false, recomputed(rest, l.far_origin, soft[0].exponent, ahead(0, n, from), l.far_factor));
    });
    for (int i = 0; i < touched; i++) {
        const int32_t c = listed.classes[i];
        sums[c] -= listed.factor[c] * (e[c] * scale);
        e[c] = 0;
        listed.mark[c] = 0;
    }
}

}  // namespace
