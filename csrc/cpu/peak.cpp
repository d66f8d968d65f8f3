#include "cpu/peak.h"

#include <time.h>

#ifdef AVATAR_RT_X86
#include <immintrin.h>
#endif

namespace avatar_rt::cpu {
namespace {

constexpr int kChains = 12;  // independent sums: latency of a multiply-add times how many start per cycle, and spare
constexpr int kRounds = 100000;  // between two looks at the clock

double thread_seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Keeps a value in a register and its computation in the program.
template <class T>
inline void keep(T& x) {
#ifdef AVATAR_RT_X86
    asm volatile("" : "+v"(x));
#else
    asm volatile("" : "+m"(x));
#endif
}

// Each burst does kRounds * kChains multiply-adds and returns their FLOPs.
#ifdef AVATAR_RT_X86
#ifdef AVATAR_RT_AVX512BF16
__attribute__((target("avx512f,avx512bf16"))) double burst_bf16() {
    __m512 sum[kChains];
    __m512bh x = (__m512bh)_mm512_set1_epi32(0), y = x;
#pragma GCC unroll 16
    for (__m512& s : sum) s = _mm512_setzero_ps();
    for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 16
        for (__m512& s : sum) s = _mm512_dpbf16_ps(s, x, y);
#pragma GCC unroll 16
        for (__m512& s : sum) keep(s);
    }
    return 64.0 * kRounds * kChains;
}
#endif

__attribute__((target("avx512f"))) double burst_avx512() {
    __m512 sum[kChains], x = _mm512_set1_ps(1e-3f), y = x;
#pragma GCC unroll 16
    for (__m512& s : sum) s = _mm512_setzero_ps();
    for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 16
        for (__m512& s : sum) s = _mm512_fmadd_ps(x, y, s);
#pragma GCC unroll 16
        for (__m512& s : sum) keep(s);
    }
    return 32.0 * kRounds * kChains;
}

__attribute__((target("avx2,fma"))) double burst_avx2() {
    __m256 sum[kChains], x = _mm256_set1_ps(1e-3f), y = x;
#pragma GCC unroll 16
    for (__m256& s : sum) s = _mm256_setzero_ps();
    for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 16
        for (__m256& s : sum) s = _mm256_fmadd_ps(x, y, s);
#pragma GCC unroll 16
        for (__m256& s : sum) keep(s);
    }
    return 16.0 * kRounds * kChains;
}
#endif

double burst_baseline() {
    typedef float F __attribute__((vector_size(16)));
    F sum[kChains], x = {1e-3f, 1e-3f, 1e-3f, 1e-3f}, y = x;
#pragma GCC unroll 16
    for (F& s : sum) s = F{};
    for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 16
        for (F& s : sum) s = x * y + s;
#pragma GCC unroll 16
        for (F& s : sum) keep(s);
        keep(x);
    }
    return 8.0 * kRounds * kChains;
}

using Burst = double (*)();

Burst burst_for(DType dtype) {
    (void)dtype;
#ifdef AVATAR_RT_X86
#ifdef AVATAR_RT_AVX512BF16
    if (dtype == DType::bf16 && best_isa() == Isa::avx512bf16) return burst_bf16;
#endif
    if (supported(Isa::avx512)) return burst_avx512;
    if (supported(Isa::avx2)) return burst_avx2;
#endif
    return burst_baseline;
}

}  // namespace

double fma_peak(DType dtype, double seconds) {
    const Burst burst = burst_for(dtype);
    burst();  // wide units wake up
    double flops = 0, spent = 0;
    const double start = thread_seconds();
    do {
        flops += burst();
        spent = thread_seconds() - start;
    } while (spent < seconds);
    return 1e-9 * flops / spent;
}

}  // namespace avatar_rt::cpu
