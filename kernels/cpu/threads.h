// Tasks shared out over threads: those of the OpenMP library in the process, which are torch's own and so never compete
// with it for a core; without one, and in a child after fork(), threads that live as long as the call.
#pragma once

#include <cstdint>

namespace amtss {

// task(context, i) for i in [0, tasks), on this thread and up to threads - 1 others; returns when all are done.
// Safe to call from several threads at once.
void parallel_for(int64_t tasks, int threads, void (*task)(void* context, int64_t i), void* context);

}  // namespace amtss
