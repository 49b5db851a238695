// A random call of the loss.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "guarded.h"
#include "loss_case.h"

namespace {

struct Counts {
    int64_t exact = 0, noise = 0, fault = 0;
};

class Draw {
    std::mt19937_64 random;

public:
    explicit Draw(uint64_t seed) : random(seed * 0x9e3779b97f4a7c15u + 1) {}
    uint64_t bits() { return random(); }
    int64_t in(int64_t low, int64_t high) { return low + int64_t(random() % uint64_t(high - low + 1)); }
    bool one_in(int64_t n) { return in(1, n) == 1; }
    template <class T>
    T of(std::initializer_list<T> values) {
        return values.begin()[in(0, int64_t(values.size()) - 1)];
    }
};

int64_t size_of(Type type) { return type == Type::f32 ? 4 : type == Type::codes ? 1 : 2; }

double decode(const Logits& logits, const uint8_t* at, int64_t n) {
    float wide;
    uint16_t narrow;
    switch (logits.matrix.type) {
        case Type::f32: std::memcpy(&wide, at, 4); return wide;
        case Type::bf16: std::memcpy(&narrow, at, 2); return from_bits(uint32_t(narrow) << 16);
        case Type::f16: std::memcpy(&narrow, at, 2); return decode_f16(narrow);
        default: return *at == 255 ? -inf : logits.row_max[n] - logits.step[n] * float(*at);
    }
}

// Gives the logits other strides, the least memory that these need, and the values that are then there. Some strides let
// elements share their place.
void spread(Logits& logits, int64_t rows, int64_t classes, Draw& draw) {
    Matrix& m = logits.matrix;
    const int64_t size = size_of(m.type);
    int64_t row_stride = classes, column_stride = 1;
    switch (draw.in(0, 9)) {
        case 0: row_stride += draw.in(1, 9); break;
        case 1: column_stride = draw.in(2, 3), row_stride = classes * column_stride + draw.in(0, 3); break;
        case 2: row_stride = 1, column_stride = rows + draw.in(0, 2); break;
        case 3: row_stride = 0; break;
        case 4: column_stride = 0, row_stride = 1; break;
        case 5: row_stride = draw.in(0, classes); break;
        default: break;
    }
    std::vector<uint8_t> memory(rows == 0 ? 0 : ((rows - 1) * row_stride + (classes - 1) * column_stride + 1) * size);
    const auto at = [&](int64_t n, int64_t c) { return memory.data() + (n * row_stride + c * column_stride) * size; };
    for (int64_t n = 0; n < rows; n++)
        for (int64_t c = 0; c < classes; c++)
            std::memcpy(at(n, c), static_cast<const uint8_t*>(m.data) + (n * m.row_stride + c * m.column_stride) * size, size);
    for (float& largest : logits.row_max)
        if (!std::isfinite(largest)) largest = 0;
    if (m.type == Type::codes && draw.one_in(8)) std::fill(logits.step.begin(), logits.step.end(), 0.0f);
    // No row is -inf throughout.
    for (int64_t n = 0; n < rows; n++) {
        bool masked = true;
        for (int64_t c = 0; c < classes; c++) masked = masked && decode(logits, at(n, c), n) == -inf;
        if (masked) std::memset(at(n, 0), 0, size);
    }
    logits.value.clear();
    for (int64_t n = 0; n < rows; n++)
        for (int64_t c = 0; c < classes; c++) logits.value.push_back(decode(logits, at(n, c), n));
    logits.memory = memory;
    m.row_stride = row_stride;
    m.column_stride = column_stride;
}

// Makes the logits lists of some classes, in any order and with padding. All other classes then have none of the mass.
void list(Logits& logits, int64_t rows, int64_t classes, Draw& draw) {
    Matrix& m = logits.matrix;
    const int64_t size = size_of(m.type), listed = draw.in(1, classes);
    std::vector<uint8_t> memory(size_t(rows * listed * size));
    const std::vector<double> given = std::move(logits.value);
    const uint8_t* const data = logits.memory.data();
    logits.value.assign(size_t(rows * classes), -inf);
    for (int64_t n = 0; n < rows; n++) {
        const int64_t first = draw.in(0, classes - 1), step = draw.one_in(2) ? 1 : classes - 1;
        bool empty = true;
        for (int64_t i = 0; i < listed; i++) {
            const int64_t c = (first + i * step) % classes;
            uint8_t* const at = memory.data() + (n * listed + i) * size;
            const bool padding = given[n * classes + c] == -inf || (draw.one_in(4) && !(empty && i + 1 == listed));
            const float none = -INFINITY;
            const uint16_t narrow = m.type == Type::bf16 ? 0xff80 : 0xfc00;
            if (padding && m.type == Type::f32) std::memcpy(at, &none, 4);
            else if (padding) std::memcpy(at, &narrow, 2);
            else std::memcpy(at, data + (n * m.row_stride + c * m.column_stride) * size, size);
            empty = empty && padding;
            logits.classes.push_back(padding ? draw.of<int64_t>({-1, INT64_MAX, c}) : c);
            if (empty && i + 1 == listed) std::memset(at, 0, size), logits.classes.back() = c;
            logits.value[n * classes + c] = decode(logits, at, n);
        }
    }
    logits.memory = memory;
    m.row_stride = m.listed = listed;
    m.column_stride = 1;
}

struct Size {
    int64_t rows, classes, teachers;

