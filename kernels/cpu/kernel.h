// The algorithm, compiled once per instruction set.
//
// Rows are worked on in tiles, a tile in groups of W rows, one in each lane. Each tile goes through three steps:
//   measure   per tensor and row: the largest logits, Z = sum e^a and D = sum e^a (a - b), with a and b the teacher's
//             and the student's logits less their maxima. Two ways: `measure_row` runs along the classes of one row,
//             block by block, with a running maximum; `measure_columns`, for few classes, holds one row per lane.
//   weigh     a group at once: margins, teacher weights, KL = D / (tau Z) + log(Z_student / Z_teacher), loss, and what
//             each tensor's e^a is multiplied by in the gradient.
//   combine   the gradient, from the exponentials that `measure` kept, or from new ones where a row is too long.
#pragma once

#include <algorithm>
#include <cmath>

#include "core.h"
#include "exp.h"
#include "simd.h"

namespace {

using namespace amtss;

constexpr float infinity = __builtin_inff(), nan = __builtin_nanf("");

// Logits of a block are read again and again while they are in the first-level cache. A lane adds up half as many values
// as it has of a block in float; blocks are added up in double.
constexpr int64_t block = 128 * W;
// Up to this many classes a lane holds a row. Its sums are float, so that there may not be many more.
constexpr int64_t few_classes = 12 * W < 128 ? 12 * W : 128;

// A whole vector of a row, or its last elements.
struct Whole {};
struct Part {
    int n;
};
constexpr bool is_part(Whole) { return false; }
constexpr bool is_part(Part) { return true; }

inline vf load(const float* p, Whole, float) { return load(p); }
inline vf load(const float* p, Part part, float rest) { return load_first(p, part.n, rest); }
inline void store(float* p, vf v, Whole) { store(p, v); }
inline void store(float* p, vf v, Part part) { store_first(p, part.n, v); }

// f(i, Whole or Part) for the vectors of [0, n).
template <class F>
inline void sweep(int64_t n, F f) {
    int64_t i = 0;
    for (; i + W <= n; i += W) f(i, Whole{});
    if (i < n) f(i, Part{int(n - i)});
}

// f(accumulator, i, Whole or Part): two of them take turns, so that one is worked on while the other is awaited.
template <class Accumulator, class F>
inline void sweep_pairs(Accumulator& even, Accumulator& odd, int64_t n, F f) {
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        f(even, i, Whole{});
        f(odd, i + W, Whole{});
    }
    if (i + W <= n) {
        f(even, i, Whole{});
        i += W;
    }
    if (i < n) f(odd, i, Part{int(n - i)});
}

template <class... Arrays>
inline void clear(Arrays&... arrays) {
    (store(arrays, vf{}), ...);
}

// ---- reading logits

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    __builtin_memcpy(&y, &bits, sizeof y);
    return y;
}
inline float widen(f16 x) { return widen(vu16{} + x.bits)[0]; }

// A row of logits of one type. The scale is that of codes.
template <class T>
struct Row {
    const T* p;
    int64_t stride;
    float row_max, step;

    float operator[](int64_t i) const { return widen(p[i * stride]); }
};
template <>
inline float Row<uint8_t>::operator[](int64_t i) const {
    const uint8_t code = p[i * stride];
    return code == 255 ? -infinity : row_max - step * code;
}

// Vectors of logits that lie side by side.
inline vf load(const Row<float>& row, int64_t i, Whole) { return load(row.p + i); }
inline vf load(const Row<bf16>& row, int64_t i, Whole) { return widen_bf16(load_bits<vu16>(row.p + i)); }
inline vf load(const Row<f16>& row, int64_t i, Whole) { return widen(load_bits<vu16>(row.p + i)); }
inline vf load(const Row<uint8_t>& row, int64_t i, Whole) {
    const vi code = __builtin_convertvector(load_bits<vu8>(row.p + i), vi);
    return code == 255 ? set(-infinity) : row.row_max - row.step * __builtin_convertvector(code, vf);
}
inline vf load(const Row<float>& row, int64_t i, Part part) { return load_first(row.p + i, part.n, -infinity); }
template <class T>
inline vf load(const Row<T>& row, int64_t i, Part part) {
    float lane[W];
    for (int rest = 0; rest < W; rest++) lane[rest] = rest < part.n ? row[i + rest] : -infinity;
    return load(lane);
}

// f(row) with the row in its own type.
template <class F>
inline auto with_row(const Matrix& m, int64_t n, F f) {
    const int64_t offset = n * m.row_stride;
    switch (m.type) {
        case Type::f32: return f(Row<float>{(const float*)m.data + offset, m.column_stride, 0, 0});
        case Type::bf16: return f(Row<bf16>{(const bf16*)m.data + offset, m.column_stride, 0, 0});
        case Type::f16: return f(Row<f16>{(const f16*)m.data + offset, m.column_stride, 0, 0});
        default:
            return f(Row<uint8_t>{(const uint8_t*)m.data + offset, m.column_stride, m.row_max[n], m.step[n]});
    }
}

// Copies `count` logits of row n from `begin` as floats.
inline void copy(const Matrix& m, int64_t n, int64_t begin, int64_t count, float* to) {
    with_row(m, n, [&](auto row) {
        int64_t i = 0;
        if (row.stride == 1)
            for (; i + W <= count; i += W) store(to + i, load(row, begin + i, Whole{}));
        for (; i < count; i++) to[i] = row[begin + i];
    });
}

// `count` logits of row n from `begin` as floats that lie side by side: in place, or copied into `buffer`.
inline const float* read(const Matrix& m, int64_t n, int64_t begin, int64_t count, float* buffer) {
    if (m.type == Type::f32 && m.column_stride == 1) return (const float*)m.data + n * m.row_stride + begin;
    copy(m, n, begin, count, buffer);
    return buffer;
}

