// Linear layers of 8-bit codes, on CPUs with AVX-512 VNNI. Plain pointers in, plain pointers out.
#pragma once

#include <cstdint>

namespace amtss {

// y[n, j] = step[n] * scale[j] * sum_i a[n, i] * w[j, i] + bias[j], with a[n, i] = round(x[n, i] / step[n]) and
// step[n] = (max(0, max_i x[n, i]) - min(0, min_i x[n, i])) / 255. Codes are kept as a + zero[n], zero[n] that of the
// least x, cut off at 255. Sums are exact: a row's result depends on that row alone, not on its place in the batch nor on
// the number of threads. A row with NaN or infinity gives values that are not finite.
struct Int8Linear {
    int64_t rows, inputs, outputs;  // inputs: up to 65,536, so that sums of 255 * 127 stay within 32 bits
    const float* x;                 // [rows, inputs]
    const int8_t* weight;           // [outputs / 32, inputs / 4, 32, 4], both rounded up, zeros in what is added
    const int32_t* offset;          // [outputs]: -sum_i w[j, i], of which zero[n] is part of every sum
    const float* scale;             // [outputs]
    const float* bias;              // [outputs], or null
    bool gelu;                      // y becomes y * P(X < y) for a standard normal X
    float* y;                       // [rows, outputs]
};

// Whether this machine can run it.
bool int8_supported();
void run(const Int8Linear&, int threads);

// Rows that share a reading of the weights: their codes fit into the second-level cache.
constexpr int64_t most_tile_rows = 512, tile_bytes = 384 * 1024;
inline int64_t tile_rows(const Int8Linear& p) {
    const int64_t rows = tile_bytes / (p.inputs + 64);
    return rows < 1 ? 1 : rows > most_tile_rows ? most_tile_rows : rows;
}

// Of one tile, the rows [begin, end); `codes`: room for tile_rows(p) * (inputs + 64) bytes.
void int8_rows_avx512(const Int8Linear&, int64_t begin, int64_t end, uint8_t* codes);

}  // namespace amtss
