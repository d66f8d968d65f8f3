// Thin wrappers of the instructions that only sm_90a has: mbarriers, bulk tensor copies, wgmma, register hand-over.
// Inline PTX for the reason given in instructions_sm80.h.
#pragma once

#include "cuda/numbers.h"

namespace avatar_rt::cuda {

// --- barriers in shared memory ---------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done = 0;
    while (!done)
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
}

// --- named barriers of two warpgroups --------------------------------------------------------------------------------

__device__ __forceinline__ void bar_sync(int id) {
    asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory");
}
__device__ __forceinline__ void bar_arrive(int id) {
    asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory");
}

// --- copies ----------------------------------------------------------------------------------------------------------

// The map's box at these coordinates to `to`; its bytes complete on `barrier`.
__device__ __forceinline__ void tensor_copy(uint32_t to, const void* map, uint32_t barrier, int element, int row,
                                            int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(element), "r"(row), "r"(head), "r"(batch)
        : "memory");
}

// --- registers -------------------------------------------------------------------------------------------------------

template <int kRegisters>
__device__ __forceinline__ void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- products of a warpgroup -----------------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The compiler takes an asynchronous result for ready at once; nothing that uses these may move above this line.
template <int kTiles>
__device__ __forceinline__ void hold(float (&x)[kTiles][4]) {
    unrolled<kTiles>([&](int j) { unrolled<4>([&](int i) { asm volatile("" : "+f"(x[j][i])::"memory"); }); });
}
template <int kTiles>
__device__ __forceinline__ void hold(uint32_t (&x)[kTiles][4]) {
    unrolled<kTiles>([&](int j) { unrolled<4>([&](int i) { asm volatile("" : "+r"(x[j][i])::"memory"); }); });
}

#define AVATAR_RT_D1(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define AVATAR_RT_D4(j) AVATAR_RT_D1(j), AVATAR_RT_D1(j + 1), AVATAR_RT_D1(j + 2), AVATAR_RT_D1(j + 3)
#define AVATAR_RT_N64                                                         \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define AVATAR_RT_N128                                                                 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

// d (+)= a b^T, both K-major in shared memory: 64 x 128 from 16 summed elements.
#define AVATAR_RT_SCORES(TYPE)                                                          \
    asm volatile(                                                                       \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                    \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " " AVATAR_RT_N128 \
        ", %64, %65, p, 1, 1, 0, 0;\n}"                                                 \
        : AVATAR_RT_D4(0), AVATAR_RT_D4(4), AVATAR_RT_D4(8), AVATAR_RT_D4(12)           \
        : "l"(a), "l"(b), "r"(static_cast<int>(add)))

template <class T>
__device__ __forceinline__ void wgmma_scores(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
    if constexpr (T::kBf16)
        AVATAR_RT_SCORES("bf16");
    else
        AVATAR_RT_SCORES("f16");
}

// d += a b, a in registers, b MN-major in shared memory: 64 x 64 or 64 x 128 from 16 summed elements.
#define AVATAR_RT_VALUES64(TYPE)                                                               \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " AVATAR_RT_N64 \
                 ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                    \
                 : AVATAR_RT_D4(0), AVATAR_RT_D4(4)                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define AVATAR_RT_VALUES128(TYPE)                                                                \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " " AVATAR_RT_N128 \
                 ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                      \
                 : AVATAR_RT_D4(0), AVATAR_RT_D4(4), AVATAR_RT_D4(8), AVATAR_RT_D4(12)           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <class T>
__device__ __forceinline__ void wgmma_values(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
    if constexpr (T::kBf16)
        AVATAR_RT_VALUES64("bf16");
    else
        AVATAR_RT_VALUES64("f16");
}
template <class T>
__device__ __forceinline__ void wgmma_values(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
    if constexpr (T::kBf16)
        AVATAR_RT_VALUES128("bf16");
    else
        AVATAR_RT_VALUES128("f16");
}

#undef AVATAR_RT_D1
#undef AVATAR_RT_D4
#undef AVATAR_RT_N64
#undef AVATAR_RT_N128
#undef AVATAR_RT_SCORES
#undef AVATAR_RT_VALUES64
#undef AVATAR_RT_VALUES128

}  // namespace avatar_rt::cuda