    // Mostly small; at times enough for several threads, for rows longer than what is kept of them, or for a gradient that
    // is written past the cache.
    Size(Draw& draw, int64_t number) : rows(draw.in(0, 18)), classes(draw.in(2, 40)), teachers(draw.in(1, 4)) {
#if defined(__SANITIZE_THREAD__)
        const int64_t parallel = 4;
#else
        const int64_t parallel = 250;
#endif
        if (number % 50000 == 7) rows = 700, classes = 1600, teachers = 1;
        else if (draw.one_in(parallel)) rows = draw.in(17, 40), classes = draw.in(400, 1500);
        else if (draw.one_in(parallel)) rows = draw.in(500, 900), classes = draw.in(2, 70);
        else if (draw.one_in(10)) classes = draw.in(41, 260);
        else if (draw.one_in(150)) classes = draw.of<int64_t>({1023, 1024, 1025, 2049, 5003});
        else if (draw.one_in(4000)) classes = draw.in(30000, 70000), rows = std::min<int64_t>(rows, 3);
        else if (draw.one_in(250)) teachers = draw.of<int64_t>({8, 9, 17, 64, 256}), classes = draw.in(2, 20);
    }
};

// A drawn call and its arrays.
struct Call {
    Case c;
    bool prior_per_row = true, mean = false;
    double divisor = 1;

    Call(Draw& draw, const Size& size)
        : c(0, 2, 1, {}, {Type::f32}, 1, 0) {
        const int64_t rows = size.rows, classes = size.classes, teachers = size.teachers;
        Options o;
        o.temperature = draw.of({0.5, 1.0, 1.5, 2.0, 4.0, 8.0});
        o.teacher_temperature = draw.one_in(2) ? o.temperature : draw.of({0.5, 1.0, 3.0});
        o.divergence = draw.one_in(2) ? Divergence::forward_kl : Divergence(draw.in(1, 5));
        o.divergence_beta = draw.of({0.1f, 0.5f, 0.75f});
        o.weight_temperature = draw.of({0.0, 0.1, 0.5, 1.0, inf});
        o.kd_weight = draw.of({0.0f, 0.5f, 1.0f, 1.0f});
        o.ce_weight = o.kd_weight == 0 ? 1.0f : draw.of({0.0f, 0.3f, 1.0f});
        o.label_smoothing = draw.of({0.0f, 0.1f, 0.5f});
        o.weighting = draw.of({Weighting::label_margin, Weighting::top2_margin, Weighting::label_nll});
        o.masks = draw.one_in(2), o.stats = draw.one_in(2), o.gradient = !draw.one_in(4), o.bf16_gradient = draw.one_in(3);
        std::vector<Type> types;
        for (int64_t j = 0; j <= teachers; j++)
            types.push_back(j > 0 ? draw.of({Type::f32, Type::bf16, Type::f16, Type::codes})
                                  : draw.of({Type::f32, Type::bf16, Type::f16}));
        const float infinite = draw.of({0.0f, 0.0f, 0.0f, 0.2f}), shift = draw.of({0.0f, 0.0f, 1e3f, -1e3f});
        c = Case(rows, classes, teachers, o, types, 1, unsigned(draw.bits()), infinite, shift);
        for (Logits& logits : c.logits) spread(logits, rows, classes, draw);
        // The reverse KL of such a teacher is infinite.
        const bool lists = draw.one_in(6) && o.divergence != Divergence::reverse_kl;
        for (int64_t j = 1; lists && j <= teachers; j++)
            if (c.logits[j].matrix.type != Type::codes && draw.one_in(2)) list(c.logits[j], rows, classes, draw);
        if (draw.one_in(8)) c.labels.clear();
        if (draw.one_in(3)) c.mask.clear();
        if (draw.one_in(3)) c.sample_weight.clear();
        prior_per_row = draw.one_in(2);
        for (int64_t i = 0; !prior_per_row && i < int64_t(c.prior.size()); i++) c.prior[i] = c.prior[i / rows * rows];
        mean = draw.one_in(2);
        const auto counted = rows - std::count(c.labels.begin(), c.labels.end(), ignored);
        divisor = !mean ? 1.0 : double(std::max<int64_t>(1, counted));
    }

