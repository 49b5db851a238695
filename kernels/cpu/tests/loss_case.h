// A problem of the loss with memory of its own, and its results in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "formats.h"
#include "loss/core.h"

namespace {

using namespace amtss;

constexpr int64_t ignored = -100, unlabeled = -1;

// Logits in a type, with strides and an offset, and the values that they stand for.
struct Logits {
    std::vector<uint8_t> memory;
    std::vector<float> row_max, step;
    std::vector<int64_t> classes;  // [rows, listed], or none
    std::vector<double> value;  // [rows, classes]
    Matrix matrix;

    Logits(int64_t rows, int64_t classes, Type type, int64_t column_stride, const std::vector<float>& values) {
        const int64_t size = type == Type::f32 ? 4 : type == Type::codes ? 1 : 2, offset = 3;
        const int64_t row_stride = classes * column_stride + 5;
        memory.assign((offset + rows * row_stride) * size, 0xff);
        row_max.resize(rows);
        step.resize(rows);
        for (int64_t n = 0; n < rows; n++) {
            row_max[n] = *std::max_element(values.begin() + n * classes, values.begin() + (n + 1) * classes);
            step[n] = 0.07f;
            for (int64_t c = 0; c < classes; c++) {
                const float x = values[n * classes + c];
                uint8_t* const at = memory.data() + (offset + n * row_stride + c * column_stride) * size;
                if (type == Type::f32) {
                    std::memcpy(at, &x, 4);
                    value.push_back(x);
                } else if (type == Type::bf16) {
                    const uint16_t bits = uint16_t(to_bits(x) >> 16);
                    std::memcpy(at, &bits, 2);
                    value.push_back(from_bits(uint32_t(bits) << 16));
                } else if (type == Type::f16) {
                    const uint16_t bits = encode_f16(x);
                    std::memcpy(at, &bits, 2);
                    value.push_back(decode_f16(bits));
                } else {
                    const double code = std::floor((row_max[n] - x) / step[n]);
                    *at = x == -inf ? 255 : uint8_t(std::clamp(code, 0.0, 254.0));
                    value.push_back(*at == 255 ? -inf : row_max[n] - step[n] * float(*at));
                }
            }
        }
        matrix = {memory.data() + offset * size, row_stride, column_stride, type, row_max.data(), step.data(), 2, nullptr, nullptr, 0, false};
    }
};

struct Options {
    double temperature = 2, teacher_temperature = 2, weight_temperature = 1;
    Divergence divergence = Divergence::forward_kl;
    float divergence_beta = 0.3f;
    float kd_weight = 1, ce_weight = 0, label_smoothing = 0;
    Weighting weighting = Weighting::label_margin;
    bool masks = false, stats = true, gradient = true, bf16_gradient = false;
};

struct Result {
    std::vector<double> row_loss, gradient, weights, margins, kd, student_margin, teacher_scale, pull;
    double loss = 0;
};

struct Case {
    int64_t rows, classes, teachers;
    Options options;
    std::vector<Logits> logits;  // the student's, then the teachers'
    std::vector<int64_t> labels;
    std::vector<float> prior, sample_weight;
    std::vector<uint8_t> mask;

    Case(int64_t rows, int64_t classes, int64_t teachers, Options options, std::vector<Type> types, int64_t column_stride,
         unsigned seed, float infinite = 0, float shift = 0)
        : rows(rows), classes(classes), teachers(teachers), options(options) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal(0, 2);
        std::uniform_real_distribution<float> uniform(0, 1);
        std::vector<float> common(rows * classes);
        for (float& x : common) x = normal(random);
        logits.reserve(1 + teachers);
        for (int64_t j = 0; j <= teachers; j++) {
            std::vector<float> values(common);
            for (float& x : values) x = uniform(random) < infinite ? -INFINITY : x + normal(random) + shift;
            logits.emplace_back(rows, classes, types[j % types.size()], column_stride, values);
        }
        for (int64_t n = 0; n < rows; n++) {
            const float choice = uniform(random);
            labels.push_back(n % 7 == 2   ? ignored
                             : n % 5 == 3 ? unlabeled
                             : n % 4 == 0 ? 0
                             : n % 4 == 1 ? classes - 1
                                          : int64_t(choice * classes));
        }
        if (options.masks) {
            for (int64_t i = 0; i < teachers * rows; i++) {
                mask.push_back(uniform(random) < 0.6);
                prior.push_back(uniform(random) < 0.8 ? uniform(random) : 0);
            }
            for (int64_t n = 0; n < rows; n++) sample_weight.push_back(uniform(random) < 0.8 ? uniform(random) : 0);
        }
    }

