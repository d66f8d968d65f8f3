// What device code and its emulation on a CPU share about numbers: function qualifiers, the two 16-bit formats, exp2.
// Compiled by nvcc this is device code; by a host compiler it is the same arithmetic without CUDA's headers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __CUDACC__
#define AVATAR_RT_DEVICE __device__ __forceinline__
#else
#define AVATAR_RT_DEVICE inline
#endif

namespace avatar_rt::cuda {

constexpr float kNone = -std::numeric_limits<float>::infinity();  // the score of a key that a query does not see

// f(0) .. f(kCount - 1), unrolled: registers can only be indexed by constants.
template <int kCount, class F>
AVATAR_RT_DEVICE void unrolled(F&& f) {
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int i = 0; i < kCount; ++i) f(i);
}

// The same, `kStep` at a time in a loop: for indices that no register depends on, where unrolling all costs registers.
template <int kCount, int kStep, class F>
AVATAR_RT_DEVICE void unrolled_by(F&& f) {
#ifdef __CUDACC__
#pragma unroll kStep
#endif
    for (int i = 0; i < kCount; ++i) f(i);
}

AVATAR_RT_DEVICE uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(x);
#else
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
#endif
}

AVATAR_RT_DEVICE float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
#endif
}

#ifndef __CUDACC__
// Round a float to `mantissa` explicit bits and the exponents of an IEEE format, ties to even; `bias` is its bias.
inline uint16_t narrow_bits(float x, int mantissa, int bias) {
    const uint32_t sign = (bits_of(x) >> 31) << 15;
    const uint32_t infinity = (2u * bias + 1) << mantissa;
    if (std::isnan(x)) return static_cast<uint16_t>(sign | infinity | (1u << (mantissa - 1)));
    const double magnitude = std::fabs(static_cast<double>(x));
    if (magnitude == 0) return static_cast<uint16_t>(sign);
    int exponent = std::isinf(x) ? 2 * bias : std::ilogb(magnitude);
    if (exponent < 1 - bias) exponent = 1 - bias;  // subnormal: the spacing stops shrinking
    const double steps = std::nearbyint(std::ldexp(magnitude, mantissa - exponent));
    // Adding, not or-ing: a mantissa that rounds up to the next power of two carries into the exponent.
    const double code = steps + std::ldexp(static_cast<double>(exponent + bias - 1), mantissa);
    return static_cast<uint16_t>(sign | (code >= infinity ? infinity : static_cast<uint32_t>(code)));
}
#endif

struct Bf16 {
    static constexpr bool kBf16 = true;
    // Two floats as one register, `low` in the low half, rounded to nearest even.
    static AVATAR_RT_DEVICE uint32_t pack(float low, float high) {
#ifdef __CUDACC__
        uint32_t packed;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
        return packed;
#else
        return narrow_bits(low, 7, 127) | static_cast<uint32_t>(narrow_bits(high, 7, 127)) << 16;
#endif
    }
#ifndef __CUDACC__
    static float widen(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }
#endif
};

struct Fp16 {
    static constexpr bool kBf16 = false;
    static AVATAR_RT_DEVICE uint32_t pack(float low, float high) {
#ifdef __CUDACC__
        uint32_t packed;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
        return packed;
#else
        return narrow_bits(low, 10, 15) | static_cast<uint32_t>(narrow_bits(high, 10, 15)) << 16;
#endif
    }
#ifndef __CUDACC__
    static float widen(uint16_t x) {
        const int exponent = (x >> 10) & 31, fraction = x & 1023;
        float magnitude =
            std::ldexp(static_cast<float>(fraction | (exponent ? 1024 : 0)), (exponent ? exponent : 1) - 25);
        if (exponent == 31) magnitude = fraction ? std::nanf("") : std::numeric_limits<float>::infinity();
        return x & 0x8000 ? -magnitude : magnitude;
    }
#endif
};

// 2^x by the special-function unit: 2 ulp, 16 results per clock and multiprocessor.
AVATAR_RT_DEVICE float exp2_unit(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return x < -126.0f ? 0.0f : std::exp2(x);
#endif
}

// 2^x by multiply-adds, for x <= 128: Cody-Waite into a power of two and a fraction within half, then a polynomial of
// degree 5 (relative error below 1e-7: the sum of the weights, and so the LSE, stays as good as the unit's).
// From -127 down the biased exponent is 0 and the result exactly 0, as for the -inf of a key that is not seen.
AVATAR_RT_DEVICE float exp2_polynomial(float x) {
#ifdef __CUDACC__
    asm("max.NaN.f32 %0, %0, 0fC2FE0000;" : "+f"(x));  // -127; a NaN must stay one
#else
    x = x < -127.0f ? -127.0f : x;
#endif
    constexpr float kRound = 12583039.0f;  // 1.5 * 2^23 + 127: leaves the biased exponent in the low bits
    const float shifted = x + kRound;
    const float f = x - (shifted - kRound);
    float y = 0.0013264727f;
    y = fmaf(y, f, 0.0096715128f);
    y = fmaf(y, f, 0.0555073374f);
    y = fmaf(y, f, 0.2402224208f);
    y = fmaf(y, f, 0.6931469776f);
    y = fmaf(y, f, 1.0f);
    return y * float_of(bits_of(shifted) << 23);
}

}  // namespace avatar_rt::cuda
