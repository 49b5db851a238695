// Linear layers of 8-bit codes, on CPUs with AVX-512 VNNI. Raw pointers and sizes, without Python and torch.
#pragma once

#include <cstdint>

namespace amtss {

// y[n, j] = step[n] * scale[j] * sum_i a[n, i] * w[j, i] + bias[j], with a[n, i] = round(x[n, i] / step[n]) and step[n]
// = (max(0, max_i x[n, i]) - min(0, min_i x[n, i])) / 255. Codes are stored as min(255, a + zero[n]), where -zero[n] is
// the code of the least x. Sums are exact: the result of a row depends on that row only, not on its place in the batch
// or the number of threads. A row with NaN or infinity gives values that are not finite.
struct Int8Linear {
    int64_t rows, inputs, outputs;  // inputs: up to 65,536, so that sums of 255 * 127 fit 32 bits
    const float* x;                 // [rows, inputs]
    const int8_t* weight;           // [outputs / 32, inputs / 4, 32, 4], both quotients rounded up, padded with zeros
    const int32_t* offset;          // [outputs]: -sum_i w[j, i]; zero[n] times this is part of every sum
    const float* scale;             // [outputs]
    const float* bias;              // [outputs], or null
    bool gelu;                      // y becomes y * P(X < y) for a standard normal X
    float* y;                       // [rows, outputs]
};

// Whether this machine can run it.
bool int8_supported();
void run(const Int8Linear&, int threads);

// Rows of a tile, for which the weights are read once: their codes fit the second-level cache.
constexpr int64_t most_tile_rows = 512, tile_bytes = 384 * 1024;
inline int64_t tile_rows(const Int8Linear& p) {
    const int64_t rows = tile_bytes / (p.inputs + 64);
    return rows < 1 ? 1 : rows > most_tile_rows ? most_tile_rows : rows;
}

// The rows [begin, end) of one tile; `codes`: room for tile_rows(p) * (inputs + 64) bytes.
void int8_rows_avx512(const Int8Linear&, int64_t begin, int64_t end, uint8_t* codes);

}  // namespace amtss
