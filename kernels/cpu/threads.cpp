#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <limits>
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
    std::atomic<bool> failed{false};
    std::exception_ptr error{};  // of the first task that failed

    // An exception must not leave a thread: the process would end.
    void work() noexcept {
        try {
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(context, i);
        } catch (...) {
            if (!failed.exchange(true)) error = std::current_exception();
            // No task begins from here on. Half of the range is left to additions of threads that still ask.
            next = std::numeric_limits<int64_t>::max() / 2;
        }
    }

    // Adds threads up to `most`; fewer if the system has no more.
    void start(std::vector<std::thread>& others, int most) {
        try {
            others.reserve(std::max(0, most));
            while (int(others.size()) < most) others.emplace_back(&Job::work, this);
        } catch (const std::exception&) {
            // Any number of threads gives the same results.
        }
    }
};

// A child of fork() does not have the threads of the OpenMP library.
std::atomic<bool> forked{false};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

void parallel_for(int64_t tasks, int threads, void (*task)(void*, int64_t), void* context) {
    threads = int(std::min<int64_t>(threads, tasks));
    Job job{task, context, tasks};
    if (threads >= 2 && GOMP_parallel && !forked) {
        GOMP_parallel([](void* data) { static_cast<Job*>(data)->work(); }, &job, unsigned(threads), 0);
    } else {
        std::vector<std::thread> others;
        job.start(others, threads - 1);
        job.work();
        for (std::thread& other : others) other.join();
    }
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace amtss
