// How a thread's scratch is divided, and how many rows a tile has.
#pragma once

#include "loss/core.h"
#include "loss/rows.h"
#include "loss/running.h"

namespace {

// Classes of a block, which stays in the first-level cache while it is read several times. Within a block, a lane adds
// up 64 values in float; the sums of blocks are added up in double.
constexpr int64_t block = 128 * W;
// Up to this many classes, a lane holds a row. Its sums are float, which limits the number.
constexpr int64_t few_classes = 12 * W < 128 ? 12 * W : 128;

constexpr int64_t softness_bytes = 24;
// Exponentials of a tile whose rows are compared.
constexpr int64_t compared_bytes = 192 * 1024;

// The list of one teacher in one row.
struct List {
    int32_t* end;        // [blocks + 1] where the entries of each block end
    int32_t* classes;    // [listed] block by block
    float* logprob;      // [listed]
    float* slope;        // [listed] times the teacher's factor
    int32_t count;       // entries that are no padding
    bool taken;          // whether the teacher teaches the row
    double rest;         // sum of the student's exponentials of all other classes
    float per_rest;      // of these in the gradient, beside the student's factor
    float far_origin, far_factor;  // of their exponentials less another origin, where the rest is tiny; factor 0: it is not

    int32_t begin(int64_t b) const { return b ? end[b - 1] : 0; }
    // Moves the origin of `rest` down by `shift`.
    void rebase(double shift, const Exponent& exponent) {
        if (rest != 0 && shift != 0) rest *= exp(float(shift), exponent);
    }
};

// The classes of a block that some teacher lists.
struct Listed {
    uint8_t* mark;     // [block] 0: none does
    int32_t* classes;  // [block]
    float* factor;     // [block] of the student's exponential
};

struct Layout {
    bool by_columns;   // few classes: each lane holds a row
    bool separate_ce;  // the cross entropy needs exponentials of its own: its temperature is 1
    bool keep;         // the exponentials of a tile are kept, because they are needed again
    int tile;          // rows of a tile
    int groups;        // of W rows each, in a tile
    int64_t tensors;   // the student and the teachers
    int64_t slots;     // exponentials per class that are kept: of the student, a row's teachers, the cross entropy
    int64_t lanes;     // floats of a column in scratch
    int64_t columns;   // [classes, lanes] in scratch
    int64_t width;     // floats of a row in scratch
    int64_t span;      // classes of a block
    int64_t blocks;    // of a row, plus one

    explicit Layout(const Problem& p) {
        tensors = 1 + p.teachers;
        separate_ce = p.ce_weight > 0 && p.temperature != 1;
        const int64_t group_bytes = sizeof(Rows) + tensors * sizeof(Measured);
        // By columns: the exponentials, two of the student's, and where teachers are compared, their logits.
        columns = tensors + 2 + (p.compares() ? p.teachers : 0);
        const int64_t free =
            scratch_bytes - tensors * (sizeof(Running) + softness_bytes + W * sizeof(int32_t)) - 4 * block * sizeof(float) - 1024;
        width = (p.classes + W - 1) / W * W;
        // The blocks of a row have nearly one size: each prefetches as many logits as the next one has.
        const int64_t least = (p.classes + block - 1) / block;
        span = ((p.classes + least - 1) / least + 2 * W - 1) / (2 * W) * (2 * W);
        blocks = (p.classes + span - 1) / span + 1;
        slots = 1 + p.most_teachers + separate_ce;
        const int64_t row_bytes = slots * (width + blocks) * sizeof(float);
        const bool again = p.gradient || p.compares() || p.pull;
        keep = again && row_bytes <= free - group_bytes;
        // Several groups hide the latencies of each other's instructions while their columns fit the first-level cache.
        by_columns = false;
        for (groups = 4; groups >= 1 && !p.has_lists(); groups /= 2) {
            lanes = tile = groups * W;
            const int64_t column_bytes = (columns * p.classes + flat_columns(p)) * lanes * sizeof(float);
            by_columns = p.classes <= few_classes && groups * group_bytes + column_bytes <= (groups > 1 ? 32 * 1024 : free);
            if (by_columns) return;
        }
        groups = 1;
        // Compared rows are read twice: a tile's logits, about as many bytes as are kept, stay in the second-level cache.
        const int64_t room = p.compares() ? compared_bytes : free - group_bytes;
        if (p.has_lists())
            tile = 1;
        else if (again)
            tile = !keep || room < row_bytes ? 1 : room / row_bytes < W ? int(room / row_bytes) : W;
    }

    static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

    // Bytes of the slopes of a row whose exponentials are not kept.
    int64_t slopes_bytes(const Problem& p) const {
        return p.compares() && p.gradient && !by_columns && !keep ? rounded(width * sizeof(float)) : 0;
    }
    int64_t list_bytes(const Matrix& m) const { return m.classes ? rounded((blocks + 1 + 3 * m.listed) * sizeof(float)) : 0; }
    int64_t lists_bytes(const Problem& p) const {
        if (!p.has_lists()) return 0;
        int64_t sum = rounded(p.teachers * sizeof(List)) + rounded(block) + 2 * rounded(block * sizeof(float));
        for (int64_t k = 0; k < p.teachers; k++) sum += list_bytes(p.teacher[k]);
        return sum;
    }
    int64_t bytes(const Problem& p) const { return scratch_bytes + slopes_bytes(p) + lists_bytes(p); }

    // The rows of a tile, one after the other, take as much room as this many columns.
    static int64_t flat_columns(const Problem& p) { return (p.classes + 3) / 4 * 4 + 1; }
};

}  // namespace