// f(row) with logits that lie side by side, the first of them that of row n at `begin`: in place, in their own type, or
// spread ones gathered in `buffer`.
template <class F>
inline auto with_block(const Matrix& m, int64_t n, int64_t begin, int64_t count, float* buffer, F f) {
    if (m.column_stride != 1) return f(Row<float>{read(m, n, begin, count, buffer), 1, 0, 0});
    return with_row(m, n, [&](auto row) {
        row.p += begin;
        return f(row);
    });
}

inline float read(const Matrix& m, int64_t n, int64_t c) {
    return with_row(m, n, [&](auto row) { return row[c]; });
}

// ---- one block of a row

// The two largest logits of a row.
struct Top {
    float first, second;
};

inline Top merge(Top a, Top b) {
    const float smaller = a.first < b.first ? a.first : b.first;
    const float second = a.second > b.second ? a.second : b.second;
    return {a.first > b.first ? a.first : b.first, smaller > second ? smaller : second};
}

// The largest logits of each lane: the largest, or the two largest.
struct Best {
    vf first = set(-infinity);

    void take(vf v) { first = max(first, v); }
    void take(const Best& other) { take(other.first); }
    Top top() const { return {largest_lane(first), -infinity}; }
};
struct BestTwo {
    vf first = set(-infinity), second = first;

    void take(vf v) {
        second = max(second, min(first, v));
        first = max(first, v);
    }
    void take(const BestTwo& other) {
        take(other.first);
        second = max(second, other.second);
    }
    Top top() const {
        float firsts[W], seconds[W];
        store(firsts, first);
        store(seconds, second);
        Top top = {-infinity, -infinity};
        for (int lane = 0; lane < W; lane++) top = merge(top, {firsts[lane], seconds[lane]});
        return top;
    }
};

template <class T>
inline float largest(const Row<T>& x, int64_t n) {
    Best even, odd;
    sweep_pairs(even, odd, n, [&](Best& best, int64_t i, auto part) { best.take(load(x, i, part)); });
    even.take(odd);
    return even.top().first;
}

// The bits of bfloat16, read as an integer with all but the sign flipped where that is set, are in the numbers' order, and
// twice as many of them as of floats fit a vector.
inline float largest(const Row<bf16>& x, int64_t n) {
    const auto order = [](vs16 bits) { return bits ^ ((bits >> 15) & 0x7fff); };
    vs16 best = vs16{} - 0x7f81;  // of -inf
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        const vs16 key = order(load_bits<vs16>(x.p + i));
        best = key > best ? key : best;
    }
    best = order(best);
    float found = -infinity;
    for (int lane = 0; lane < 2 * W; lane++) {
        const float v = widen(bf16{uint16_t(best[lane])});
        found = v > found ? v : found;
    }
    for (; i < n; i++) found = x[i] > found ? x[i] : found;
    return found;
}

// Logits that are needed next: they are fetched while the current ones are worked on.
struct Ahead {
    const char* p;
    int size;

    void fetch(int64_t i) const { __builtin_prefetch(p + i * size); }
};

// What has been added up of a block, and its largest logits: of only one, the second is -inf.
struct Sums {
    float z, d;
    Top top;
};

template <class Maxima>
struct Lanes {
    vf z = {}, d = {};
    Maxima best;
};

template <class Maxima>
inline Sums add_up(const Lanes<Maxima>& even, const Lanes<Maxima>& odd) {
    Maxima best = even.best;
    best.take(odd.best);
    return {sum(even.z + odd.z), sum(even.d + odd.d), best.top()};
}

// a = x - origin, y = e^(a / tau). `a` may be the memory of x, where the origin is 0.
template <class Maxima, class T>
[[gnu::flatten]] inline Sums exp_block(Row<T> x, float* a, float* y, int64_t n, float origin, Exponent e, Ahead ahead) {
    Lanes<Maxima> even, odd;
    sweep_pairs(even, odd, n, [&](Lanes<Maxima>& sums, int64_t i, auto part) {
        ahead.fetch(i);
        const vf logit = load(x, i, part), shifted = logit - origin;
        const vf v = exp(shifted, e);
        sums.z += v;
        sums.best.take(logit);
        store(a + i, shifted, part);
        store(y + i, v, part);
    });
    return add_up(even, odd);
}

// The same for a teacher, with D against the student's logits less their origin, b. `masked`: 0 log 0 = 0, also where the
// student's logit is -inf; otherwise d is NaN there, and the same bits where there are none.
template <bool masked, class Maxima, class T>
[[gnu::flatten]] inline Sums divergence_block(Row<T> x, const float* b, float* y, int64_t n, float origin, Exponent e, Ahead ahead) {
    Lanes<Maxima> even, odd;
    sweep_pairs(even, odd, n, [&](Lanes<Maxima>& sums, int64_t i, auto part) {
        ahead.fetch(i);
        const vf logit = load(x, i, part), a = logit - origin;
        const vf v = exp(a, e);
        vf difference = a - load(b + i, part, 0);
        // Lanes behind the last one hold -inf.
        if (masked || is_part(part)) difference = v != 0 ? difference : vf{};
        sums.z += v;
        sums.d = fma(v, difference, sums.d);
        sums.best.take(logit);
        store(y + i, v, part);
    });
    return add_up(even, odd);
}

// The exponentials of a block: kept ones, or new ones from the logits.
struct Kept {
    const float* e;

    template <class Size>
    vf operator()(int64_t i, Size part) const {
        return load(e + i, part, 0);
    }
};
template <class T>
struct Recomputed {
    Row<T> x;
    float origin;
    Exponent exponent;
    Ahead ahead;

    template <class Size>
    vf operator()(int64_t i, Size part) const {
        ahead.fetch(i);
        return exp(load(x, i, part) - origin, exponent);
    }
};

