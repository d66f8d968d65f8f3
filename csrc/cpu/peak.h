// The ceiling of this machine's arithmetic: multiply-adds on registers alone, in one thread.
#pragma once

#include "cpu/attention.h"

namespace avatar_rt::cpu {

// GFLOP/s of this thread's own CPU time, measured over `seconds` of it, by the widest instructions that the kernels of
// best_isa() multiply `dtype` with.
double fma_peak(DType dtype, double seconds);

}  // namespace avatar_rt::cpu
