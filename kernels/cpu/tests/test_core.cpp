// Tests of the C++ core against the same formulas in double precision. No framework, no Python:
//     cmake -S . -B build/core -DAMTSS_PYTHON=OFF -DAMTSS_TESTS=ON && cmake --build build/core && ctest --test-dir build/core
// with sanitizers: -DAMTSS_SANITIZE=address,undefined or -DAMTSS_SANITIZE=thread
// on aarch64:      -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
//                  -DCMAKE_CROSSCOMPILING_EMULATOR="qemu-aarch64;-L;/usr/aarch64-linux-gnu"
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attention.h"
#include "core.h"
#include "int8.h"

using namespace amtss;

namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr float nan_f = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t ignored = -100, unlabeled = -1;

int failures = 0;

#define CHECK(condition, ...)                            \
    do {                                                 \
        if (!(condition)) {                              \
            std::printf("%s:%d: ", __FILE__, __LINE__);  \
            std::printf(__VA_ARGS__);                    \
            std::printf(" [%s]\n", #condition);          \
            if (++failures > 20) std::exit(1);           \
        }                                                \
    } while (false)

// ---- number formats, bit by bit

float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

double decode_f16(uint16_t h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const double sign = h >> 15 ? -1 : 1;
    if (exponent == 31) return fraction ? std::nan("") : sign * inf;
    return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

// The nearest value: exact rounding does not matter for inputs.
uint16_t encode_f16(float x) {
    if (std::isinf(x)) return x > 0 ? 0x7c00 : 0xfc00;
    if (std::isnan(x)) return 0x7e00;
    const double magnitude = std::fabs(double(x));
    int low = 0, high = 0x7bff;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        (decode_f16(uint16_t(middle)) <= magnitude ? low : high) = decode_f16(uint16_t(middle)) <= magnitude ? middle : middle - 1;
    }
    return uint16_t(low | (x < 0 ? 0x8000 : 0));
}

// ---- a problem with memory of its own

// Logits in a type, with strides and an offset, and the values that they stand for.
struct Logits {
    std::vector<uint8_t> memory;
    std::vector<float> row_max, step;
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
        matrix = {memory.data() + offset * size, row_stride, column_stride, type, row_max.data(), step.data()};
    }
};

struct Options {
    double temperature = 2, weight_temperature = 1;
    float kd_weight = 1, ce_weight = 0, label_smoothing = 0;
    Weighting weighting = Weighting::label_margin;
    bool masks = false, stats = true, gradient = true, bf16_gradient = false;
};

