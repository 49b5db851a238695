// Number formats, bit by bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"

namespace {

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

// A neighboring value: exact rounding does not matter for inputs.
uint16_t encode_f16(float x) {
    static const std::vector<double> positive = [] {
        std::vector<double> values;
        for (int bits = 0; bits < 0x7c00; bits++) values.push_back(decode_f16(uint16_t(bits)));
        return values;
    }();
    if (std::isinf(x)) return x > 0 ? 0x7c00 : 0xfc00;
    if (std::isnan(x)) return 0x7e00;
    const auto above = std::upper_bound(positive.begin(), positive.end(), std::fabs(double(x)));
    return uint16_t((above - positive.begin() - 1) | (x < 0 ? 0x8000 : 0));
}

}  // namespace