// What a gradient is made of: a factor times the exponentials of a block.
template <class Source>
struct Term {
    Source e;
    float factor;
};

template <class T>
inline Term<Recomputed<T>> recomputed(Row<T> x, float origin, Exponent e, Ahead ahead, float factor) {
    return {{x, origin, e, ahead}, factor};
}

// g = the sum of the terms, or g + their sum.
template <class... Sources>
inline void add_block(float* g, int64_t n, bool first, Term<Sources>... terms) {
    sweep(n, [=](int64_t i, auto part) {
        vf v = first ? vf{} : load(g + i, part, 0);
        ((v = fma(set(terms.factor), terms.e(i, part), v)), ...);
        store(g + i, v, part);
    });
}

// Where a gradient is written: to memory, or past the cache, for which vectors begin at multiples of their size.
struct Stored {
    float* to;

    template <class F>
    void sweep(int64_t n, F f) const {
        ::sweep(n, f);
    }
    template <class Size>
    void operator()(int64_t i, vf v, Size part) const {
        store(to + i, v, part);
    }
};
struct Streamed {
    float* to;

    template <class F>
    void sweep(int64_t n, F f) const {
        const int64_t before = std::min<int64_t>(-((uintptr_t)to / sizeof(float)) % W, n);
        if (before) f(0, Part{int(before)});
        ::sweep(n - before, [=](int64_t i, auto part) { f(before + i, part); });
    }
    void operator()(int64_t i, vf v, Whole) const { stream(to + i, v); }
    void operator()(int64_t i, vf v, Part part) const { store(to + i, v, part); }
};

// As bfloat16, whole vectors at a time: there has to be room behind the last one.
struct Narrowed {
    uint16_t* to;

    template <class F>
    void sweep(int64_t n, F f) const {
        ::sweep(n, f);
    }
    template <class Size>
    void operator()(int64_t i, vf v, Size) const {
        const vu16 narrow = narrow_bf16(v);
        __builtin_memcpy(to + i, &narrow, sizeof narrow);
    }
};

// out = own - (g + the sum of the terms), or without g. The product is rounded like that of a first term: where the student
// equals its teacher, this is 0.
template <class Out, class Source, class... Sources>
inline void finish_block(Out out, const float* g, int64_t n, bool first, Term<Source> own, Term<Sources>... terms) {
    out.sweep(n, [=](int64_t i, auto part) {
        vf v = first ? vf{} : load(g + i, part, 0);
        ((v = fma(set(terms.factor), terms.e(i, part), v)), ...);
        out(i, own.factor * own.e(i, part) - v, part);
    });
}

// Copies to a gradient. Streaming writes go around the cache.
inline void copy_out(const void* source, void* target, int64_t bytes, bool streaming) {
    const char* const from = (const char*)source;
    char* const to = (char*)target;
    int64_t done = streaming ? -(uintptr_t)to % sizeof(vf) : 0;
    if (done > bytes) done = bytes;
    __builtin_memcpy(to, from, done);
    for (; done + int64_t(sizeof(vf)) <= bytes; done += sizeof(vf)) {
        const vf v = load((const float*)(from + done));
        if (streaming)
            stream((float*)(to + done), v);
        else
            store((float*)(to + done), v);
    }
    __builtin_memcpy(to + done, from + done, bytes - done);
}

// Writes n gradients in their own type, those of bfloat16 by way of `narrow`.
inline void write_block(const float* g, void* out, Type type, int64_t n, bool streaming, uint16_t* narrow) {
    if (type == Type::f32) return copy_out(g, out, n * 4, streaming);
    for (int64_t i = 0; i < n; i += W) Narrowed{narrow}(i, load(g + i), Whole{});
    copy_out(narrow, out, n * 2, streaming);
}

inline float sum_block(const float* x, int64_t n) {
    vf even = {}, odd = {};
    sweep_pairs(even, odd, n, [&](vf& total, int64_t i, auto part) { total += load(x + i, part, 0); });
    return sum(even + odd);
}

// ---- what is known of the rows of a group: one lane each

// Sums of one row so far; the exponentials in them are those of logits less `origin`.
struct Running {
    Top top = {-infinity, -infinity};
    float origin = 0;  // a maximum so far, or 0 while that is -inf
    double z = 0, d = 0;

    // Moves the origin to the maximum so far; the student's has moved by `student_shift`. Returns own shift.
    double rebase(double student_shift, const Exponent& e) {
        const float moved = top.first == -infinity ? 0 : top.first;
        const double shift = double(origin) - moved;
        origin = moved;
        if (z != 0 && (shift != 0 || student_shift != 0)) {
            const double factor = exp(float(shift), e);
            d = factor == 0 ? 0 : factor * (d + (shift - student_shift) * z);
            z *= factor;
        }
        return shift;
    }
};

struct alignas(64) Measured {
    float z[W];       // sum of e^a
    float d[W];       // of a teacher: D / tau
    // e^a of the label (of rows without one: the largest, 1) and the largest of the others; for Weighting::label_nll
    // the label's a / tau and nothing.
    float label[W], other[W];
    float alpha[W];   // of a teacher: prior, 0 where it does not teach the row
    float margin[W], weight[W];
    float factor[W];  // of e^a in the gradient; 0 leaves the tensor out
};

// The cross entropy, at temperature 1, and what belongs to the row as a whole.
struct alignas(64) Rows {
    int32_t label[W];             // -1: none
    int32_t margin_label[W];      // the label that stands in the margins; -1: the largest logit's
    float counts[W];              // 0: dropped
    float weight[W];              // of the row in the loss; 0 if dropped
    float student[W];             // 0: the student's logits are not looked at
    float cross[W];               // 0: no cross entropy
    float z[W], at_label[W], sum[W];  // of the student's logits less their maximum
    float factor[W];              // of e^(s - maximum) in the gradient
    float everywhere[W], one_hot[W];  // what the gradient loses at each class, at the label
};

