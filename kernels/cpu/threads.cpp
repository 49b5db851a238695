#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

// The entry of GNU's and LLVM's OpenMP libraries. The symbol is weak: it is defined if torch has loaded one of them.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);

namespace amtss {
namespace {

struct Job {
    void (*task)(void*, int64_t);
    void* context;
    int64_t tasks;
    std::atomic<int64_t> next{0};

    void work() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(context, i);
    }
};

// A child of fork() does not have the threads of the OpenMP library.
std::atomic<bool> forked{false};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

void parallel_for(int64_t tasks, int threads, void (*task)(void*, int64_t), void* context) {
    threads = int(std::min<int64_t>(threads, tasks));
    Job job{task, context, tasks};
    if (threads < 2) return job.work();
    if (GOMP_parallel && !forked)
        return GOMP_parallel([](void* data) { static_cast<Job*>(data)->work(); }, &job, unsigned(threads), 0);
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back(&Job::work, &job);
    job.work();
    for (std::thread& other : others) other.join();
}

}  // namespace amtss