struct Result {
    std::vector<double> row_loss, gradient, weights, margins, kd, student_margin;
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
        for (int64_t k = 0; k < teachers; k++) teacher.push_back(logits[1 + k].matrix);
        // Poisoned, with a guard behind each.
        const auto output = [](int64_t n) { return std::vector<float>(n + 16, nan_f); };
        std::vector<float> row_loss = output(rows), gradient = output(rows * classes), student_margin = output(rows);
        std::vector<float> weights = output(teachers * rows), margins = weights, kd = weights;
        Problem p{};
        p.rows = rows;
        p.classes = classes;
        p.teachers = teachers;
        p.student = logits[0].matrix;
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
        r.margins = r.kd = r.weights;
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
        for (int64_t n = 0; n < N; n++) {
            const int64_t label = labels.empty() ? unlabeled : labels[n];
            if (label == ignored) continue;
            const double weight = sample_weight.empty() ? 1 : sample_weight[n];
            const std::vector<double> log_q = log_softmax(0, n, tau);
            r.student_margin[n] = margin(log_q, label);
            std::vector<double> mixture(C, 0);
            double total = 0, divergence = 0, best = -inf;
            std::vector<double> mass(K, 0);
            std::vector<std::vector<double>> log_p(K);
            for (int64_t k = 0; k < K; k++) {
                const double alpha = (mask.empty() || mask[k * N + n]) ? (prior.empty() ? 1 : prior[k * N + n]) : 0;
                if (alpha == 0) continue;
                log_p[k] = log_softmax(1 + k, n, tau);
                const double m = r.margins[k * N + n] = margin(log_p[k], label);
                if (beta == 0) {
                    if (total == 0 || m > best) {
                        std::fill(mass.begin(), mass.end(), 0);
                        best = m;
                        mass[k] = total = 1;
                    }
                } else {
                    total += mass[k] = alpha * std::exp(m / beta);
                }
            }
            for (int64_t k = 0; k < K; k++) {
                if (log_p[k].empty()) continue;
                const double w = r.weights[k * N + n] = mass[k] / total;
                double kl = 0;
                for (int64_t c = 0; c < C; c++) {
                    const double probability = std::exp(log_p[k][c]);
                    if (float(probability) != 0) kl += probability * (log_p[k][c] - log_q[c]);
                    if (w != 0) mixture[c] += w * probability;
                }
                r.kd[k * N + n] = kl;
                if (w != 0) divergence += w * kl;
            }
            double loss = options.kd_weight * tau * tau * divergence;
            std::vector<double> gradient(C, 0);
            if (total != 0 && options.kd_weight > 0)
                for (int64_t c = 0; c < C; c++)
                    gradient[c] = options.kd_weight * tau * (std::exp(log_q[c]) - mixture[c]);
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

void compare(const char* name, const std::vector<double>& got, const std::vector<double>& want, double tolerance,
             const std::string& where) {
    double largest = 1e-3, error = 0;
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
           same_bits(a.kd, b.kd) && same_bits(a.student_margin, b.student_margin);
}

// ---- tests

// Floats up to a little above 0, of every binade, against double precision.
void test_exp(const Kernel& kernel) {
    std::vector<float> x, y;
    double worst = 0;
    float worst_at = 0;
    const auto flush = [&] {
        y.assign(x.size(), nan_f);
        kernel.exp(x.data(), y.data(), int64_t(x.size()));
        for (size_t i = 0; i < x.size(); i++) {
            const double exact = std::exp(double(x[i]));
            // The unit in the last place of a float of this size, subnormal ones included.
            const double ulp = std::ldexp(1.0, std::max(std::ilogb(std::max(exact, 1e-45)), -126) - 23);
            const double error = std::fabs(y[i] - exact) / ulp;
            if (!(error <= worst)) worst = error, worst_at = x[i];
        }
        x.clear();
    };
    for (uint32_t bits = 0; bits < 0x7f800000; bits += 499) {
        x.push_back(-from_bits(bits));
        if (from_bits(bits) < 40) x.push_back(from_bits(bits));
        if (x.size() >= 4096) flush();
    }
    flush();
    CHECK(worst <= 2, "exp: %.3f ulp at %a", worst, worst_at);
    std::printf("exp: at most %.3f ulp, at %a\n", worst, worst_at);

    const float special[] = {-INFINITY, nan_f, 0.0f, -0.0f, -104.5f};
    float result[5];
    kernel.exp(special, result, 5);
    CHECK(result[0] == 0 && std::isnan(result[1]), "exp of special values");
    CHECK(result[2] == 1 && result[3] == 1 && result[4] == 0, "exp of bounds");
}

void test_formula(const Kernel& kernel) {
    std::vector<Options> all(8);
    all[1].ce_weight = 0.5f;
    all[2].ce_weight = 0.5f, all[2].label_smoothing = 0.1f, all[2].temperature = 1, all[2].masks = true;
    all[3].weighting = Weighting::label_nll, all[3].weight_temperature = 0.3, all[3].masks = true;
    all[4].weighting = Weighting::top2_margin, all[4].weight_temperature = 0;
    all[5].weight_temperature = inf, all[5].kd_weight = 0, all[5].ce_weight = 1, all[5].label_smoothing = 0.2f;
    all[6].temperature = 3, all[6].ce_weight = 1, all[6].masks = true, all[6].stats = false;
    all[7].bf16_gradient = true, all[7].ce_weight = 0.1f;
    const std::vector<std::vector<Type>> types = {
        {Type::f32}, {Type::bf16, Type::f16}, {Type::f16, Type::codes}, {Type::f32, Type::bf16, Type::codes}};
    unsigned seed = 0;
    for (const int64_t classes : {2, 3, 15, 16, 17, 48, 49, 96, 97, 128, 129, 1024, 1061, 5000, 40000})
        for (size_t o = 0; o < all.size(); o++)
            for (size_t t = 0; t < types.size(); t++)
                for (const int64_t teachers : {1, 3}) {
                    const int64_t rows = classes > 2000 ? 5 : 21, stride = 1 + (seed % 3 == 2);
                    Case c(rows, classes, teachers, all[o], types[t], stride, ++seed, 0, seed % 5 == 0 ? 1e3f : 0);
                    const std::string where = "C = " + std::to_string(classes) + ", K = " + std::to_string(teachers) +
                                              ", options " + std::to_string(o) + ", types " + std::to_string(t);
                    const Result exact = c.exact(), got = c.run(kernel, 1);
                    compare("row_loss", got.row_loss, exact.row_loss, 3e-6, where);
                    compare("gradient", got.gradient, exact.gradient, c.options.bf16_gradient ? 4e-3 : 3e-6, where);
                    compare("weights", got.weights, exact.weights, 3e-6, where);
                    compare("margins", got.margins, exact.margins, 3e-6, where);
                    compare("kd", got.kd, exact.kd, 3e-6, where);
                    compare("student_margin", got.student_margin, exact.student_margin, 3e-6, where);
                    compare("loss", {got.loss}, {exact.loss}, 3e-6, where);
                    CHECK(same_bits(got, c.run(kernel, 2)), "%s: other bits with two threads", where.c_str());
                    c.options.gradient = false;
                    CHECK(c.run(kernel, 3).row_loss == got.row_loss, "%s: other loss without gradient", where.c_str());
                }
}

// Masked classes: p = 0 adds nothing, a student's -inf where a teacher has mass is infinitely wrong.
void test_infinities(const Kernel& kernel) {
    for (const int64_t classes : {3, 30, 100, 3000})
        for (const float share : {0.05f, 0.4f})
            for (const float ce : {0.0f, 1.0f}) {
                Options options;
                options.ce_weight = ce;
                Case c(40, classes, 2, options, {Type::f32}, 1, unsigned(classes), share);
                // The first blocks of a row, and all of another.
                std::vector<float> row(classes, -INFINITY);
                float* const student = reinterpret_cast<float*>(c.logits[0].memory.data()) + 3;
                float* const teacher = reinterpret_cast<float*>(c.logits[1].memory.data()) + 3;
                const int64_t stride = c.logits[0].matrix.row_stride;
                for (int64_t i = 0; i < classes; i++) {
                    if (i < classes - 1) student[i] = teacher[i] = -INFINITY;
                    else student[i] = teacher[i] = 1;
                    teacher[stride + i] = -INFINITY;
                    student[5 * stride + i] = -INFINITY;
                    student[6 * stride + i] = i == 1 ? nan_f : 0;
                    teacher[8 * stride + i] = i == classes - 1 ? INFINITY : 0;
                }
                for (int j = 0; j < 2; j++)
                    for (int64_t n = 0; n < c.rows; n++)
                        for (int64_t i = 0; i < classes; i++)
                            c.logits[j].value[n * classes + i] = (j == 0 ? student : teacher)[n * stride + i];
                const Result exact = c.exact(), got = c.run(kernel, 2);
                const std::string where = "-inf, C = " + std::to_string(classes);
                for (const int64_t n : {1, 5, 6, 8}) {
                    CHECK(std::isnan(got.row_loss[n]), "%s: row %d is %g", where.c_str(), int(n), got.row_loss[n]);
                    CHECK(std::isnan(got.gradient[n * classes]), "%s: gradient of row %d", where.c_str(), int(n));
                }
                for (int64_t n = 0; n < c.rows; n++) {
                    if (n == 1 || n == 5 || n == 6 || n == 8) continue;
                    const auto slice = [&](const std::vector<double>& v, int64_t size) {
                        return std::vector<double>(v.begin() + n * size, v.begin() + (n + 1) * size);
                    };
                    compare("row_loss", slice(got.row_loss, 1), slice(exact.row_loss, 1), 3e-6, where);
                    compare("gradient", slice(got.gradient, classes), slice(exact.gradient, classes), 3e-6, where);
                }
            }
}

// The maximum of a long row comes late, a little or far above what was there before. Equal rows have equal results.
void test_late_maxima(const Kernel& kernel) {
    for (const int64_t classes : {40, 1061, 5000, 60000})
        for (const Weighting weighting : {Weighting::label_margin, Weighting::top2_margin}) {
            Options options;
            options.weighting = weighting;
            options.ce_weight = 0.5f;
            Case c(6, classes, 2, options, {Type::f32}, 1, unsigned(classes));
            const int64_t stride = c.logits[0].matrix.row_stride;
            for (int j = 0; j < 3; j++) {
                float* const x = reinterpret_cast<float*>(c.logits[j].memory.data()) + 3;
                for (int64_t n = 0; n < c.rows; n++)
                    for (int64_t i = 0; i < classes; i++) {
                        float& logit = x[n * stride + i];
                        if (n == 0) logit += 60.0f * float(i) / float(classes);
                        if (n == 1 && i == classes - 2 - j) logit += 5;
                        if (n == 2 && i == classes - 2) logit += 50;
                        if (n == 3 && j > 0 && i == classes / 2) logit += 200;
                        if (n > 3) logit = x[(n - 2) * stride + i];
                        c.logits[j].value[n * classes + i] = logit;
                    }
            }
            for (int64_t n = 4; n < c.rows; n++) c.labels[n] = c.labels[n - 2];
            const Result exact = c.exact(), got = c.run(kernel, 1);
            const std::string where = "late maximum, C = " + std::to_string(classes);
            compare("row_loss", got.row_loss, exact.row_loss, 3e-6, where);
            compare("gradient", got.gradient, exact.gradient, 3e-6, where);
            compare("margins", got.margins, exact.margins, 3e-6, where);
            for (int64_t n = 4; n < c.rows; n++)
                CHECK(got.row_loss[n] == got.row_loss[n - 2], "%s: equal rows differ", where.c_str());
        }
}

void test_equal_student_and_teacher(const Kernel& kernel) {
    for (const int64_t classes : {3, 77, 5000, 60000}) {
        Case c(9, classes, 1, {}, {Type::f32}, 1, 5);
        c.logits[1] = c.logits[0];
        c.logits[1].matrix = c.logits[0].matrix;
        const Result got = c.run(kernel, 1);
        for (const double x : got.gradient) CHECK(x == 0, "gradient %g where the student equals its teacher", x);
        for (const double x : got.row_loss) CHECK(x == 0, "loss %g where the student equals its teacher", x);
    }
}

void test_faults(const Kernel& kernel) {
    Options options;
    options.masks = true;
    Case good(20, 5, 2, options, {Type::f32}, 1, 1);
    const auto fault = [&](auto change) {
        Case c = good;
        change(c);
        std::vector<Matrix> teacher = {good.logits[1].matrix, good.logits[2].matrix};
        Problem p{};
        p.rows = c.rows, p.classes = c.classes, p.teachers = c.teachers;
        p.student = good.logits[0].matrix, p.teacher = teacher.data();
        p.labels = c.labels.data(), p.prior = c.prior.data(), p.prior_per_row = true;
        p.sample_weight = c.sample_weight.data();
        p.temperature = p.weight_temperature = p.kd_weight = 1;
        p.ignore_index = ignored, p.unlabeled_index = unlabeled;
        float loss = 7;
        const Outcome outcome = run(kernel, p, 1, &loss, 1);
        CHECK(outcome.fault == Fault::none || loss == 7, "computed in spite of a fault");
        return outcome;
    };
    const auto is = [](Outcome o, Fault fault, int64_t index) { return o.fault == fault && o.index == index; };
    CHECK(is(fault([](Case&) {}), Fault::none, 0), "no fault");
    CHECK(is(fault([](Case& c) { c.labels[3] = 5; }), Fault::label, 3), "label too large");
    CHECK(is(fault([](Case& c) { c.labels[19] = -2; }), Fault::label, 19), "label negative");
    CHECK(is(fault([](Case& c) { c.prior[39] = -1; }), Fault::prior, 39), "prior negative");
    CHECK(is(fault([](Case& c) { c.prior[0] = nan_f; }), Fault::prior, 0), "prior NaN");
    CHECK(is(fault([](Case& c) { c.sample_weight[7] = INFINITY; }), Fault::sample_weight, 7), "weight infinite");
}

// Several callers at once, each with several threads; then a child process, where the platform can start threads in one.
void test_threads(const Kernel& kernel, bool forks) {
    Case c(64, 1000, 3, {}, {Type::f32}, 1, 3);
    const Result alone = c.run(kernel, 1);
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; i++)
        callers.emplace_back([&c, &kernel, &alone, i] {
            for (int repeat = 0; repeat < 20; repeat++) {
                Case mine = c;
                for (int64_t j = 0; j <= mine.teachers; j++) mine.logits[j].matrix = c.logits[j].matrix;
                if (!same_bits(mine.run(kernel, 1 + i), alone)) {
                    std::printf("other bits beside other callers\n");
                    std::abort();
                }
            }
        });
    for (std::thread& caller : callers) caller.join();
    if (!forks) return;
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);
        _exit(same_bits(c.run(kernel, 4), alone) ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(status == 0, "after fork: status %d", status);
}

void test_many_teachers_and_no_rows(const Kernel& kernel) {
    for (const int64_t teachers : {64, 256})
        for (const int64_t classes : {3, 32, 500}) {
            Case c(18, classes, teachers, {}, {Type::f32}, 1, 9);
            const Result exact = c.exact(), got = c.run(kernel, 2);
            compare("gradient", got.gradient, exact.gradient, 3e-6, "many teachers");
            compare("row_loss", got.row_loss, exact.row_loss, 3e-6, "many teachers");
        }
    Case none(0, 5, 2, {}, {Type::f32}, 1, 1);
    CHECK(none.run(kernel, 2).loss == 0, "no rows");
    Case dropped(20, 50, 2, {}, {Type::f32}, 1, 1);
    std::fill(dropped.labels.begin(), dropped.labels.end(), ignored);
    const Result got = dropped.run(kernel, 2);
    CHECK(got.loss == 0, "all rows dropped");
    for (const double x : got.gradient) CHECK(x == 0, "all rows dropped: gradient %g", x);
}

// Arrays of exactly the size that is announced, so that a sanitizer sees what reaches beyond them.
void test_int8_linear(int64_t rows, int64_t inputs, int64_t outputs, bool gelu) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const int64_t quads = (inputs + 3) / 4, panels = (outputs + 31) / 32;
    std::vector<float> x(rows * inputs), scale(outputs), bias(outputs), y(rows * outputs, nan_f), again(rows * outputs);
    std::vector<int8_t> w(outputs * inputs), packed(panels * quads * 128);
    std::vector<int32_t> offset(outputs);
    for (float& v : x) v = normal(random);
    for (int64_t j = 0; j < outputs; j++) {
        scale[j] = 1e-3f * (1 + j % 3);
        bias[j] = normal(random);
        for (int64_t i = 0; i < inputs; i++) {
            const int8_t code = int8_t(int(random() % 255) - 127);
            w[j * inputs + i] = packed[((j / 32 * quads + i / 4) * 32 + j % 32) * 4 + i % 4] = code;
            offset[j] -= code;
        }
    }
    Int8Linear p{rows,       inputs,      outputs, x.data(), packed.data(), offset.data(), scale.data(), bias.data(), gelu,
                 again.data()};
    run(p, 1);
    p.y = y.data();
    run(p, 3);
    CHECK(y == again, "other bits with other threads");
    for (int64_t n = 0; n < rows; n++) {
        float least = 0, largest = 0;
        for (int64_t i = 0; i < inputs; i++) {
            least = std::min(least, x[n * inputs + i]);
            largest = std::max(largest, x[n * inputs + i]);
        }
        const float step = largest / 255 - least / 255, inverse = 1 / step, top = 255 + std::nearbyint(least * inverse);
        for (int64_t j = 0; j < outputs; j++) {
            int64_t sum = 0;
            for (int64_t i = 0; i < inputs; i++)
                sum += int64_t(std::min(top, std::nearbyint(x[n * inputs + i] * inverse))) * w[j * inputs + i];
            double exact = double(sum) * scale[j] * step + bias[j];
            if (gelu) exact *= 0.5 * std::erfc(-exact / std::sqrt(2.0));
            const double error = std::fabs(y[n * outputs + j] - exact);
            CHECK(error < 1e-6 * (1 + std::fabs(exact)), "int8 %d x %d x %d: y[%d, %d] = %g, not %g", int(rows),
                  int(inputs), int(outputs), int(n), int(j), y[n * outputs + j], exact);
        }
    }
}