// How a problem is laid out in the scratch of a thread.
struct Plan {
    bool columns;      // few classes: one row per lane
    bool apart;        // the cross entropy needs exponentials of its own
    bool keep;         // the exponentials of a tile are kept for its gradient
    int tile;          // rows
    int groups;        // of a tile
    int64_t tensors;   // the student and the teachers
    int64_t lanes;     // of a column in scratch, in floats
    int64_t width;     // of a row in scratch, in floats
    int64_t span;      // of a block, in classes
    int64_t blocks;    // of a row, and one more

    explicit Plan(const Problem& p) {
        tensors = 1 + p.teachers;
        apart = p.ce_weight > 0 && p.temperature != 1;
        const int64_t group_bytes = sizeof(Rows) + tensors * sizeof(Measured);
        const int64_t free = scratch_bytes - tensors * sizeof(Running) - 4 * block * sizeof(float) - 1024;
        width = (p.classes + W - 1) / W * W;
        // All blocks of a row are about as long, so that as much of the next one is fetched as there is of it.
        const int64_t least = (p.classes + block - 1) / block;
        span = ((p.classes + least - 1) / least + 2 * W - 1) / (2 * W) * (2 * W);
        blocks = (p.classes + span - 1) / span + 1;
        const int64_t row_bytes = (tensors + apart) * (width + blocks) * sizeof(float);
        keep = p.gradient && row_bytes <= free - group_bytes;
        // Several groups hide each other's latencies, as long as their columns stay in the first-level cache.
        for (groups = 4; groups >= 1; groups /= 2) {
            lanes = tile = groups * W;
            const int64_t column_bytes = ((tensors + 2) * p.classes + flat_columns(p)) * lanes * sizeof(float);
            columns = p.classes <= few_classes && groups * group_bytes + column_bytes <= (groups > 1 ? 32 * 1024 : free);
            if (columns) return;
        }
        groups = 1;
        if (p.gradient) tile = !keep ? 1 : (free - group_bytes) / row_bytes < W ? int((free - group_bytes) / row_bytes) : W;
    }

    // The rows of a tile with their classes side by side take as much room as this many columns.
    static int64_t flat_columns(const Problem& p) { return (p.classes + 3) / 4 * 4 + 1; }
};

struct Worker {
    const Problem& p;
    const Plan plan;
    const Exponent soft, sharp;  // at the temperature, at 1
    const float inverse_tau;
    const float slack;  // how far above its origin a logit may lie: its exponential is 2^8 at most

    int64_t begin;  // of the tile
    int rows;       // of the tile
    vd loss = {};   // of the rows so far
    Rows* row;          // [groups]
    Measured* tensor;   // [groups, tensors]
    Running* running;   // [tensors]
    float *student, *teacher, *gradient, *fresh;  // [block] each
    float* kept;     // [tile, tensors + apart, width]; of columns: [tensors + 2, classes, lanes]
    float* flat;     // of columns: [lanes, classes], the rows of one tensor
    float* origins;  // [tile, tensors + apart, blocks]: what was subtracted from the logits of a kept block

    Worker(const Problem& problem, char* memory)
        : p(problem), plan(problem), soft(p.temperature), sharp(1), inverse_tau(float(1 / p.temperature)),
          slack(8 / std::max(soft.hi, plan.apart ? sharp.hi : 0.0f)) {
        const auto take = [&](int64_t bytes) {
            char* taken = memory;
            memory += (bytes + 63) / 64 * 64;
            return taken;
        };
        row = (Rows*)take(plan.groups * sizeof(Rows));
        tensor = (Measured*)take(plan.groups * plan.tensors * sizeof(Measured));
        running = (Running*)take(plan.tensors * sizeof(Running));
        student = (float*)take(block * sizeof(float));
        teacher = (float*)take(block * sizeof(float));
        gradient = (float*)take(block * sizeof(float));
        fresh = (float*)take(block * sizeof(float));
        origins = (float*)take(plan.keep ? plan.tile * (plan.tensors + plan.apart) * plan.blocks * sizeof(float) : 0);
        kept = (float*)memory;
        flat = kept + (plan.tensors + 2) * p.classes * plan.lanes;
    }

    const Matrix& matrix(int64_t j) const { return j == 0 ? p.student : p.teacher[j - 1]; }
    float* kept_row(int lane, int64_t j) const { return kept + (lane * (plan.tensors + plan.apart) + j) * plan.width; }
    float* kept_origins(int lane, int64_t j) const {
        return origins + (lane * (plan.tensors + plan.apart) + j) * plan.blocks;
    }
    // To which the exponentials of all blocks are moved in the end.
    float& last_origin(int lane, int64_t j) const { return kept_origins(lane, j)[plan.blocks - 1]; }
    int64_t block_end(int64_t from) const { return std::min(from + plan.span, p.classes); }

    // The block that begins at column c of row n, or where row n + 1 begins.
    Ahead ahead(int64_t j, int64_t n, int64_t c) const {
        const Matrix& m = matrix(j);
        const int size = m.type == Type::f32 ? 4 : m.type == Type::codes ? 1 : 2;
        if (c == p.classes) c = 0, n += n + 1 < p.rows;
        return {(const char*)m.data + (n * m.row_stride + c * m.column_stride) * size, size};
    }

    // The rows of a group that there are.
    int group_rows(int g) const {
        const int left = rows - g * W;
        return left < 0 ? 0 : left < W ? left : W;
    }

    void open(int g);
    void measure_row(int lane);
    void close_rows();
    void read_columns(const Matrix& m, float* columns) const;
    void measure_columns(int64_t j, int g);
    void weigh(int g);
    void combine_row(int lane);
    void combine_columns(int g);
    void run_tile(int64_t first);
};

