#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

namespace amtss {
namespace {

struct Job {
    void (*task)(void*, int64_t);
    void* context;
    int64_t tasks;
    std::atomic<int64_t> next{0};
    int seats;       // for workers that may still join
    int helping = 0; // workers that have joined

    void work() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(context, i);
    }
};

struct Pool {
    std::mutex mutex;
    std::condition_variable posted, left;
    std::deque<Job*> jobs;  // with free seats
    int workers = 0;

    void serve() {
        std::unique_lock lock(mutex);
        for (;;) {
            posted.wait(lock, [&] { return !jobs.empty(); });
            Job& job = *jobs.front();
            job.helping++;
            if (--job.seats == 0) jobs.pop_front();
            lock.unlock();
            job.work();
            lock.lock();
            if (--job.helping == 0) left.notify_all();
        }
    }

    void run(Job& job) {
        const int helpers = job.seats;
        {
            std::lock_guard lock(mutex);
            for (; workers < helpers; workers++) std::thread(&Pool::serve, this).detach();
            jobs.push_back(&job);
        }
        for (int i = 0; i < helpers; i++) posted.notify_one();
        job.work();
        std::unique_lock lock(mutex);
        jobs.erase(std::remove(jobs.begin(), jobs.end(), &job), jobs.end());
        left.wait(lock, [&] { return job.helping == 0; });
    }
};

// Never freed: workers wait in it until the process ends.
Pool* pool = nullptr;

Pool& current_pool() {
    static const bool once = [] {
        pool = new Pool;
        // A child has none of its parent's workers, and the parent's lock may have been held: it starts afresh.
        pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
        return true;
    }();
    (void)once;
    return *pool;
}

}  // namespace

void parallel_for(int64_t tasks, int threads, void (*task)(void*, int64_t), void* context) {
    const int helpers = int(std::min<int64_t>(threads, tasks)) - 1;
    if (helpers < 1) {
        for (int64_t i = 0; i < tasks; i++) task(context, i);
        return;
    }
    Job job{task, context, tasks, {}, helpers};
    current_pool().run(job);
}

}  // namespace amtss
