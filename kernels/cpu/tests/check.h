// A check that prints what was wrong, and goes on.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <limits>

namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr float nan_f = std::numeric_limits<float>::quiet_NaN();

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

}  // namespace
