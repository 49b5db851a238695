// The loss of a range of rows, compiled once per instruction set by isa_*.cpp. Everything that is included here is
// local to such a file, and no file uses a function of the standard library that is not inlined: the linker keeps one
// copy of a shared function, and that could hold instructions that the machine lacks.
//
// Rows are processed in tiles, a tile in groups of W rows. In a group, each lane of a vector holds a row. The
// steps of a tile:
//   read_row_inputs   labels, weights, priors and masks.
//   measure           per tensor and row: the largest logits, Z = sum e^a and D = sum e^a (a - b), with a and b the
//                     teacher's and the student's logits less their maxima. With many classes, `measure_row` goes along
//                     the classes of one row; with few, `measure_columns` goes along the classes of W rows.
//   weigh             from the sums to margins and the weights of the teachers.
//   pull              only for the stats: how far teachers and student are apart.
//   compare           only for other divergences than the forward KL: their terms and slopes, class by class.
//   lists             the same for teachers that list a few classes, whose rows are tiles of their own.
//   settle            losses, and the factor of each tensor's e^a in the gradient.
//   combine           the gradient, from the exponentials that `measure` kept. If a row is too long to keep them, they
//                     are computed from the logits again.
#pragma once

// In this order, the order of the steps. What GCC inlines depends on the order of definitions.
#include "loss/gradient.h"
#include "loss/row_inputs.h"
#include "loss/measure.h"
#include "loss/weigh.h"
#include "loss/compare.h"
#include "loss/lists.h"
#include "loss/settle.h"
#include "loss/combine.h"

namespace {

void Worker::run_tile(int64_t first) {
    begin = first;
    rows = p.rows - first < layout.tile ? int(p.rows - first) : layout.tile;
    const int groups = (rows + W - 1) / W;
    for (int g = 0; g < groups; g++) read_row_inputs(g);
    if (layout.by_columns) {
        for (int64_t j = 0; j < layout.tensors; j++) {
            read_columns(matrix(j), kept + j * p.classes * layout.lanes);
            for (int g = 0; g < groups; g++) measure_columns(j, g);
        }
    } else {
        for (int lane = 0; lane < rows; lane++) measure_row(lane);
        finish_rows();
    }
    for (int g = 0; g < groups; g++) weigh(g);
    if (p.pull) {
        for (int g = 0; layout.by_columns && g < groups; g++) pull_columns(g);
        for (int lane = 0; !layout.by_columns && lane < rows; lane++) pull_row(lane);
    }
    if (p.compares()) {
        for (int g = 0; layout.by_columns && g < groups; g++) compare_columns(g);
        for (int lane = 0; !layout.by_columns && lane < rows; lane++) compare_row(lane);
    }
    for (int64_t j = 1; list && j < layout.tensors; j++)
        if (list[j - 1].taken) compare_list(j, 0);
    for (int g = 0; g < groups; g++) settle(g);
    if (!p.gradient) return;
    if (layout.by_columns) {
        for (int g = 0; g < groups; g++) combine_columns(g);
        const int64_t size = p.gradient_type == Type::f32 ? 4 : 2;
        char* const out = (char*)p.gradient + first * p.classes * size;
        write_block(flat, out, p.gradient_type, rows * p.classes, false, (uint16_t*)fresh);
    } else {
        for (int lane = 0; lane < rows; lane++) combine_row(lane);
    }
}

int64_t tile_rows(const Problem& p) { return Layout(p).tile; }

int64_t scratch_of(const Problem& p) { return Layout(p).bytes(p); }

double loss_rows(const Problem& p, int64_t begin, int64_t end, char* scratch) {
    Worker worker(p, scratch);
    for (int64_t n = begin; n < end; n += worker.layout.tile) worker.run_tile(n);
    fence();
    double sum = 0;
    for (int lane = 0; lane < W; lane++) sum += worker.loss[lane];
    return sum;
}

void exp_all(const float* x, float* y, int64_t n) {
    const Exponent e(1);
    sweep(n, [&](int64_t i, auto part) { store(y + i, exp(load(x + i, part, 0), e), part); });
}

}  // namespace
