// A small thread pool. Threads look for work for some microseconds and then sleep, so that they never fight another
// library's pool for the cores; a call waits for no thread that has not begun a task of it.
#pragma once

#include <cstdint>
#include <functional>

namespace avatar_rt::cpu {

// Call `body(task)` for every task in 0..num_tasks-1, on at most `num_threads` threads counting the caller's.
// Who runs which task is unspecified, so a body must write only what belongs to its task. A call that finds the
// pool busy with another caller's work runs in its own thread alone. Bodies must not throw.
void parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& body);

// How the work of the recorded kernels is cut and how long idle threads look for more: what bench.tune searches. No
// result depends on it.
struct Schedule {
    int64_t linear_rows = 48;  // rows of a product in one task: a multiple of 24, which every register tile divides
    int64_t norm_rows = 32;    // rows of a norm in one task
    int64_t spins = 400;       // looks for work before a thread sleeps
};

Schedule schedule();

// Takes effect at the next call of a kernel. Values below 1 (below 0: spins) are raised to it.
void set_schedule(const Schedule& wanted);

}  // namespace avatar_rt::cpu
