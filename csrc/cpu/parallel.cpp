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

// A thread looks for work, or for another's end, before it sleeps: longer than the gap between two kernels of one
// step, and far shorter than a time slice, so that a machine with other work loses next to nothing.
std::atomic<int64_t> linear_rows{Schedule{}.linear_rows}, norm_rows{Schedule{}.norm_rows}, spins{Schedule{}.spins};

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#endif
}

class Pool {
  public:
    explicit Pool(pid_t owner) : owner_(owner) {}
    pid_t owner() const { return owner_; }

    // False when another caller holds the pool.
    bool run(int64_t num_tasks, int helpers, const std::function<void(int64_t)>& body) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn) return false;
        bool asleep;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(threads_.size()) < helpers) {
                const int index = static_cast<int>(threads_.size());
                threads_.emplace_back([this, index, seen = round_.load()] { serve(index, seen); });
            }
            body_ = &body;
            num_tasks_ = num_tasks;
            next_.store(0, std::memory_order_relaxed);
            wanted_ = helpers;
            open_ = true;
            ++round_;
            asleep = sleepers_ > 0;
        }
        if (asleep) start_.notify_all();
        work();
        std::unique_lock<std::mutex> lock(mutex_);
        // A helper that has not come by now is not waited for: on a busy machine that would be a time slice.
        open_ = false;
        if (active_ == 0) return true;
        lock.unlock();
        for (int64_t i = spins; i > 0 && active_ != 0; --i) relax();
        lock.lock();
        done_.wait(lock, [this] { return active_ == 0; });
        return true;
    }

  private:
    void work() {
        for (int64_t task = next_.fetch_add(1); task < num_tasks_; task = next_.fetch_add(1)) (*body_)(task);
    }

    [[noreturn]] void serve(int index, uint64_t seen) {
        for (;;) {
            for (int64_t i = spins; i > 0 && round_ == seen; --i) relax();
            {
                std::unique_lock<std::mutex> lock(mutex_);
                ++sleepers_;
                start_.wait(lock, [&] { return round_ != seen; });
                --sleepers_;
                seen = round_;
                if (!open_ || index >= wanted_) continue;
                ++active_;
            }
            work();
            std::lock_guard<std::mutex> lock(mutex_);
            if (--active_ == 0) done_.notify_one();
        }
    }

    const pid_t owner_;
    std::mutex turn_, mutex_;
    std::condition_variable start_, done_;
    std::vector<std::thread> threads_;
    const std::function<void(int64_t)>* body_ = nullptr;
    int64_t num_tasks_ = 0;
    std::atomic<int64_t> next_{0};
    std::atomic<int> active_{0};
    std::atomic<uint64_t> round_{0};
    int wanted_ = 0, sleepers_ = 0;
    bool open_ = false;
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

Schedule schedule() {
    return {linear_rows, norm_rows, spins};
}

void set_schedule(const Schedule& wanted) {
    linear_rows = std::max<int64_t>(wanted.linear_rows, 1);
    norm_rows = std::max<int64_t>(wanted.norm_rows, 1);
    spins = std::max<int64_t>(wanted.spins, 0);
}

void parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& body) {
    const int helpers = static_cast<int>(std::min<int64_t>(num_threads, num_tasks)) - 1;
    if (helpers > 0 && pool().run(num_tasks, helpers, body)) return;
    for (int64_t task = 0; task < num_tasks; ++task) body(task);
}

}  // namespace avatar_rt::cpu