    Result run(const Kernel& kernel, int threads) {
        std::vector<Matrix> teacher;
        for (int64_t k = 0; k < teachers; k++) {
            teacher.push_back(logits[1 + k].matrix);
            teacher.back().temperature = options.teacher_temperature;
        }
        // Poisoned, with a guard behind each.
        const auto output = [](int64_t n) { return std::vector<float>(n + 16, nan_f); };
        std::vector<float> row_loss = output(rows), gradient = output(rows * classes), student_margin = output(rows);
        std::vector<float> weights = output(teachers * rows), margins = weights, kd = weights;
        std::vector<float> teacher_scale = weights, pull = weights;
        Problem p{};
        p.rows = rows;
        p.classes = classes;
        p.teachers = teachers;
        p.student = logits[0].matrix;
        p.student.temperature = options.temperature;
        p.divergence = options.divergence;
        p.divergence_beta = options.divergence_beta;
        p.teacher = teacher.data();
        p.labels = labels.empty() ? nullptr : labels.data();
        p.prior = prior.empty() ? nullptr : prior.data();
        p.prior_per_row = true;
        p.mask = mask.empty() ? nullptr : mask.data();
        p.sample_weight = sample_weight.empty() ? nullptr : sample_weight.data();
        p.temperature = options.temperature;
        p.weight_temperature = options.weight_temperature;
        p.kd_weight = options.kd_weight;
        p.ce_weight = options.ce_weight;
        p.label_smoothing = options.label_smoothing;
        p.weighting = options.weighting;
        p.ignore_index = ignored;
        p.unlabeled_index = unlabeled;
        p.gradient = options.gradient ? gradient.data() : nullptr;
        p.gradient_type = options.bf16_gradient ? Type::bf16 : Type::f32;
        p.row_loss = row_loss.data();
        if (options.stats) {
            p.weights = weights.data();
            p.margins = margins.data();
            p.kd = kd.data();
            p.student_margin = student_margin.data();
            p.teacher_scale = teacher_scale.data();
            p.pull = pull.data();
        }
        float loss = nan_f;
        const Outcome outcome = amtss::run(kernel, p, 1, &loss, threads);
        CHECK(outcome.fault == Fault::none, "fault %d at %lld", int(outcome.fault), (long long)outcome.index);

        std::vector<float> widened = gradient;
        if (options.bf16_gradient) {
            const uint16_t* const narrow = reinterpret_cast<const uint16_t*>(gradient.data());
            for (int64_t i = 0; i < rows * classes; i++) widened[i] = from_bits(uint32_t(narrow[i]) << 16);
            CHECK(std::isnan(gradient[(rows * classes + 1) / 2]), "wrote behind the gradient");
        }
        const auto take = [](const std::vector<float>& from, int64_t n) {
            for (size_t i = n; i < from.size(); i++) CHECK(std::isnan(from[i]), "wrote behind an output");
            return std::vector<double>(from.begin(), from.begin() + n);
        };
        if (options.bf16_gradient) widened.resize(rows * classes);
        Result result;
        result.row_loss = take(row_loss, rows);
        if (options.gradient) result.gradient = take(widened, rows * classes);
        if (options.stats) {
            result.weights = take(weights, teachers * rows);
            result.margins = take(margins, teachers * rows);
            result.kd = take(kd, teachers * rows);
            result.student_margin = take(student_margin, rows);
            result.teacher_scale = take(teacher_scale, teachers * rows);
            result.pull = take(pull, teachers * rows);
        }
        result.loss = loss;
        return result;
    }

