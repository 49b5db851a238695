// Tests of the C++ core against the same formulas in double precision. No framework, no Python:
//     cmake -S . -B build/core -DAMTSS_PYTHON=OFF -DAMTSS_TESTS=ON && cmake --build build/core && ctest --test-dir build/core
// with sanitizers: -DAMTSS_SANITIZE=address,undefined or -DAMTSS_SANITIZE=thread
// on aarch64:      -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
//                  -DCMAKE_CROSSCOMPILING_EMULATOR="qemu-aarch64;-L;/usr/aarch64-linux-gnu"
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "encoder_tests.h"
#include "formats.h"
#include "loss/core.h"
#include "loss_case.h"
#include "threads.h"

namespace {

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
    std::vector<Options> all(14);
    all[1].ce_weight = 0.5f;
    all[2].ce_weight = 0.5f, all[2].label_smoothing = 0.1f, all[2].temperature = 1, all[2].masks = true;
    all[3].weighting = Weighting::label_nll, all[3].weight_temperature = 0.3, all[3].masks = true;
    all[4].weighting = Weighting::top2_margin, all[4].weight_temperature = 0;
    all[5].weight_temperature = inf, all[5].kd_weight = 0, all[5].ce_weight = 1, all[5].label_smoothing = 0.2f;
    all[6].temperature = 3, all[6].ce_weight = 1, all[6].masks = true, all[6].stats = false;
    all[7].bf16_gradient = true, all[7].ce_weight = 0.1f;
    all[2].teacher_temperature = 1, all[6].teacher_temperature = 1.5;
    const Divergence others[] = {Divergence::reverse_kl, Divergence::jsd, Divergence::skew_forward_kl,
                                 Divergence::skew_reverse_kl, Divergence::tvd, Divergence::jsd};
    for (int i = 0; i < 6; i++) {
        Options& o = all[8 + i];
        o.divergence = others[i];
        o.masks = i % 2 == 0, o.ce_weight = i % 3 == 0 ? 0.5f : 0, o.stats = i != 2, o.bf16_gradient = i == 5;
        if (i >= 3) o.teacher_temperature = 3;
    }
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
                    compare("teacher_scale", got.teacher_scale, exact.teacher_scale, 3e-6, where);
                    compare("pull", got.pull, exact.pull, 3e-6, where);
                    compare("loss", {got.loss}, {exact.loss}, 3e-6, where);
                    CHECK(same_bits(got, c.run(kernel, 2)), "%s: other bits with two threads", where.c_str());
                    c.options.gradient = false;
                    CHECK(c.run(kernel, 3).row_loss == got.row_loss, "%s: other loss without gradient", where.c_str());
                }
}

// Masked classes. A teacher's p = 0 adds nothing; a student's -inf where a teacher has p > 0 makes the loss infinite.
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

// The maximum of a long row is in a late block, a little or far above the earlier ones. Equal rows have equal results.
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
        for (const Divergence divergence : {Divergence::forward_kl, Divergence::reverse_kl, Divergence::jsd,
                                            Divergence::skew_forward_kl, Divergence::skew_reverse_kl, Divergence::tvd}) {
            c.options.divergence = divergence;
            const Result got = c.run(kernel, 1);
            for (const double x : got.gradient) CHECK(x == 0, "gradient %g where the student equals its teacher", x);
            for (const double x : got.row_loss) CHECK(x == 0, "loss %g where the student equals its teacher", x);
        }
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
        p.student.temperature = teacher[0].temperature = teacher[1].temperature = 1;
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

// Several callers at once, each with several threads; then a child process, if the platform can start threads there.
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

// What a task throws, on any thread, arrives at the caller; afterwards everything runs as before.
void test_exceptions(const Kernel& kernel) {
    for (const int threads : {1, 4})
        for (int64_t bad = 0; bad < 100; bad += 9) {
            std::pair<int64_t, std::atomic<int>> context(bad, 0);
            bool thrown = false;
            try {
                parallel_for(
                    100, threads,
                    [](void* pointer, int64_t i) {
                        auto& [bad, done] = *static_cast<std::pair<int64_t, std::atomic<int>>*>(pointer);
                        if (i == bad) throw std::bad_alloc();
                        done++;
                    },
                    &context);
            } catch (const std::bad_alloc&) {
                thrown = true;
            }
            CHECK(thrown && context.second < 100, "the exception of task %d was lost", int(bad));
        }
    Case c(64, 1000, 3, {}, {Type::f32}, 1, 3);
    CHECK(same_bits(c.run(kernel, 1), c.run(kernel, 4)), "other bits after exceptions");
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
    test_exceptions(*kernel);
    test_threads(*kernel, argc < 3 || std::strcmp(argv[2], "nofork") != 0);
    std::printf("%s: %d failures\n", kernel->name, failures);
    return failures != 0;
}
