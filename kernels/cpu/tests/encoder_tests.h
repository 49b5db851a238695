// Tests of linear layers of 8-bit codes and of attention.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "encoder/attention.h"
#include "encoder/int8.h"

namespace {

using namespace amtss;

// The arrays have exactly the size that the interface asks for, so that a sanitizer reports accesses beyond them.
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