    Result exact() const {
        Result r;
        const int64_t N = rows, C = classes, K = teachers;
        r.row_loss.assign(N, 0);
        r.gradient.assign(N * C, 0);
        r.weights.assign(K * N, 0);
        r.margins = r.kd = r.teacher_scale = r.pull = r.weights;
        r.student_margin.assign(N, 0);
        const auto log_softmax = [&](int64_t j, int64_t n, double tau) {
            std::vector<double> x(logits[j].value.begin() + n * C, logits[j].value.begin() + (n + 1) * C);
            const double largest = *std::max_element(x.begin(), x.end());
            double z = 0;
            for (double& v : x) z += std::exp(v = (v - largest) / tau);
            for (double& v : x) v -= std::log(z);
            return x;
        };
        const auto margin = [&](const std::vector<double>& log_p, int64_t label) {
            if (label < 0 || options.weighting == Weighting::top2_margin)
                label = std::max_element(log_p.begin(), log_p.end()) - log_p.begin();
            if (options.weighting == Weighting::label_nll) return log_p[label];
            double other = -inf;
            for (int64_t c = 0; c < C; c++)
                if (c != label) other = std::max(other, log_p[c]);
            return std::exp(log_p[label]) - std::exp(other);
        };
        const double tau = options.temperature, beta = options.weight_temperature;
        const auto deviation = [&](const double* x) {
            double count = 0, mean = 0, squares = 0;
            for (int64_t c = 0; c < C; c++)
                if (x[c] != -inf) count++, mean += x[c];
            mean /= std::max(count, 1.0);
            for (int64_t c = 0; c < C; c++)
                if (x[c] != -inf) squares += (x[c] - mean) * (x[c] - mean);
            return std::sqrt(squares / std::max(count, 1.0));
        };
        // A class's term of D(p, q) and slope q dD/dq, from the definitions; probabilities that are 0 in float are 0.
        const auto contrast = [&](double log_p, double log_q) -> std::pair<double, double> {
            const double p = std::exp(log_p), q = std::exp(log_q), b = double(options.divergence_beta);
            const auto part = [](double x, double log_ratio) { return float(x) != 0 ? x * log_ratio : 0; };
            const auto mixed = [&](double share) { return std::log(share * p + (1 - share) * q); };
            const double m = options.divergence == Divergence::skew_reverse_kl ? mixed(1 - b) : mixed(b);
            const double p_term = part(p, log_p - m), q_term = part(q, log_q - m);
            switch (options.divergence) {
                case Divergence::forward_kl: return {part(p, log_p - log_q), -p};
                case Divergence::reverse_kl: return {part(q, log_q - log_p), part(q, log_q - log_p)};
                case Divergence::jsd: return {b * p_term + (1 - b) * q_term, (1 - b) * q_term};
                case Divergence::skew_forward_kl: return {p_term, float(q) != 0 ? -(1 - b) * p * std::exp(log_q - m) : 0};
                case Divergence::skew_reverse_kl: return {q_term, q_term - (float(q) != 0 ? b * q * std::exp(log_q - m) : 0)};
                case Divergence::tvd: return {0.5 * std::fabs(p - q), 0.5 * q * (p == q ? q - p : q > p ? 1 : q < p ? -1 : nan_f)};
            }
            return {};
        };
        for (int64_t n = 0; n < N; n++) {
            const int64_t label = labels.empty() ? unlabeled : labels[n];
            if (label == ignored) continue;
            const double weight = sample_weight.empty() ? 1 : sample_weight[n];
            const std::vector<double> log_q = log_softmax(0, n, tau);
            r.student_margin[n] = margin(log_q, label);
            std::vector<double> slopes(C, 0);
            double total = 0, divergence = 0, best = -inf;
            std::vector<double> mass(K, 0);
            std::vector<std::vector<double>> log_p(K);
            const auto alpha = [&](int64_t k) {
                return mask.empty() || mask[k * N + n] ? (prior.empty() ? 1.0 : double(prior[k * N + n])) : 0.0;
            };
            int64_t chosen = -1;
            for (int64_t k = 0; k < K; k++) {
                if (alpha(k) == 0) continue;
                log_p[k] = log_softmax(1 + k, n, options.teacher_temperature);
                r.teacher_scale[k * N + n] = deviation(&logits[1 + k].value[n * C]);
                const double m = r.margins[k * N + n] = margin(log_p[k], label);
                if (chosen < 0 || m > best) best = m, chosen = k;
            }
            for (int64_t k = 0; k < K; k++) {
                if (log_p[k].empty()) continue;
                const double m = r.margins[k * N + n];
                // Equal margins differ by 0, also where both are -inf.
                const double behind = m == best || beta == inf ? 0 : (m - best) / beta;
                total += mass[k] = beta == 0 ? k == chosen : alpha(k) * std::exp(behind);
            }
            for (int64_t k = 0; k < K; k++) {
                if (log_p[k].empty()) continue;
                const double w = r.weights[k * N + n] = mass[k] / total;
                double d = 0, apart = 0;
                for (int64_t c = 0; c < C; c++) {
                    const auto [term, slope] = contrast(log_p[k][c], log_q[c]);
                    d += term;
                    apart += std::fabs(std::exp(log_p[k][c]) - std::exp(log_q[c]));
                    if (w != 0) slopes[c] += w * slope;
                }
                r.kd[k * N + n] = d;
                if (w != 0) divergence += w * d, r.pull[k * N + n] = w * apart;
            }
            double loss = options.kd_weight > 0 ? options.kd_weight * tau * tau * divergence : 0;
            std::vector<double> gradient(C, 0);
            double all = 0;
            for (const double slope : slopes) all += slope;
            // Of the forward KL it is -1, also where a probability is lost in float.
            if (options.divergence == Divergence::forward_kl && std::isfinite(all)) all = -1;
            if (total != 0 && options.kd_weight > 0)
                for (int64_t c = 0; c < C; c++)
                    gradient[c] = options.kd_weight * tau * (slopes[c] - std::exp(log_q[c]) * all);
            if (label >= 0 && options.ce_weight > 0) {
                const std::vector<double> log_q1 = log_softmax(0, n, 1);
                const double e = options.label_smoothing;
                for (int64_t c = 0; c < C; c++) {
                    const double target = (c == label ? 1 - e : 0) + e / C;
                    if (target > 0) loss -= options.ce_weight * target * log_q1[c];
                    gradient[c] += options.ce_weight * (std::exp(log_q1[c]) - target);
                }
            }
            if (weight == 0) continue;
            r.row_loss[n] = weight * loss;
            for (int64_t c = 0; c < C; c++) r.gradient[n * C + c] = weight * gradient[c];
        }
        for (double loss : r.row_loss) r.loss += loss;
        return r;
    }
};