void test_attention(int64_t batch, int64_t heads, int64_t queries, int64_t keys, int64_t width) {
    std::mt19937 random(8);
    std::normal_distribution<float> normal;
    const int64_t row = heads * width;
    std::vector<float> q(batch * queries * row), k(batch * keys * row), v(k.size()), out(q.size(), nan_f), again(q.size());
    std::vector<uint8_t> mask(batch * queries * keys);
    for (std::vector<float>* values : {&q, &k, &v})
        for (float& value : *values) value = normal(random);
    for (uint8_t& there : mask) there = random() % 3 > 0;
    std::fill(mask.begin(), mask.begin() + keys, 0);
    Attention p{batch, heads, queries, keys, width, q.data(), k.data(), v.data(),
                {queries * row, width, row}, {keys * row, width, row}, {keys * row, width, row}, mask.data(),
                {queries * keys, 0, keys}, 0.3f, again.data()};
    run(p, 1);
    p.out = out.data();
    run(p, 3);
    CHECK(out == again, "other bits with other threads");
    std::vector<double> e(keys);
    for (int64_t i = 0; i < batch * queries; i++)
        for (int64_t h = 0; h < heads; h++) {
            const int64_t n = i / queries;
            double sum = 0;
            for (int64_t j = 0; j < keys; j++) {
                double score = 0;
                for (int64_t d = 0; d < width; d++)
                    score += double(q[i * row + h * width + d]) * k[(n * keys + j) * row + h * width + d];
                sum += e[j] = mask[i * keys + j] ? std::exp(0.3f * score) : 0;
            }
            for (int64_t d = 0; d < width; d++) {
                double exact = 0;
                for (int64_t j = 0; j < keys && sum > 0; j++) exact += e[j] / sum * v[(n * keys + j) * row + h * width + d];
                const double error = std::fabs(out[i * row + h * width + d] - exact);
                CHECK(error < 1e-5, "attention %d x %d: %g, not %g", int(queries), int(keys),
                      out[i * row + h * width + d], exact);
            }
        }
}

