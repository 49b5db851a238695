#include "encoder/int8.h"

#include <algorithm>
#include <vector>

#include "threads.h"

namespace amtss {

#if defined(__x86_64__)

bool int8_supported() {
    static const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                  __builtin_cpu_supports("avx512vnni");
    return supported;
}

void run(const Int8Linear& p, int threads) {
    if (p.rows == 0) return;
    // A small product ends before a second thread would start to work.
    if (threads < 1 || p.rows * p.inputs * p.outputs < 1 << 20) threads = 1;
    // Tiles have one size and each thread gets the same number of them, so that the threads end together.
    const int64_t round = threads * tile_rows(p), shares = threads * ((p.rows + round - 1) / round);
    struct Context {
        const Int8Linear& p;
        int64_t part;
    } context{p, (p.rows + shares - 1) / shares};
    parallel_for(
        (p.rows + context.part - 1) / context.part, threads,
        [](void* pointer, int64_t i) {
            thread_local std::vector<uint8_t> codes;
            const Context& c = *static_cast<const Context*>(pointer);
            codes.resize(std::max<size_t>(codes.size(), tile_rows(c.p) * (c.p.inputs + 64)));
            int8_rows_avx512(c.p, i * c.part, std::min(c.p.rows, (i + 1) * c.part), codes.data());
        },
        &context);
}

#else

bool int8_supported() { return false; }
void run(const Int8Linear&, int) {}

#endif

}  // namespace amtss
