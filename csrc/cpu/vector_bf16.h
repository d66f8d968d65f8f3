// What the bf16 row kernels share: sixteen bf16 in and out of a register of floats, and exponentials.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/attention_tile.h"
#include "cpu/vector_avx512.h"

namespace avatar_rt::cpu {
namespace {

inline __m512 load_bf16(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store_bf16(uint16_t* p, __m512 x, __mmask16 mask = 0xffff) {
    _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

// x * sigmoid(u)
inline __m512 gated(__m512 x, __m512 u) {
    const __m512 limit = _mm512_set1_ps(120.f);
    const __m512 power = _mm512_min_ps(limit, _mm512_mul_ps(u, _mm512_set1_ps(-1.44269504f)));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.f), exp2_lanes<Avx512>(power)));
}

inline __m512 silu(__m512 x) {
    return gated(x, x);
}

// The tanh form: x * sigmoid(sqrt(8 / pi) * (x + 0.044715 x^3)).
inline __m512 gelu_tanh(__m512 x) {
    const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
    const __m512 inner = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
    return gated(x, _mm512_mul_ps(inner, _mm512_set1_ps(1.5957691216f)));
}

}  // namespace
}  // namespace avatar_rt::cpu