// Which rows count, which teachers teach them, and what has to be looked at.
void Worker::open(int g) {
    const int64_t first = begin + g * W;
    const int rows = group_rows(g);
    Rows& row = this->row[g];
    Measured* const tensor = this->tensor + g * plan.tensors;
    const bool stats = p.student_margin;
    const vi none = {};
    const vf one = set(1), zero = {};
    // Plain loops over the lanes, without a branch inside: the compiler makes vectors of them where all rows are there.
    const auto each_row = [&](auto f) {
        if (rows == W)
            for (int lane = 0; lane < W; lane++) f(lane);
        else
            for (int lane = 0; lane < rows; lane++) f(lane);
    };
    clear(row.counts);
    for (int lane = rows; lane < W; lane++) row.label[lane] = -1;
    if (p.labels) {
        const int64_t *const labels = p.labels + first, ignored = p.ignore_index, unlabeled = p.unlabeled_index;
        each_row([&](int lane) {
            const int64_t label = labels[lane];
            row.label[lane] = (label == unlabeled) | (label == ignored) ? -1 : int32_t(label);
            row.counts[lane] = label == ignored ? 0 : 1;
        });
    } else {
        each_row([&](int lane) { row.label[lane] = -1, row.counts[lane] = 1; });
    }
    const vi label = load_bits<vi>(row.label);
    const vf counts = load(row.counts);
    vf weight = counts;
    if (p.sample_weight) weight *= rows == W ? load(p.sample_weight + first) : load_first(p.sample_weight + first, rows, 0);
    const vi alive = weight > 0;
    const vf cross = (label >= 0) & alive & (none - (p.ce_weight > 0)) ? one : zero;
    const vf reads_teachers = stats ? counts : alive & (none - (p.kd_weight > 0)) ? one : zero;
    vf reads_student = stats ? counts : cross;
    store(row.weight, weight);
    store(row.cross, cross);
    const vi margin_label = p.weighting == Weighting::top2_margin ? none - 1 : label;
    __builtin_memcpy(row.margin_label, &margin_label, sizeof margin_label);
    for (int64_t k = 0; k < p.teachers; k++) {
        Measured& t = tensor[1 + k];
        vf alpha = one;
        if (p.prior) {
            const float* const prior = p.prior + (p.prior_per_row ? k * p.rows + first : k);
            alpha = !p.prior_per_row ? set(*prior) : rows == W ? load(prior) : load_first(prior, rows, 0);
        }
        store(t.alpha, alpha * reads_teachers);
        if (p.mask) each_row([&, mask = p.mask + k * p.rows + first](int lane) { t.alpha[lane] = mask[lane] ? t.alpha[lane] : 0; });
        reads_student = load(t.alpha) > 0 ? one : reads_student;
    }
    store(row.student, reads_student);
    if (plan.columns) return;
    // What `measure_row` passes over is harmless: e^0 alone.
    for (int64_t j = 0; j < plan.tensors; j++) {
        store(tensor[j].z, one);
        clear(tensor[j].d, tensor[j].label, tensor[j].other);
    }
    store(row.z, one);
    clear(row.at_label, row.sum);
}

void Worker::measure_row(int lane) {
    const int64_t n = begin + lane;
    Rows& row = *this->row;
    if (row.student[lane] == 0) return;
    for (int64_t j = 0; j < plan.tensors; j++) running[j] = {};
    const bool cross = row.cross[lane] != 0;
    const int64_t label = row.margin_label[lane];
    double cross_z = 0, cross_sum = 0;
    Running& s = running[0];
    for (int64_t from = 0, b = 0, end; from < p.classes; from = end, b++) {
        end = block_end(from);
        const int64_t count = end - from;
        // The second largest logit is asked for only beside the label, or where there is none.
        const bool two = label < end && (label >= from || label < 0);
        // What f(best, origin) adds up of the block x. The origin is a maximum of earlier blocks as long as no logit lies far
        // above it, so that only the first block has to be read for its maximum beforehand.
        const auto measure = [&](Running& t, const auto& x, auto f) {
            const auto add_up = [&] { return two ? f(BestTwo{}, t.origin) : f(Best{}, t.origin); };
            if (t.top.first == -infinity) {
                t.top.first = largest(x, count);
                t.rebase(0, soft);
                t.top.first = -infinity;
            }
            Sums sums = add_up();
            t.top = merge(t.top, sums.top);
            if (sums.top.first - t.origin > slack || std::fabs(sums.d) == infinity) {
                t.rebase(0, soft);
                sums = add_up();
            }
            return sums;
        };
        const auto exponentials = [&](int64_t j, float origin) -> float* {
            if (!plan.keep) return fresh;
            kept_origins(lane, j)[b] = origin;
            return kept_row(lane, j) + from;
        };
        const float before = s.origin;
        s.z += with_block(p.student, n, from, count, teacher, [&](const auto& x) {
            return measure(s, x, [&](auto best, float origin) {
                return exp_block<decltype(best)>(x, student, exponentials(0, origin), count, origin, soft, ahead(0, n, end));
            });
        }).z;
        const double student_shift = double(before) - s.origin;
        if (cross) {
            if (cross_z != 0) cross_z *= exp(float(student_shift), sharp);
            cross_sum += student_shift * from + sum_block(student, count);
            if (plan.apart)
                cross_z += exp_block<Best>(Row<float>{student, 1, 0, 0}, student, exponentials(plan.tensors, s.origin), count, 0,
                                     sharp, ahead(0, n, end)).z;
        }
        for (int64_t j = 1; j < plan.tensors; j++) {
            if (tensor[j].alpha[lane] == 0) continue;
            Running& t = running[j];
            if (student_shift != 0) t.rebase(student_shift, soft);
            const Sums sums = with_block(matrix(j), n, from, count, teacher, [&](const auto& x) {
                return measure(t, x, [&](auto best, float origin) {
                    float* const e = exponentials(j, origin);
                    const Ahead next = ahead(j, n, end);
                    using Of = decltype(best);
                    const Sums sums = divergence_block<false, Of>(x, student, e, count, origin, soft, next);
                    return sums.d == sums.d ? sums : divergence_block<true, Of>(x, student, e, count, origin, soft, next);
                });
            });
            t.z += sums.z;
            t.d += sums.d;
        }
    }
    // All is moved to the maximum of the whole row.
    const double student_shift = s.rebase(0, soft);
    if (cross) {
        cross_z *= exp(float(student_shift), sharp);
        cross_sum += student_shift * p.classes;
    }
    for (int64_t j = 1; j < plan.tensors; j++) running[j].rebase(student_shift, soft);
    if (plan.keep) {
        for (int64_t j = 0; j < plan.tensors; j++) last_origin(lane, j) = running[j].origin;
        if (plan.apart) last_origin(lane, plan.tensors) = s.origin;
    }
    for (int64_t j = 0; j < plan.tensors; j++) {
        if (j > 0 && tensor[j].alpha[lane] == 0) continue;
        const Running& t = running[j];
        tensor[j].z[lane] = t.top.first == -infinity ? nan : float(t.z);
        tensor[j].d[lane] = float(t.d / p.temperature);
        const float at_label = label < 0 ? t.top.first : read(matrix(j), n, label);
        tensor[j].label[lane] = at_label - t.top.first;
        tensor[j].other[lane] = (at_label >= t.top.first ? t.top.second : t.top.first) - t.top.first;
    }
    if (cross) {
        row.z[lane] = plan.apart ? float(cross_z) : tensor[0].z[lane];
        row.sum[lane] = float(cross_sum);
        row.at_label[lane] = read(p.student, n, row.label[lane]) - s.top.first;
    }
}

