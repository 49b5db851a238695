// Random calls of the loss on every instruction set of the machine, against the formulas in double precision. Every array
// lies against a page that nobody may touch.
//     test_fuzz [cases] [first case]
// or the environment variable AMTSS_FUZZ_CASES. A case is drawn from its number alone: `test_fuzz 1 NUMBER` repeats one.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "encoder_fuzz.h"
#include "guarded.h"
#include "loss/core.h"
#include "loss_case.h"
#include "loss_fuzz.h"

int main(int argc, char** argv) {
    const char* const wanted = std::getenv("AMTSS_FUZZ_CASES");
    const int64_t cases = argc > 1 ? std::atoll(argv[1]) : wanted ? std::atoll(wanted) : 4000;
    const int64_t first = argc > 2 ? std::atoll(argv[2]) : 0;
    const auto begin = std::chrono::steady_clock::now();
    Counts counts;
    Arrays arrays;
    for (int64_t i = first; i < first + cases; i++) fuzz_loss(i, arrays, counts);
    std::printf("loss: %lld cases (%lld against the formulas, %lld of arbitrary bits, %lld faults) on", (long long)cases,
                (long long)counts.exact, (long long)counts.noise, (long long)counts.fault);
    for (const Kernel* const* k = supported_kernels(); *k; k++) std::printf(" %s", (*k)->name);
    if (int8_supported()) {
        for (int64_t i = first; i < first + cases / 10; i++) fuzz_int8_linear(i, arrays), fuzz_attention(i, arrays);
        std::printf("; int8_linear, attention: %lld cases each", (long long)(cases / 10));
    } else {
        std::printf("; int8_linear, attention: skipped, this machine lacks AVX-512 VNNI");
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    std::printf("; %.0f s, %d failures\n", took.count(), failures);
    return failures != 0;
}
