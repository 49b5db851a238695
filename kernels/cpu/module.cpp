// The Python module amtss_fast._cpu. Tensors are passed as addresses, which takes a tenth of the time of array objects.
// The caller, amtss_fast/loss/backends/cpu.py, checks the tensors and keeps them alive.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "encoder/attention.h"
#include "loss/core.h"
#include "encoder/int8.h"
#include "memory.h"

namespace nb = nanobind;
using namespace amtss;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernel* const* kernel = supported_kernels(); *kernel; kernel++) names.push_back((*kernel)->name);
    return names;
}

// Chosen once, at the first call.
const Kernel& kernel() {
    static const Kernel& chosen = [&]() -> const Kernel& {
        if (const Kernel* found = chosen_kernel()) return *found;
        std::string has;
        for (const std::string& name : instruction_sets()) has += (has.empty() ? "" : ", ") + name;
        throw std::runtime_error("AMTSS_CPU_ISA=" + std::string(std::getenv("AMTSS_CPU_ISA")) +
                                 " is not among the instruction sets of this machine: " + has);
    }();
    return chosen;
}

// Ten numbers per matrix: address, row stride, column stride, type, addresses of row_max, step, place and classes, the
// number of listed classes, and whether there is a bucket.
constexpr size_t matrix_numbers = 10;
Matrix matrix(const int64_t* m, double temperature) {
    return {pointer<void>(m[0]), m[1], m[2], Type(m[3]), pointer<float>(m[4]), pointer<float>(m[5]), temperature,
            pointer<int32_t>(m[6]), pointer<int64_t>(m[7]), m[8], m[9] != 0};
}

nb::object loss(int64_t rows, int64_t classes, const std::vector<int64_t>& matrices,
                const std::vector<double>& temperatures, uintptr_t labels, uintptr_t prior,
                bool prior_per_row, uintptr_t mask, uintptr_t sample_weight, const Options& options, double divisor,
                uintptr_t gradient, int gradient_type, uintptr_t row_loss, uintptr_t weights, uintptr_t margins,
                uintptr_t kd, uintptr_t student_margin, uintptr_t teacher_scale, uintptr_t pull, uintptr_t loss, int threads) {
    std::vector<Matrix> logits;
    for (size_t j = 0; j < temperatures.size(); j++) logits.push_back(matrix(&matrices.at(matrix_numbers * j), temperatures[j]));
    Problem p{options};
    p.rows = rows;
    p.classes = classes;
    p.teachers = int64_t(logits.size()) - 1;
    p.student = logits[0];
    p.teacher = logits.data() + 1;
    p.labels = pointer<int64_t>(labels);
    p.prior = pointer<float>(prior);
    p.prior_per_row = prior_per_row;
    p.mask = pointer<uint8_t>(mask);
    p.sample_weight = pointer<float>(sample_weight);
    p.gradient = pointer<void>(gradient);
    p.gradient_type = Type(gradient_type);
    p.row_loss = pointer<float>(row_loss);
    p.weights = pointer<float>(weights);
    p.margins = pointer<float>(margins);
    p.kd = pointer<float>(kd);
    p.student_margin = pointer<float>(student_margin);
    p.teacher_scale = pointer<float>(teacher_scale);
    p.pull = pointer<float>(pull);
    Outcome outcome;
    {
        nb::gil_scoped_release released;
        outcome = run(kernel(), p, divisor, pointer<float>(loss), threads);
    }
    if (outcome.fault == Fault::none) return nb::none();
    return nb::make_tuple(int(outcome.fault), outcome.index);
}

// The number of `name` among `names`.
template <class Names>
int number_of(const char* option, const Names& names, const std::string& name) {
    const auto found = std::find(std::begin(names), std::end(names), name);
    if (found == std::end(names)) throw nb::value_error((std::string(option) + " " + name + " is unknown").c_str());
    return int(found - std::begin(names));
}

std::string weighting(const Options& options) { return weighting_names[int(options.weighting)]; }
std::string divergence(const Options& options) { return divergence_names[int(options.divergence)]; }
void set_divergence(Options& options, const std::string& name) {
    options.divergence = Divergence(number_of("divergence", divergence_names, name));
}

void set_weighting(Options& options, const std::string& name) {
    options.weighting = Weighting(number_of("weighting", weighting_names, name));
}