// What `measure_row` has left as logits less their maximum.
void Worker::close_rows() {
    for (int64_t j = 0; j < plan.tensors; j++) {
        Measured& t = tensor[j];
        const vf label = load(t.label);
        if (p.weighting == Weighting::label_nll) {
            store(t.label, label * inverse_tau);
        } else {
            store(t.label, exp(label, soft));
            store(t.other, exp(load(t.other), soft));
        }
    }
}

// Logits of the tile with the rows across the lanes, [classes, lanes]. What stands in the lanes beyond the last row means
// nothing.
void Worker::read_columns(const Matrix& m, float* columns) const {
    const int64_t classes = p.classes, lanes = plan.lanes;
    const float* x = (const float*)m.data + begin * m.row_stride;
    int64_t stride = m.row_stride;
    // Four classes are read at a time: with fewer, and at the end of the logits, others lie behind them.
    const bool in_place = m.type == Type::f32 && m.column_stride == 1 && begin + lanes <= p.rows &&
                          (classes >= 4 || (begin + lanes < p.rows && stride >= classes));
    if (!in_place) {
        x = flat;
        if (m.type != Type::codes && m.column_stride == 1 && stride == classes) {
            copy(m, begin, 0, rows * classes, flat);
        } else {
            stride = (classes + 3) / 4 * 4;
            for (int lane = 0; lane < rows; lane++) copy(m, begin + lane, 0, classes, flat + lane * stride);
        }
    }
    for (int64_t c = 0; c < classes; c += 4) {
        if (c + 4 > classes && classes >= 4) c = classes - 4;
        float* const out = columns + c * lanes;
        for (int64_t lane = 0; lane < lanes; lane += W) {
            vf column[4];
            load_columns(x + lane * stride + c, stride, column);
            store(out + lane, column[0]);
            store(out + lanes + lane, column[1]);
            if (c + 2 < classes) store(out + 2 * lanes + lane, column[2]);
            if (c + 3 < classes) store(out + 3 * lanes + lane, column[3]);
        }
    }
}

// Leaves the exponentials of tensor j in place of its logits.
void Worker::measure_columns(int64_t j, int g) {
    const int64_t lanes = plan.lanes, size = p.classes * lanes, end = size + g * W;
    float* const x = kept + j * size;
    // The student's logits less their maximum come after the exponentials of all.
    float* const student_a = kept + plan.tensors * size;
    float* const sharp_e = student_a + size;
    Rows& row = this->row[g];
    Measured& t = tensor[g * plan.tensors + j];
    const vi used = load(j == 0 ? row.student : t.alpha) > 0;
    const vi label = load_bits<vi>(row.margin_label), cross_label = load_bits<vi>(row.label);
    const bool nll = p.weighting == Weighting::label_nll;
    const vf none = {}, one = set(1);
    vf maximum = set(-infinity);
    for (int64_t i = g * W; i < end; i += lanes) maximum = max(maximum, load(x + i));
    vf z = none, d = none, sharp_z = none, total = none, at_cross_label = none;
    vf at_label = nll ? none : one;
    BestTwo best;
    vi c = {};
    for (int64_t i = g * W; i < end; i += lanes, c += 1) {
        const vf a = used ? load(x + i) - maximum : none, e = exp(a, soft);
        z += e;
        store(x + i, e);
        best.take(e);
        at_label = label == c ? (nll ? a : e) : at_label;
        if (j > 0) {
            const vf difference = a - load(student_a + i);
            d = fma(e, e != 0 ? difference : none, d);
            continue;
        }
        store(student_a + i, a);
        if (p.ce_weight == 0) continue;
        total += a;
        at_cross_label = cross_label == c ? a : at_cross_label;
        if (!plan.apart) continue;
        const vf sharp_v = exp(a, sharp);
        sharp_z += sharp_v;
        store(sharp_e + i, sharp_v);
    }
    store(t.label, nll ? at_label * inverse_tau : at_label);
    store(t.other, at_label >= 1 ? best.second : one);
    store(t.z, z);
    store(t.d, d * inverse_tau);
    if (j > 0) return;
    store(row.z, plan.apart ? sharp_z : z);
    store(row.sum, total);
    store(row.at_label, at_cross_label);
}