    // Where each array lies: at the beginning or at the end of its memory.
    Problem problem(Arrays& arrays, std::vector<Matrix>& teachers, uint64_t ends) const {
        const auto end = [&] {
            ends = ends >> 1 | ends << 63;
            return bool(ends & 1);
        };
        const auto place = [&](const Logits& logits) {
            Matrix m = logits.matrix;
            m.data = arrays.input(logits.memory, end());
            const bool scaled = m.type == Type::codes;
            m.row_max = scaled ? arrays.input(logits.row_max, end()) : nullptr;
            m.classes = logits.classes.empty() ? nullptr : arrays.input(logits.classes, end());
            m.step = scaled ? arrays.input(logits.step, end()) : nullptr;
            m.temperature = &logits == &c.logits[0] ? c.options.temperature : c.options.teacher_temperature;
            return m;
        };
        Problem p{};
        p.rows = c.rows, p.classes = c.classes, p.teachers = c.teachers;
        p.student = place(c.logits[0]);
        for (int64_t k = 0; k < c.teachers; k++) teachers.push_back(place(c.logits[1 + k]));
        p.teacher = teachers.data();
        p.labels = c.labels.empty() ? nullptr : arrays.input(c.labels, end());
        std::vector<float> prior = c.prior;
        for (int64_t k = 0; !prior.empty() && !prior_per_row && k < c.teachers; k++) prior[k] = c.prior[k * c.rows];
        if (!prior.empty() && !prior_per_row) prior.resize(c.teachers);
        p.prior = prior.empty() ? nullptr : arrays.input(prior, end());
        p.prior_per_row = prior_per_row;
        p.mask = c.mask.empty() ? nullptr : arrays.input(c.mask, end());
        p.sample_weight = c.sample_weight.empty() ? nullptr : arrays.input(c.sample_weight, end());
        const Options& o = c.options;
        p.temperature = o.temperature, p.weight_temperature = o.weight_temperature, p.weighting = o.weighting;
        p.kd_weight = o.kd_weight, p.ce_weight = o.ce_weight, p.label_smoothing = o.label_smoothing;
        p.divergence = o.divergence, p.divergence_beta = o.divergence_beta;
        p.ignore_index = ignored, p.unlabeled_index = unlabeled;
        p.gradient_type = o.bf16_gradient ? Type::bf16 : Type::f32;
        const size_t logits = size_t(c.rows * c.classes), stats = size_t(c.teachers * c.rows);
        if (o.gradient && o.bf16_gradient) p.gradient = arrays.output<uint16_t>(logits, end());
        if (o.gradient && !o.bf16_gradient) p.gradient = arrays.output<float>(logits, end());
        p.row_loss = arrays.output<float>(size_t(c.rows), end());
        if (o.stats) {
            p.weights = arrays.output<float>(stats, end());
            p.margins = arrays.output<float>(stats, end());
            p.kd = arrays.output<float>(stats, end());
            p.student_margin = arrays.output<float>(size_t(c.rows), end());
            p.teacher_scale = arrays.output<float>(stats, end());
            p.pull = arrays.output<float>(stats, end());
        }
        return p;
    }