void test_8_bit_teachers() {
    if (!int8_supported()) return;
    for (const bool gelu : {false, true}) {
        test_int8_linear(1, 1, 1, gelu);
        test_int8_linear(13, 67, 45, gelu);
        test_int8_linear(250, 384, 96, gelu);
        test_int8_linear(40, 3072, 40, gelu);
    }
    test_int8_linear(0, 8, 8, false);
    test_attention(1, 1, 1, 1, 32);
    test_attention(3, 2, 13, 41, 64);
    test_attention(2, 3, 40, 40, 96);
}

}  // namespace

int main(int argc, char** argv) {
    const Kernel* kernel = nullptr;
    for (const Kernel* const* k = supported_kernels(); *k; k++)
        if (argc > 1 && std::strcmp((*k)->name, argv[1]) == 0) kernel = *k;
    if (!kernel) {
        std::printf("not on this machine\n");
        return 77;
    }
    test_exp(*kernel);
    test_formula(*kernel);
    test_infinities(*kernel);
    test_late_maxima(*kernel);
    test_equal_student_and_teacher(*kernel);
    test_faults(*kernel);
    test_many_teachers_and_no_rows(*kernel);
    if (std::strcmp(kernel->name, "avx512") == 0) test_8_bit_teachers();
    test_threads(*kernel, argc < 3 || std::strcmp(argv[2], "nofork") != 0);
    std::printf("%s: %d failures\n", kernel->name, failures);
    return failures != 0;
}