// Margins, weights, divergences and what follows from them.
void Worker::weigh(int g) {
    const vf none = {};
    const int64_t first = begin + g * W;
    const int rows = group_rows(g);
    Rows& row = this->row[g];
    Measured* const tensor = this->tensor + g * plan.tensors;
    const vf counts = load(row.counts), weight = load(row.weight), cross = load(row.cross);
    const auto write = [&](float* out, vf v) { rows == W ? store(out, v, Whole{}) : store(out, v, Part{rows}); };
    const auto margin = [&](const Measured& t) -> vf {
        if (p.weighting == Weighting::label_nll) return load(t.label) - log(load(t.z));
        return (load(t.label) - load(t.other)) / load(t.z);
    };

    vf best = set(-infinity);
    vi chosen = {};  // 0: no teacher yet
    for (int64_t j = 1; j < plan.tensors; j++) {
        const vf m = margin(tensor[j]);
        store(tensor[j].margin, m);
        // The first of equal ones; NaN, once met, stays.
        const vi first = chosen == 0, larger = m > best, new_nan = (m != m) & (best == best);
        const vi better = (load(tensor[j].alpha) > 0) & (first | larger | new_nan);
        best = better ? m : best;
        chosen = better ? vi{} + int(j) : chosen;
    }

    const float beta = float(p.weight_temperature < 1e-30 ? 1e-30 : p.weight_temperature);
    vf total = none;
    for (int64_t j = 1; j < plan.tensors; j++) {
        const vf m = load(tensor[j].margin), alpha = load(tensor[j].alpha);
        vf mass = alpha;
        if (p.weight_temperature == 0)
            mass = chosen == int(j) ? set(1) : none;
        else if (beta != infinity)
            mass = alpha * exp(m == best ? none : (m - best) / beta, sharp);
        mass = alpha > 0 ? mass : none;
        total += mass;
        store(tensor[j].weight, mass);
    }

    const vf scale = weight * p.gradient_scale, taught_scale = scale * (p.kd_weight * float(p.temperature));
    const vf student_z = load(tensor[0].z), inverse_total = 1 / total;
    const vi distils = vi{} - (p.kd_weight > 0);
    vf divergence = none;
    for (int64_t j = 1; j < plan.tensors; j++) {
        Measured& t = tensor[j];
        const vi teaches = load(t.alpha) > 0;
        const vf z = load(t.z), inverse_z = 1 / z, w = teaches ? load(t.weight) * inverse_total : none;
        const vf kl = load(t.d) * inverse_z + log(student_z / z);
        divergence += w != 0 ? w * kl : none;
        store(t.factor, (w != 0) & distils ? taught_scale * w * inverse_z : none);
        if (p.student_margin) {
            const int64_t at = (j - 1) * p.rows + first;
            write(p.weights + at, w);
            write(p.margins + at, teaches ? load(t.margin) : none);
            write(p.kd + at, teaches ? kl : none);
        }
    }
    if (p.student_margin) write(p.student_margin + first, counts != 0 ? margin(tensor[0]) : none);

    vf row_loss = none;
    store(tensor[0].factor, none);
    if (p.kd_weight > 0) {
        row_loss = p.kd_weight * float(p.temperature * p.temperature) * divergence;
        store(tensor[0].factor, chosen != 0 ? taught_scale * (1 / student_z) : none);
    }
    if (p.ce_weight > 0) {
        const float smoothed = p.label_smoothing / float(p.classes);
        vf ce = log(load(row.z)) - (1 - p.label_smoothing) * load(row.at_label);
        if (smoothed > 0) ce -= smoothed * load(row.sum);
        row_loss += cross != 0 ? p.ce_weight * ce : none;
        const vf ce_scale = cross != 0 ? scale * p.ce_weight : none;
        const vf factor = cross != 0 ? ce_scale / load(row.z) : none;
        store(row.factor, plan.apart ? factor : none);
        if (!plan.apart) store(tensor[0].factor, load(tensor[0].factor) + factor);
        store(row.everywhere, ce_scale * smoothed);
        store(row.one_hot, ce_scale * (1 - p.label_smoothing));
    }
    row_loss = weight > 0 ? weight * row_loss : none;
    if (p.row_loss) write(p.row_loss + first, row_loss);
    loss += __builtin_convertvector(row_loss, vd);
}

