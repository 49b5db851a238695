// The interface of the native loss: raw pointers, sizes and strides, without Python and torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace amtss {

enum class Type : int32_t { f32, bf16, f16, codes };
enum class Weighting : int32_t { label_margin, top2_margin, label_nll };
// In the order of the enumerators.
constexpr const char* weighting_names[] = {"label_margin", "top2_margin", "label_nll"};

enum class Divergence : int32_t { forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl, tvd };
constexpr const char* divergence_names[] = {"forward_kl",      "reverse_kl",      "jsd",
                                            "skew_forward_kl", "skew_reverse_kl", "tvd"};

// Logits [rows, classes], with strides in elements. A code is the logit row_max[row] - step[row] * code, or -inf if it
// is 255. Of a teacher with rows of its own, row n of the problem is row place[n] of the matrix, or none at -1.
struct Matrix {
    const void* data;
    int64_t row_stride, column_stride;
    Type type;
    const float* row_max;
    const float* step;
    double temperature;
    const int32_t* place;  // [rows of the problem]; null: row n is row n
    // Of a teacher that lists log-probabilities: their classes [rows, listed]; -inf has none. Null: these are logits.
    const int64_t* classes;
    int64_t listed;
    bool bucket;  // whether all other classes have, as one, the rest of the mass

    int64_t row(int64_t n) const { return place ? place[n] : n; }
};

// The options of the loss, as in amtss_fast/loss/options.py.
struct Options {
    double temperature, weight_temperature;
    float kd_weight, ce_weight, label_smoothing, divergence_beta;
    Weighting weighting;
    Divergence divergence;
    int64_t ignore_index, unlabeled_index;
};

// One call. All tensors but the logits are contiguous. Optional ones may be null pointers.
struct Problem : Options {
    int64_t rows, classes, teachers;
    Matrix student;
    const Matrix* teacher;       // [teachers]
    const int64_t* labels;       // [rows]
    const float* prior;          // [teachers], or [teachers, rows]
    bool prior_per_row;
    const uint8_t* mask;         // [teachers, rows]
    int64_t most_teachers;       // that give logits of one row; set by `run`
    const float* sample_weight;  // [rows]

    void* gradient;  // [rows, classes], contiguous, f32 or bf16
    Type gradient_type;
    float gradient_scale;  // 1 / divisor of the loss, a factor of the gradient
    bool stream;           // write the gradient past the cache, because it is larger
    float* row_loss;       // [rows], not divided
    // All of the stats are given or none. [teachers, rows], but student_margin [rows].
    float *weights, *margins, *kd, *student_margin, *teacher_scale, *pull;

    bool compares() const { return divergence != Divergence::forward_kl; }
    bool has_lists() const {
        for (int64_t k = 0; k < teachers; k++)
            if (teacher[k].classes) return true;
        return false;
    }
};

// The code for one instruction set.
struct Kernel {
    const char* name;
    // Rows of a tile. Ranges given to `loss` begin at multiples of it.
    int64_t (*tile)(const Problem&);
    // Writes the outputs of the rows [begin, end) and returns the sum of their losses.
    double (*loss)(const Problem&, int64_t begin, int64_t end, char* scratch);
    // Bytes of scratch that `loss` needs.
    int64_t (*scratch)(const Problem&);
    // y[i] = exp(x[i]) for x <= 0, with the exponential of the loss.
    void (*exp)(const float* x, float* y, int64_t n);
};

// Scratch of one thread, aligned to 64 bytes, for tiles of rows. Its size decides which intermediate results are kept. It
// is the same on every machine and for every number of threads, and so are the results. Long rows of some divergences
// need one more row of floats, and lists of classes room for themselves.
constexpr int64_t scratch_bytes = 640 * 1024;

extern const Kernel kernel_baseline;
#if defined(__x86_64__)
extern const Kernel kernel_avx2, kernel_avx512;
#endif

// The kernels that this machine can run, best first, ended by a null pointer.
const Kernel* const* supported_kernels();

// The kernel in use: the best one, or the one named by the environment variable AMTSS_CPU_ISA; a null pointer if the
// machine cannot run that.
const Kernel* chosen_kernel();

enum class Fault : int32_t { none, label, prior, sample_weight };
struct Outcome {
    Fault fault;
    int64_t index;  // of the wrong value in its tensor
};

// Checks the values of labels and weights, then computes. `divisor` divides the sum of the row losses; NaN stands for
// the number of rows that count, at least 1. The reduced loss is written to `loss` unless that is null. Throws
// std::bad_alloc if there is no memory for scratch; the outputs then hold arbitrary values.
Outcome run(const Kernel&, Problem&, double divisor, float* loss, int threads);

}  // namespace amtss