    // Runs the call, in memory of its own, and returns what was written.
    Result run(const Kernel& kernel, Arrays& arrays, int threads, uint64_t ends, const char* where, Outcome& outcome) const {
        arrays.clear();
        std::vector<Matrix> teachers;
        Problem p = problem(arrays, teachers, ends);
        float* const loss = arrays.output<float>(1, ends & 1);
        outcome = amtss::run(kernel, p, mean ? std::nan("") : 1.0, loss, threads);
        arrays.check(where);
        const auto take = [](const float* from, int64_t n) {
            return from ? std::vector<double>(from, from + n) : std::vector<double>();
        };
        Result r;
        r.loss = *loss;
        r.row_loss = take(p.row_loss, c.rows);
        if (p.gradient_type == Type::f32) {
            r.gradient = take(static_cast<const float*>(p.gradient), c.rows * c.classes);
        } else if (p.gradient) {
            const uint16_t* const narrow = static_cast<const uint16_t*>(p.gradient);
            for (int64_t i = 0; i < c.rows * c.classes; i++) r.gradient.push_back(from_bits(uint32_t(narrow[i]) << 16));
        }
        r.weights = take(p.weights, c.teachers * c.rows);
        r.margins = take(p.margins, c.teachers * c.rows);
        r.kd = take(p.kd, c.teachers * c.rows);
        r.student_margin = take(p.student_margin, c.rows);
        r.teacher_scale = take(p.teacher_scale, c.teachers * c.rows);
        r.pull = take(p.pull, c.teachers * c.rows);
        return r;
    }

    // Two margins are so close to each other, or to one, that float may choose another teacher than double.
    bool tied(const Result& exact, int64_t n) const {
        double best = -inf, second = -inf;
        for (int64_t k = 0; k < c.teachers; k++) {
            const int64_t i = k * c.rows + n;
            if ((!c.mask.empty() && !c.mask[i]) || (!c.prior.empty() && c.prior[i] == 0)) continue;
            second = std::max(second, std::min(best, exact.margins[i]));
            best = std::max(best, exact.margins[i]);
        }
        return best - second < 1e-5 * (1 + std::fabs(best));
    }

    // A weight that is 0 in float alone: with an infinite divergence, its product is 0 there and infinite here.
    bool vanishes(const Result& exact, int64_t n) const {
        for (int64_t k = 0; k < c.teachers; k++) {
            const double w = exact.weights[k * c.rows + n];
            if (w > 0 && w < 1e-37) return true;
        }
        return false;
    }

    void compare_with(Result exact, Result got, const std::string& where) const {
        const Options& o = c.options;
        double steepest = 1, divergence = 1;
        for (const double m : exact.margins)
            if (std::isfinite(m)) steepest = std::max(steepest, std::fabs(m));
        for (const double kl : exact.kd)
            if (std::isfinite(kl)) divergence = std::max(divergence, kl);
        // An error of a margin is one of the weights, enlarged by 1 / beta.
        const double sharp = o.weight_temperature > 0 && std::isfinite(o.weight_temperature)
                                 ? std::max(1.0, steepest / o.weight_temperature / 16) : 1;
        for (double& g : exact.gradient) g /= divisor;
        exact.loss /= divisor;
        for (int64_t n = 0; n < c.rows; n++) {
            if (!(o.weight_temperature == 0 ? tied(exact, n) : vanishes(exact, n))) continue;
            exact.loss = got.loss;
            const auto same = [&](std::vector<double>& want, const std::vector<double>& have, int64_t from, int64_t size) {
                if (!have.empty()) std::copy_n(have.begin() + from, size, want.begin() + from);
            };
            same(exact.row_loss, got.row_loss, n, 1);
            same(exact.gradient, got.gradient, n * c.classes, c.classes);
            for (int64_t k = 0; k < c.teachers; k++) {
                same(exact.weights, got.weights, k * c.rows + n, 1);
                same(exact.pull, got.pull, k * c.rows + n, 1);
            }
        }
        // With few classes, a lane adds them up one after the other: where many are equal, so are the rounding errors.
        // The log-ratio, from which other divergences are computed, has the rounding errors of two logits.
        const double tau = o.temperature, rounding = o.divergence == Divergence::forward_kl ? 3e-6 : 1e-5;
        const double tolerance = rounding + (c.classes <= 128 ? 6e-8 * double(c.classes) : 0);
        const double row = o.kd_weight * tau * tau * divergence + o.ce_weight;
        const double slope = (o.kd_weight * tau + o.ce_weight) / divisor;
        compare("row_loss", got.row_loss, exact.row_loss, tolerance * sharp, where, row);
        compare("loss", {got.loss}, {exact.loss}, tolerance * sharp, where, row * double(c.rows) / divisor);
        if (o.gradient) compare("gradient", got.gradient, exact.gradient, tolerance * sharp + (o.bf16_gradient ? 4e-3 : 0), where, slope);
        if (!o.stats) return;
        compare("weights", got.weights, exact.weights, tolerance * sharp, where, 1);
        compare("margins", got.margins, exact.margins, tolerance, where, 1);
        compare("kd", got.kd, exact.kd, tolerance, where, 1);
        compare("teacher_scale", got.teacher_scale, exact.teacher_scale, tolerance, where, 1);
        compare("pull", got.pull, exact.pull, tolerance * sharp, where, 1);
        compare("student_margin", got.student_margin, exact.student_margin, tolerance, where, 1);
    }