void Worker::combine_row(int lane) {
    const Rows& row = *this->row;
    const int64_t n = begin + lane, size = p.gradient_type == Type::f32 ? 4 : 2;
    char* const out = (char*)p.gradient + n * p.classes * size;
    if (!(row.weight[lane] > 0)) {
        __builtin_memset(out, 0, p.classes * size);
        return;
    }
    for (int64_t from = 0, b = 0, end; from < p.classes; from = end, b++) {
        end = block_end(from);
        const int64_t count = end - from;
        // Kept exponentials of slot j, moved to the row's last origin.
        const auto kept_term = [&](int64_t j, float factor, const Exponent& exponent) -> Term<Kept> {
            const float shift = kept_origins(lane, j)[b] - last_origin(lane, j);
            return {{kept_row(lane, j) + from}, shift == 0 ? factor : factor * exp(shift, exponent)};
        };
        // f(term) with the exponentials of slot j, which are those of matrix(source).
        const auto with_term = [&](int64_t j, int64_t source, float factor, const Exponent& exponent, auto f) {
            if (plan.keep) return f(kept_term(j, factor, exponent));
            with_block(matrix(source), n, from, count, teacher, [&](const auto& x) {
                f(recomputed(x, running[source].origin, exponent, ahead(source, n, end), factor));
            });
        };
        // Kept terms are added four at a time: what has been added up is read and written less often.
        Term<Kept> waiting[4];
        int terms = 0;
        bool empty = true;
        const auto with_waiting = [&](auto f) {
            switch (terms) {
                case 0: return f();
                case 1: return f(waiting[0]);
                case 2: return f(waiting[0], waiting[1]);
                case 3: return f(waiting[0], waiting[1], waiting[2]);
                default: return f(waiting[0], waiting[1], waiting[2], waiting[3]);
            }
        };
        for (int64_t j = 1; j < plan.tensors; j++) {
            const float factor = tensor[j].factor[lane];
            if (factor == 0) continue;
            if (!plan.keep) {
                with_term(j, j, factor, soft, [&](auto term) { add_block(gradient, count, empty, term); });
                empty = false;
                continue;
            }
            if (terms == 4) {
                with_waiting([&](auto... terms) { add_block(gradient, count, empty, terms...); });
                empty = false;
                terms = 0;
            }
            waiting[terms++] = kept_term(j, factor, soft);
        }
        // What no cross entropy changes afterwards goes straight to its place.
        char* const to = out + from * size;
        const bool cross = row.cross[lane] != 0;
        const float own = tensor[0].factor[lane];
        const auto finish = [&](auto out) {
            with_term(0, 0, own, soft, [&](auto own) {
                with_waiting([&](auto... terms) { finish_block(out, gradient, count, empty, own, terms...); });
            });
        };
        if (own == 0) {
            // Then no teacher has a factor either.
            __builtin_memset(gradient, 0, count * sizeof(float));
        } else if (cross) {
            finish(Stored{gradient});
        } else if (p.gradient_type == Type::bf16) {
            finish(Narrowed{(uint16_t*)fresh});
            copy_out(fresh, to, count * 2, p.stream);
            continue;
        } else {
            p.stream ? finish(Streamed{(float*)to}) : finish(Stored{(float*)to});
            continue;
        }
        if (plan.apart && row.factor[lane] != 0)
            with_term(plan.tensors, 0, row.factor[lane], sharp, [&](auto term) { add_block(gradient, count, false, term); });
        if (cross) {
            const float everywhere = row.everywhere[lane];
            if (everywhere != 0)
                for (int64_t i = 0; i < count; i++) gradient[i] -= everywhere;
            const int64_t label = row.label[lane];
            if (label >= from && label < end) gradient[label - from] -= row.one_hot[lane];
        }
        write_block(gradient, to, p.gradient_type, count, p.stream, (uint16_t*)fresh);
    }
}

void Worker::combine_columns(int g) {
    const int64_t classes = p.classes, lanes = plan.lanes, size = classes * lanes;
    float* const student_a = kept + plan.tensors * size;
    float* const cross_e = student_a + size;
    const Rows& row = this->row[g];
    const Measured* const tensor = this->tensor + g * plan.tensors;
    const vf alive = load(row.weight), none = {};
    // A factor of 0 takes out what may be NaN.
    const auto exponentials = [&](const float* e, vf factor) -> vf { return factor != 0 ? load(e) : none; };
    for (int64_t c = 0, i = g * W; c < classes; c++, i += lanes) {
        vf mixture = none;
        for (int64_t j = 1; j < plan.tensors; j++) {
            const vf factor = load(tensor[j].factor);
            mixture = fma(factor, exponentials(kept + j * size + i, factor), mixture);
        }
        const vf factor = load(tensor[0].factor);
        vf v = factor * exponentials(kept + i, factor) - mixture;
        if (p.ce_weight > 0) {
            const vf sharp_factor = load(row.factor);
            if (plan.apart) v = fma(sharp_factor, exponentials(cross_e + i, sharp_factor), v);
            v -= load(row.everywhere);
            v -= load_bits<vi>(row.label) == int(c) ? load(row.one_hot) : none;
        }
        // The gradient takes the place of what is no longer needed.
        store(student_a + i, alive > 0 ? v : none);
    }
    // Rows are written in order: what reaches into the next one is overwritten.
    float* const out = flat + g * W * classes;
    for (int64_t c = 0; c < classes; c += 4) {
        if (c + 4 > classes && classes >= 4) c = classes - 4;
        const float* const column = student_a + c * lanes + g * W;
        store_columns(out + c, classes, load(column), load(column + lanes), c + 2 < classes ? load(column + 2 * lanes) : none,
                      c + 3 < classes ? load(column + 3 * lanes) : none);
    }
}

void Worker::run_tile(int64_t first) {
    begin = first;
    rows = p.rows - first < plan.tile ? int(p.rows - first) : plan.tile;
    const int groups = (rows + W - 1) / W;
    for (int g = 0; g < groups; g++) open(g);
    if (plan.columns) {
        for (int64_t j = 0; j < plan.tensors; j++) {
            read_columns(matrix(j), kept + j * p.classes * plan.lanes);
            for (int g = 0; g < groups; g++) measure_columns(j, g);
        }
    } else {
        for (int lane = 0; lane < rows; lane++) measure_row(lane);
        close_rows();
    }
    for (int g = 0; g < groups; g++) weigh(g);
    if (!p.gradient) return;
    if (plan.columns) {
        for (int g = 0; g < groups; g++) combine_columns(g);
        const int64_t size = p.gradient_type == Type::f32 ? 4 : 2;
        char* const out = (char*)p.gradient + first * p.classes * size;
        write_block(flat, out, p.gradient_type, rows * p.classes, false, (uint16_t*)fresh);
    } else {
        for (int lane = 0; lane < rows; lane++) combine_row(lane);
    }
}

int64_t tile_rows(const Problem& p) { return Plan(p).tile; }

double loss_rows(const Problem& p, int64_t begin, int64_t end, char* scratch) {
    Worker worker(p, scratch);
    for (int64_t n = begin; n < end; n += worker.plan.tile) worker.run_tile(n);
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