// The error is at most `tolerance` times the largest value, or times `least` where all values are smaller.
void compare(const char* name, const std::vector<double>& got, const std::vector<double>& want, double tolerance,
             const std::string& where, double least = 1e-3) {
    double largest = least, error = 0;
    for (size_t i = 0; i < got.size(); i++) {
        CHECK(std::isnan(got[i]) == std::isnan(want[i]), "%s %s[%zu] = %g, exact %g", where.c_str(), name, i, got[i], want[i]);
        CHECK(std::isinf(got[i]) == std::isinf(want[i]), "%s %s[%zu] = %g, exact %g", where.c_str(), name, i, got[i], want[i]);
        if (!std::isfinite(want[i]) || !std::isfinite(got[i])) continue;
        largest = std::max(largest, std::fabs(want[i]));
        error = std::max(error, std::fabs(got[i] - want[i]));
    }
    CHECK(error <= tolerance * largest, "%s %s: error %g of %g", where.c_str(), name, error, largest);
}

bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
    return a.size() == b.size() &&
           (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

bool same_bits(const Result& a, const Result& b) {
    return std::memcmp(&a.loss, &b.loss, sizeof a.loss) == 0 && same_bits(a.row_loss, b.row_loss) &&
           same_bits(a.gradient, b.gradient) && same_bits(a.weights, b.weights) && same_bits(a.margins, b.margins) &&
           same_bits(a.kd, b.kd) && same_bits(a.student_margin, b.student_margin) &&
           same_bits(a.teacher_scale, b.teacher_scale) && same_bits(a.pull, b.pull);
}

}  // namespace
