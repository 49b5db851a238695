// Number formats, bit by bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

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

}  // namespace
