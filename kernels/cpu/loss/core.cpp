#include "loss/core.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "memory.h"
#include "threads.h"

namespace amtss {
namespace {

// A call with fewer logits ends before a second thread would start to work.
constexpr int64_t logits_worth_a_thread = 1 << 15;
// The rows are divided into at most this many parts, whose losses are added in order. The parts do not depend on the
// threads.
constexpr int64_t max_parts = 512;

struct Scratch {
    std::unique_ptr<char, void (*)(void*)> memory{nullptr, std::free};
    int64_t size = 0;
};

// The scratch of this thread, at least `bytes`, a multiple of 64; throws std::bad_alloc.
char* thread_scratch(int64_t bytes) {
    thread_local Scratch scratch;
    if (scratch.size < bytes) {
        scratch.size = 0;
        scratch.memory.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
        if (!scratch.memory) throw std::bad_alloc();
        scratch.size = bytes;
    }
    return scratch.memory.get();
}

std::vector<const Kernel*> find_kernels() {
    std::vector<const Kernel*> found;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        found.push_back(&kernel_avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        found.push_back(&kernel_avx2);
#endif
    found.push_back(&kernel_baseline);
    found.push_back(nullptr);
    return found;
}

Outcome check(const Problem& p) {
    for (int64_t n = 0; p.labels && n < p.rows; n++) {
        const int64_t label = p.labels[n];
        if ((label < 0 || label >= p.classes) && label != p.ignore_index && label != p.unlabeled_index)
            return {Fault::label, n};
    }
    // Written so that NaN is wrong too.
    const auto wrong = [](float weight) { return !(weight >= 0 && weight < HUGE_VALF); };
    for (int64_t i = 0; p.prior && i < p.teachers * (p.prior_per_row ? p.rows : 1); i++)
        if (wrong(p.prior[i])) return {Fault::prior, i};
    for (int64_t n = 0; p.sample_weight && n < p.rows; n++)
        if (wrong(p.sample_weight[n])) return {Fault::sample_weight, n};
    return {Fault::none, 0};
}

int64_t rows_that_count(const Problem& p) {
    if (!p.labels) return p.rows;
    return p.rows - std::count(p.labels, p.labels + p.rows, p.ignore_index);
}

// Teachers with rows of their own may be many, and each row have few of them.
int64_t most_teachers(const Problem& p) {
    int64_t everywhere = 0, most = 0;
    std::vector<const int32_t*> places;
    for (int64_t k = 0; k < p.teachers; k++) {
        const Matrix& m = p.teacher[k];
        if (m.place && !m.classes) places.push_back(m.place);
        everywhere += !m.place && !m.classes;
    }
    for (int64_t n = 0; n < p.rows && most < int64_t(places.size()); n++) {
        const auto has = [n](const int32_t* place) { return place[n] >= 0; };
        most = std::max<int64_t>(most, std::count_if(places.begin(), places.end(), has));
    }
    return everywhere + most;
}

}  // namespace

const Kernel* const* supported_kernels() {
    static const std::vector<const Kernel*> kernels = find_kernels();
    return kernels.data();
}

const Kernel* chosen_kernel() {
    const char* name = std::getenv("AMTSS_CPU_ISA");
    const Kernel* const* kernel = supported_kernels();
    if (name && *name)
        while (*kernel && std::strcmp((*kernel)->name, name) != 0) kernel++;
    return *kernel;
}

Outcome run(const Kernel& kernel, Problem& p, double divisor, float* loss, int threads) {
    const Outcome outcome = check(p);
    if (outcome.fault != Fault::none) return outcome;
    if (std::isnan(divisor)) divisor = double(std::max<int64_t>(1, rows_that_count(p)));
    p.gradient_scale = float(1 / divisor);
    p.most_teachers = most_teachers(p);
    const int64_t gradient_bytes = p.gradient ? p.rows * p.classes * (p.gradient_type == Type::f32 ? 4 : 2) : 0;
    p.stream = gradient_bytes >= large_gradient;

    const int64_t tile = kernel.tile(p), tiles = (p.rows + tile - 1) / tile;
    const int64_t part = (tiles + max_parts - 1) / max_parts * tile;
    double sums[max_parts];
    struct Context {
        const Kernel& kernel;
        const Problem& p;
        int64_t part;
        double* sums;
        int64_t bytes;
    } context{kernel, p, part, sums, kernel.scratch(p)};
    const int64_t parts = part ? (p.rows + part - 1) / part : 0;
    if (p.rows * p.classes * (1 + p.teachers) < logits_worth_a_thread) threads = 1;
    // Where memory is short, this throws; the OpenMP library would end the process when it starts its threads.
    if (parts > 0) thread_scratch(context.bytes);
    parallel_for(
        parts, threads,
        [](void* pointer, int64_t i) {
            const Context& c = *static_cast<const Context*>(pointer);
            c.sums[i] = c.kernel.loss(c.p, i * c.part, std::min(c.p.rows, (i + 1) * c.part), thread_scratch(c.bytes));
        },
        &context);
    if (loss) {
        double sum = 0;
        for (int64_t i = 0; i < parts; i++) sum += sums[i];
        *loss = float(sum / divisor);
    }
    return outcome;
}

}  // namespace amtss
