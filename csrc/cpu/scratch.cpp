#include "cpu/scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace avatar_rt::cpu {

void* scratch_of_thread(size_t bytes) {
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    thread_local std::unique_ptr<void, Free> memory;
    thread_local size_t size = 0;
    if (size < bytes) {
        memory.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
        size = memory ? bytes : 0;
        if (!memory) throw std::bad_alloc();
    }
    return memory.get();
}

}  // namespace avatar_rt::cpu
