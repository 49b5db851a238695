#include "encoder/attention.h"

#include <vector>

#include "threads.h"

namespace amtss {

#if defined(__x86_64__)

void run(const Attention& p, int threads) {
    // A small call ends before a second thread would start to work.
    if (p.batch * p.heads * p.queries * p.keys * p.width < 1 << 20) threads = 1;
    parallel_for(
        p.batch * p.heads, threads,
        [](void* pointer, int64_t i) {
            thread_local std::vector<float> scratch;
            const Attention& p = *static_cast<const Attention*>(pointer);
            if (int64_t(scratch.size()) < attention_scratch(p)) scratch.resize(attention_scratch(p));
            attend_avx512(p, i / p.heads, i % p.heads, scratch.data());
        },
        const_cast<Attention*>(&p));
}

#else

void run(const Attention&, int) {}

#endif

}  // namespace amtss
