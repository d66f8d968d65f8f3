// The AVX-512 vector type of the CPU kernels: sixteen floats, thirty-two registers.
#pragma once

#include <immintrin.h>

namespace avatar_rt::cpu {
namespace {

struct Avx512 {
    using F = __m512;
    static constexpr int kWidth = 16, kVectors = 4;
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F fmsub(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    // The low nine bits as sign and exponent of a float.
    static F exponent(F x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23)); }
};

}  // namespace
}  // namespace avatar_rt::cpu