    // A value that is not allowed, and the fault that it is.
    Outcome spoil(Draw& draw) {
        const int64_t kind = draw.in(0, 2);
        if (kind == 0 && !c.labels.empty()) {
            const int64_t n = draw.in(0, c.rows - 1);
            c.labels[n] = draw.of<int64_t>({-2, c.classes, INT64_MAX, INT64_MIN});
            return {Fault::label, n};
        }
        std::vector<float>& weight = kind == 1 ? c.sample_weight : c.prior;
        if (weight.empty()) return {Fault::none, 0};
        const int64_t size = int64_t(weight.size()), i = draw.in(0, size - 1);
        weight[i] = draw.of({-1.0f, -INFINITY, INFINITY, nan_f});
        if (kind == 1) return {Fault::sample_weight, i};
        if (prior_per_row) return {Fault::prior, i};
        weight[i / c.rows * c.rows] = weight[i];
        return {Fault::prior, i / c.rows};
    }
};

void fuzz_loss(int64_t number, Arrays& arrays, Counts& counts) {
    Draw draw{uint64_t(number)};
    Call call(draw, Size(draw, number));
    Case& c = call.c;
    const bool noise = draw.one_in(16);
    const Outcome wanted = draw.one_in(16) && c.rows > 0 ? call.spoil(draw) : Outcome{Fault::none, 0};
    if (noise) {
        for (Logits& logits : c.logits) {
            for (uint8_t& byte : logits.memory) byte = uint8_t(draw.bits());
            // What was padding may be a number now; that classes are in range is checked before the kernel.
            for (int64_t& x : logits.classes) x = x < 0 || x >= c.classes ? 0 : x;
            for (float& x : logits.row_max) x = from_bits(uint32_t(draw.bits()));
            for (float& x : logits.step) x = from_bits(uint32_t(draw.bits()));
        }
        c.options.temperature = draw.of({1e-30, 1e-3, 2.0, 1e30});
        c.options.teacher_temperature = draw.of({1e-30, 1e-3, 2.0, 1e30});
    }
    const std::string where = "case " + std::to_string(number) + " (N = " + std::to_string(c.rows) + ", C = " +
                              std::to_string(c.classes) + ", K = " + std::to_string(c.teachers) + ")";
    const bool exactly = !noise && wanted.fault == Fault::none;
    counts.exact += exactly;
    counts.noise += noise && wanted.fault == Fault::none;
    counts.fault += wanted.fault != Fault::none;
    const Result exact = exactly ? c.exact() : Result();
    for (const Kernel* const* k = supported_kernels(); *k; k++) {
        const std::string here = where + " on " + (*k)->name;
        const uint64_t ends = draw.bits();
        Outcome outcome;
        const Result got = call.run(**k, arrays, 1, ends, here.c_str(), outcome);
        CHECK(outcome.fault == wanted.fault && (outcome.fault == Fault::none || outcome.index == wanted.index),
              "%s: fault %d at %lld", here.c_str(), int(outcome.fault), (long long)outcome.index);
        if (wanted.fault != Fault::none) {
            bool untouched = std::isnan(got.loss);
            for (const std::vector<double>* out : {&got.row_loss, &got.gradient, &got.weights, &got.kd})
                untouched = untouched && std::all_of(out->begin(), out->end(), [](double x) { return std::isnan(x); });
            CHECK(untouched, "%s: computed in spite of a fault", here.c_str());
            continue;
        }
        const Result again = call.run(**k, arrays, int(draw.in(2, 4)), ~ends, here.c_str(), outcome);
        CHECK(same_bits(got, again), "%s: other bits with other threads or at another place", here.c_str());
        if (exactly) call.compare_with(exact, got, here);
    }
}

}  // namespace
