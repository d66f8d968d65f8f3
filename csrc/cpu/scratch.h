// Memory of one thread, kept for its next call, so that kernels allocate nothing themselves.
#pragma once

#include <cstddef>

namespace avatar_rt::cpu {

// At least `bytes` bytes, 64-byte aligned, contents undefined. Valid until the thread's next call.
void* scratch_of_thread(size_t bytes);

}  // namespace avatar_rt::cpu
