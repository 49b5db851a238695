// Runs tasks on several threads. They are the threads of the OpenMP library in the process, which torch uses too, so
// that the two never compete for a core. Without OpenMP, and in a child of fork(), new threads are started for each
// call.
#pragma once

#include <cstdint>

namespace amtss {

// Calls task(context, i) for i in [0, tasks), on this thread and up to threads - 1 others; returns when all are done.
// Safe to call from several threads at once. What a task throws is thrown here, after all threads have ended.
void parallel_for(int64_t tasks, int threads, void (*task)(void* context, int64_t i), void* context);

}  // namespace amtss
