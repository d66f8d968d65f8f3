#include "cpu/parallel.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace avatar_rt::cpu {
namespace {

class Pool {
  public:
    explicit Pool(pid_t owner) : owner_(owner) {}
    pid_t owner() const { return owner_; }

    // False when another caller holds the pool.
    bool run(int64_t num_tasks, int helpers, const std::function<void(int64_t)>& body) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn) return false;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(threads_.size()) < helpers) {
                const int index = static_cast<int>(threads_.size());
                threads_.emplace_back([this, index, seen = round_] { serve(index, seen); });
            }
            body_ = &body;
            num_tasks_ = num_tasks;
            next_.store(0, std::memory_order_relaxed);
            wanted_ = pending_ = helpers;
            ++round_;
        }
        start_.notify_all();
        work();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return pending_ == 0; });
        return true;
    }

  private:
    void work() {
        for (int64_t task = next_.fetch_add(1); task < num_tasks_; task = next_.fetch_add(1)) (*body_)(task);
    }

    [[noreturn]] void serve(int index, uint64_t seen) {
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                start_.wait(lock, [&] { return round_ != seen; });
                seen = round_;
                if (index >= wanted_) continue;
            }
            work();
            std::lock_guard<std::mutex> lock(mutex_);
            if (--pending_ == 0) done_.notify_one();
        }
    }

    const pid_t owner_;
    std::mutex turn_, mutex_;
    std::condition_variable start_, done_;
    std::vector<std::thread> threads_;
    const std::function<void(int64_t)>* body_ = nullptr;
    int64_t num_tasks_ = 0;
    std::atomic<int64_t> next_{0};
    int wanted_ = 0, pending_ = 0;
    uint64_t round_ = 0;
};

// The pool lives as long as the process: its threads are asleep at exit. A forked child has none of its parent's
// threads and starts a pool of its own.
Pool& pool() {
    static std::mutex mutex;
    static Pool* current = nullptr;
    std::lock_guard<std::mutex> lock(mutex);
    if (current == nullptr || current->owner() != getpid()) current = new Pool(getpid());
    return *current;
}

}  // namespace

void parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& body) {
    const int helpers = static_cast<int>(std::min<int64_t>(num_threads, num_tasks)) - 1;
    if (helpers > 0 && pool().run(num_tasks, helpers, body)) return;
    for (int64_t task = 0; task < num_tasks; ++task) body(task);
}

}  // namespace avatar_rt::cpu
