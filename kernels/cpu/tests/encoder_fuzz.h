// Random calls of linear layers of 8-bit codes and of attention; for machines that run them.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "encoder/attention.h"
#include "encoder/int8.h"
#include "guarded.h"
#include "loss_fuzz.h"

namespace {

std::vector<float> uniform(Draw& draw, int64_t size) {
    std::vector<float> values(size);
    for (float& x : values) x = float(draw.in(-4000, 4000)) / 1000;
    return values;
}

void fuzz_int8_linear(int64_t number, Arrays& arrays) {
    Draw draw{uint64_t(number)};
    const int64_t rows = draw.in(0, 70), inputs = draw.in(1, 300), outputs = draw.in(1, 130);
    const int64_t quads = (inputs + 3) / 4, panels = (outputs + 31) / 32;
    std::vector<int8_t> packed(panels * quads * 128), w(outputs * inputs);
    std::vector<int32_t> offset(outputs);
    for (int64_t j = 0; j < outputs; j++)
        for (int64_t i = 0; i < inputs; i++) {
            const int8_t code = int8_t(draw.in(-127, 127));
            w[j * inputs + i] = packed[((j / 32 * quads + i / 4) * 32 + j % 32) * 4 + i % 4] = code;
            offset[j] -= code;
        }
    std::vector<float> x = uniform(draw, rows * inputs), scale = uniform(draw, outputs), bias = uniform(draw, outputs);
    for (float& s : scale) s = 1e-4f * (5 + s);
    const bool gelu = draw.one_in(2), biased = !draw.one_in(4);
    const std::string where = "int8_linear " + std::to_string(number);
    std::vector<float> first;
    for (const bool end : {true, false}) {
        arrays.clear();
        Int8Linear p{rows, inputs, outputs, arrays.input(x, end), arrays.input(packed, end), arrays.input(offset, end),
                     arrays.input(scale, end), biased ? arrays.input(bias, end) : nullptr, gelu,
                     arrays.output<float>(size_t(rows * outputs), end)};
        run(p, int(draw.in(1, 4)));
        arrays.check(where.c_str());
        const std::vector<float> y(p.y, p.y + rows * outputs);
        if (end) first = y;
        CHECK(y == first, "%s: other bits at another place", where.c_str());
    }
    for (int64_t n = 0; n < rows; n++) {
        float least = 0, largest = 0;
        for (int64_t i = 0; i < inputs; i++) {
            least = std::min(least, x[n * inputs + i]);
            largest = std::max(largest, x[n * inputs + i]);
        }
        const float step = largest / 255 - least / 255, inverse = 1 / step, top = 255 + std::nearbyint(least * inverse);
        for (int64_t j = 0; j < outputs && step > 0; j++) {
            int64_t sum = 0;
            for (int64_t i = 0; i < inputs; i++)
                sum += int64_t(std::min(top, std::nearbyint(x[n * inputs + i] * inverse))) * w[j * inputs + i];
            double exact = double(sum) * scale[j] * step + (biased ? bias[j] : 0);
            if (gelu) exact *= 0.5 * std::erfc(-exact / std::sqrt(2.0));
            CHECK(std::fabs(first[n * outputs + j] - exact) < 1e-6 * (1 + std::fabs(exact)) + 1e-6 * std::fabs(sum * scale[j] * step),
                  "%s: y[%d, %d] = %g, not %g", where.c_str(), int(n), int(j), first[n * outputs + j], exact);
        }
    }
}

void fuzz_attention(int64_t number, Arrays& arrays) {
    Draw draw{uint64_t(number)};
    const int64_t batch = draw.in(1, 3), heads = draw.in(1, 3), queries = draw.in(1, 45), keys = draw.in(1, 70);
    const int64_t width = 32 * draw.in(1, 3), row = heads * width;
    const std::vector<float> q = uniform(draw, batch * queries * row), k = uniform(draw, batch * keys * row),
                             v = uniform(draw, batch * keys * row);
    std::vector<uint8_t> mask(batch * queries * keys);
    for (uint8_t& there : mask) there = !draw.one_in(3);
    const bool masked = !draw.one_in(3);
    const float scale = 0.05f;
    const std::string where = "attention " + std::to_string(number);
    std::vector<float> out;
    for (const bool end : {true, false}) {
        arrays.clear();
        Attention p{batch, heads, queries, keys, width, arrays.input(q, end), arrays.input(k, end), arrays.input(v, end),
                    {queries * row, width, row}, {keys * row, width, row}, {keys * row, width, row},
                    masked ? arrays.input(mask, end) : nullptr, {queries * keys, 0, keys}, scale,
                    arrays.output<float>(q.size(), end)};
        run(p, int(draw.in(1, 4)));
        arrays.check(where.c_str());
        const std::vector<float> got(p.out, p.out + q.size());
        if (end) out = got;
        CHECK(got == out, "%s: other bits at another place", where.c_str());
    }
    std::vector<double> e(keys);
    for (int64_t i = 0; i < batch * queries; i++)
        for (int64_t h = 0; h < heads; h++) {
            const int64_t n = i / queries;
            double sum = 0;
            for (int64_t j = 0; j < keys; j++) {
                double score = 0;
                for (int64_t d = 0; d < width; d++)
                    score += double(q[i * row + h * width + d]) * k[(n * keys + j) * row + h * width + d];
                sum += e[j] = masked && !mask[i * keys + j] ? 0 : std::exp(scale * score);
            }
            for (int64_t d = 0; d < width; d++) {
                double exact = 0;
                for (int64_t j = 0; j < keys && sum > 0; j++) exact += e[j] / sum * v[(n * keys + j) * row + h * width + d];
                CHECK(std::fabs(out[i * row + h * width + d] - exact) < 1e-4, "%s: %g, not %g", where.c_str(),
                      out[i * row + h * width + d], exact);
            }
        }
}

}  // namespace
