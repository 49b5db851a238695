// The native loss: plain pointers in, plain pointers out. It knows neither Python nor torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace amtss {

enum class Type : int32_t { f32, bf16, f16, codes };
enum class Weighting : int32_t { label_margin, top2_margin, label_nll };
// In the order of the enumerators.
constexpr const char* weighting_names[] = {"label_margin", "top2_margin", "label_nll"};

// Logits [rows, classes]; strides count elements. Codes stand for row_max[row] - step[row] * code, and 255 for -inf.
struct Matrix {
    const void* data;
    int64_t row_stride, column_stride;
    Type type;
    const float* row_max;
    const float* step;
};

// The options of the loss, as in amtss_fast/loss/options.py.
struct Options {
    double temperature, weight_temperature;
    float kd_weight, ce_weight, label_smoothing;
    Weighting weighting;
    int64_t ignore_index, unlabeled_index;
};

// One call. Tensors beside the logits are contiguous; an optional one that is absent is a null pointer.
struct Problem : Options {
    int64_t rows, classes, teachers;
    Matrix student;
    const Matrix* teacher;       // [teachers]
    const int64_t* labels;       // [rows]
    const float* prior;          // [teachers], or [teachers, rows]
    bool prior_per_row;
    const uint8_t* mask;         // [teachers, rows]
    const float* sample_weight;  // [rows]

    void* gradient;  // [rows, classes], contiguous, f32 or bf16
    Type gradient_type;
    float gradient_scale;  // the reduction's, folded into the gradient
    bool stream;           // the gradient is too large for the cache: write around it
    float* row_loss;       // [rows], without the reduction's divisor
    float *weights, *margins, *kd;  // [teachers, rows]; all of the stats or none
    float* student_margin;          // [rows]
};

// One instruction set's code.
struct Kernel {
    const char* name;
    // Rows that are worked on together: ranges handed to `loss` begin at multiples of it.
    int64_t (*tile)(const Problem&);
    // Writes the outputs of the rows [begin, end) and returns the sum of their losses.
    double (*loss)(const Problem&, int64_t begin, int64_t end, char* scratch);
    // y[i] = exp(x[i]) for x <= 0, the exponential of the loss by itself.
    void (*exp)(const float* x, float* y, int64_t n);
};

// Scratch of one thread, aligned to 64 bytes. Its size decides which intermediate results are kept, so it is the same
// on every machine and for every number of threads: the results are too.
constexpr int64_t scratch_bytes = 640 * 1024;

extern const Kernel kernel_baseline;
#if defined(__x86_64__)
extern const Kernel kernel_avx2, kernel_avx512;
#endif

// The kernels that this machine runs, best first, up to a null pointer.
const Kernel* const* supported_kernels();

// The kernel in use: the best one, or the one that AMTSS_CPU_ISA names. If that names none that the machine runs,
// returns a null pointer.
const Kernel* chosen_kernel();

enum class Fault : int32_t { none, label, prior, sample_weight };
struct Outcome {
    Fault fault;
    int64_t index;  // of the faulty entry in its tensor
};

// Checks the values of labels and weights, then computes. `divisor` divides the sum of the row losses; NaN: the number
// of rows that count, at least 1. `loss` receives the reduced loss, or is null if only row_loss is wanted.
Outcome run(const Kernel&, Problem&, double divisor, float* loss, int threads);

}  // namespace amtss
