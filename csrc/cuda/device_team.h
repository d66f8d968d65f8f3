// What a thread block's threads have in common in both kernels: each has its own registers, four lanes share a row.
#pragma once

#include "cuda/attention_sm80.h"

namespace avatar_rt::cuda {

template <class Tile>
struct DeviceTeam {
    using R = RegistersOf<Tile>;
    R registers;
    int thread;  // within the team

    template <class F>
    __device__ __forceinline__ void each(F&& f) {
        f(registers, thread);
    }
    template <class F>
    __device__ __forceinline__ void quad_max(F&& value) {
        float& x = value(registers);
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
    }
    template <class F>
    __device__ __forceinline__ void quad_sum(F&& value) {
        float& x = value(registers);
        x += __shfl_xor_sync(0xffffffff, x, 1);
        x += __shfl_xor_sync(0xffffffff, x, 2);
    }
};

}  // namespace avatar_rt::cuda
