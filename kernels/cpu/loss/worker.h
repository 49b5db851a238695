// The state of one thread: the problem, the tile in work, and the thread's scratch.
#pragma once

#include <algorithm>

#include "loss/layout.h"

namespace {

// What follows from a tensor's temperature.
struct Softness {
    Exponent exponent;
    float inverse;  // 1 / temperature
    float ratio;    // the student's temperature by this one
    float slack;    // how far a logit may lie above the origin: its exponential is then at most 2^8
};

static_assert(sizeof(Softness) == softness_bytes);

// Takes pieces of memory, one after the other.
struct Pieces {
    char* next;

    template <class T>
    T* take(int64_t count) {
        T* const taken = (T*)next;
        next += Layout::rounded(count * int64_t(sizeof(T)));
        return taken;
    }
};

struct Worker {
    const Problem& p;
    const Layout layout;
    const Exponent sharp;  // of temperature 1

    int64_t begin;  // the first row of the tile
    int rows;       // of the tile
    vd loss = {};   // sum over the rows so far
    Rows* row;          // [groups]
    Measured* tensor;   // [groups, tensors]
    Running* running;   // [tensors]
    Softness* soft;     // [tensors]
    float *student, *teacher, *gradient, *fresh;  // [block] each
    float* kept;     // exponentials [tile, slots, width]; by columns: [columns, classes, lanes], the tensors' first
    float* flat;     // by columns: [lanes, classes], the rows of one tensor
    float* origins;  // [tile, slots, blocks]: the origin of each kept block
    int32_t* slot;   // [tile, tensors]: of those that a row has
    float* slopes;   // [width]: of a row whose exponentials are not kept, see compare.h
    List* list = nullptr;  // [teachers], see lists.h; null: they all give logits
    Listed listed;

    Worker(const Problem& problem, char* memory)
        : p(problem), layout(problem), sharp(1) {
        slopes = (float*)(memory + scratch_bytes);
        if (p.has_lists()) place_lists({memory + scratch_bytes + layout.slopes_bytes(p)});
        Pieces pieces{memory};
        row = pieces.take<Rows>(layout.groups);
        tensor = pieces.take<Measured>(layout.groups * layout.tensors);
        running = pieces.take<Running>(layout.tensors);
        soft = pieces.take<Softness>(layout.tensors);
        for (int64_t j = 0; j < layout.tensors; j++) {
            const double tau = matrix(j).temperature;
            const Exponent e(tau);
            const float steepest = std::max(e.hi, j == 0 && layout.separate_ce ? sharp.hi : 0.0f);
            soft[j] = {e, float(1 / tau), float(p.temperature / tau), 8 / steepest};
        }
        student = pieces.take<float>(block);
        teacher = pieces.take<float>(block);
        gradient = pieces.take<float>(block);
        fresh = pieces.take<float>(block);
        slot = pieces.take<int32_t>(layout.by_columns ? 0 : layout.tile * layout.tensors);
        origins = pieces.take<float>(layout.keep ? layout.tile * layout.slots * layout.blocks : 0);
        kept = (float*)pieces.next;
        flat = kept + layout.columns * p.classes * layout.lanes;
    }

    void place_lists(Pieces pieces) {
        list = pieces.take<List>(p.teachers);
        listed = {pieces.take<uint8_t>(block), pieces.take<int32_t>(block), pieces.take<float>(block)};
        __builtin_memset(listed.mark, 0, block);
        for (int64_t k = 0; k < p.teachers; k++) {
            const int64_t size = p.teacher[k].listed;
            int32_t* const own = (int32_t*)pieces.take<char>(layout.list_bytes(p.teacher[k]));
            float* const values = (float*)(own + layout.blocks + 1 + size);
            list[k] = {own, own + layout.blocks + 1, values, values + size, 0, false, 0, 0, 0, 0};
        }
    }

    const Matrix& matrix(int64_t j) const { return j == 0 ? p.student : p.teacher[j - 1]; }
    // The exponentials of the cross entropy are those of tensor `layout.tensors`, in the last slot.
    int64_t slot_of(int lane, int64_t j) const {
        return j == layout.tensors ? layout.slots - 1 : slot[lane * layout.tensors + j];
    }
    float* kept_row(int lane, int64_t j) const { return kept + (lane * layout.slots + slot_of(lane, j)) * layout.width; }
    float* kept_origins(int lane, int64_t j) const {
        return origins + (lane * layout.slots + slot_of(lane, j)) * layout.blocks;
    }
    // Slopes overwrite the exponentials of the first teacher.
    float* kept_slopes(int lane) const { return kept + (lane * layout.slots + 1) * layout.width; }
    // The origin of the whole row, to which the gradient scales the exponentials of all blocks.
    float& last_origin(int lane, int64_t j) const { return kept_origins(lane, j)[layout.blocks - 1]; }
    int64_t block_end(int64_t from) const { return std::min(from + layout.span, p.classes); }

    // The block that begins at class c of row n; after the last class, the first block of row n + 1.
    Ahead ahead(int64_t j, int64_t n, int64_t c) const {
        const Matrix& m = matrix(j);
        const int size = m.type == Type::f32 ? 4 : m.type == Type::codes ? 1 : 2;
        if (c == p.classes) c = 0, n += n + 1 < p.rows;
        const int64_t row = std::max<int64_t>(m.row(n), 0);
        return {(const char*)m.data + (row * m.row_stride + c * m.column_stride) * size, size};
    }

    // The number of rows in group g; its other lanes have none.
    int group_rows(int g) const {
        const int left = rows - g * W;
        return left < 0 ? 0 : left < W ? left : W;
    }

    void read_row_inputs(int g);
    void measure_row(int lane);
    void finish_rows();
    bool is_list(int64_t j) const { return list && matrix(j).classes; }
    void read_list(int64_t j, int64_t n);
    float sum_rest(int64_t j, int64_t b, float* e, int64_t count, float z);
    void measure_list(int64_t j, int lane);
    const float* rest_logits(int64_t j, int64_t n, int64_t b, int64_t count);
    double measure_far_rest(int64_t j, int64_t n);
    void compare_list(int64_t j, int lane);
    bool lists_in(int64_t b) const;
    void combine_lists(int64_t n, int64_t b, int64_t count, float base, float scale, float* e, float* sums);
    void read_columns(const Matrix& m, float* columns) const;
    void measure_columns(int64_t j, int g);
    void weigh(int g);
    void pull_row(int lane);
    void pull_columns(int g);
    void compare_row(int lane);
    void compare_columns(int g);
    void settle(int g);
    void combine_row(int lane);
    void combine_columns(int g);
    void run_tile(int64_t first);
};

}  // namespace