// The tensor owns its block and returns it when the last reference to its storage is gone.
nb::ndarray<nb::pytorch, nb::device::cpu> gradient(int64_t rows, int64_t classes, int type) {
    const bool narrow = Type(type) == Type::bf16;
    Block* const block = take_block(rows * classes * (narrow ? 2 : 4));
    const nb::capsule owner(block, [](void* given) noexcept { give_block(static_cast<Block*>(given)); });
    const nb::dlpack::dtype dtype{uint8_t(narrow ? nb::dlpack::dtype_code::Bfloat : nb::dlpack::dtype_code::Float),
                                  uint8_t(narrow ? 16 : 32), 1};
    return {block->memory, {size_t(rows), size_t(classes)}, owner, {}, dtype};
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.def("instruction_set", [] { return kernel().name; },
          "The instruction set in use: the best one, or the one that AMTSS_CPU_ISA names; RuntimeError if the machine lacks that.");
    m.def("instruction_sets", &instruction_sets, "The instruction sets that this machine and the kernels support, best first.");
    nb::class_<Options>(m, "Options", "The options of the loss as attributes.")
        .def(nb::init<>())
        .def_rw("temperature", &Options::temperature)
        .def_prop_rw("weighting", &weighting, &set_weighting)
        .def_prop_rw("divergence", &divergence, &set_divergence)
        .def_rw("divergence_beta", &Options::divergence_beta)
        .def_rw("weight_temperature", &Options::weight_temperature)
        .def_rw("kd_weight", &Options::kd_weight)
        .def_rw("ce_weight", &Options::ce_weight)
        .def_rw("label_smoothing", &Options::label_smoothing)
        .def_rw("ignore_index", &Options::ignore_index)
        .def_rw("unlabeled_index", &Options::unlabeled_index);
    m.attr("divergences") = std::vector<std::string>(std::begin(divergence_names), std::end(divergence_names));
    m.attr("weightings") = std::vector<std::string>(std::begin(weighting_names), std::end(weighting_names));
    m.def("loss", &loss,
          "Writes loss, gradient and stats to the given addresses. Returns None, or (tensor, index) of a wrong value, with "
          "tensor 1: labels, 2: teacher_prior, 3: sample_weight.");
    m.attr("large_gradient") = large_gradient;
    m.def("gradient", &gradient,
          "A tensor [rows, classes] of arbitrary values, for gradients of `large_gradient` bytes and more. It takes the memory of "
          "the last such tensor that was freed, or new memory.");
    m.def("release_memory", &release_kept, "Frees the memory that is kept for the next large gradient.");
    m.def("int8_supported", &int8_supported, "Whether this machine runs int8_linear and attention: AVX-512 with VNNI.");
    m.def(
        "int8_linear",
        [](int64_t rows, int64_t inputs, int64_t outputs, uintptr_t x, uintptr_t weight, uintptr_t offset,
           uintptr_t scale, uintptr_t bias, bool gelu, uintptr_t y, int threads) {
            nb::gil_scoped_release released;
            run(Int8Linear{rows, inputs, outputs, pointer<float>(x), pointer<int8_t>(weight), pointer<int32_t>(offset),
                           pointer<float>(scale), pointer<float>(bias), gelu, pointer<float>(y)},
                threads);
        },
        "A linear layer of 8-bit codes; shapes as in int8.h.");
    m.def(
        "attention",
        [](int64_t batch, int64_t heads, int64_t queries, int64_t keys, int64_t width,
           const std::vector<int64_t>& tensors, float scale, uintptr_t out, int threads) {
            // `tensors`: the address and three strides of q, k, v and the mask.
            Attention p{batch, heads, queries, keys, width, {}, {}, {}, {}, {}, {}, {}, {}, scale, pointer<float>(out)};
            const float** places[] = {&p.q, &p.k, &p.v};
            int64_t* strides[] = {p.q_stride, p.k_stride, p.v_stride, p.mask_stride};
            for (int i = 0; i < 3; i++) *places[i] = pointer<float>(tensors.at(4 * i));
            p.mask = pointer<uint8_t>(tensors.at(12));
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 3; j++) strides[i][j] = tensors.at(4 * i + 1 + j);
            nb::gil_scoped_release released;
            run(p, threads);
        },
        "Attention in float32; shapes as in attention.h.");
    m.def(
        "exp",
        [](uintptr_t x, uintptr_t y, int64_t n, int repeats) {
            nb::gil_scoped_release released;
            for (int i = 0; i < repeats; i++) kernel().exp(pointer<float>(x), pointer<float>(y), n);
        },
        "y[i] = exp(x[i]) for n floats <= 0, computed `repeats` times with the exponential of the loss.");
}
