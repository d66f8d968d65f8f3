// AVX2 with FMA: eight floats, sixteen registers.
#include <immintrin.h>

#include "cpu/attention_backward_f32.h"
#include "cpu/attention_f32.h"

namespace avatar_rt::cpu {
namespace {

struct Avx2 {
    using F = __m256;
    static constexpr int kWidth = 8, kVectors = 2;
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    static F set1(float x) { return _mm256_set1_ps(x); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F fmsub(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F exponent(F x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23)); }
};

}  // namespace

const AttentionKernel kAttentionF32Avx2 = make_kernel<F32Policy<Avx2, float>>();
const AttentionKernel kAttentionBf16Avx2 = make_kernel<F32Policy<Avx2, uint16_t>>();
const AttentionBackwardKernel kAttentionBackwardF32Avx2 = make_backward_kernel<BackwardF32<Avx2, float>>();
const AttentionBackwardKernel kAttentionBackwardBf16Avx2 = make_backward_kernel<BackwardF32<Avx2, uint16_t>>();

}  // namespace avatar_rt::cpu
