// Baseline of the target: the compiler's own vector type, four floats, which every machine has or emulates.
#include "cpu/attention_backward_f32.h"
#include "cpu/attention_f32.h"

namespace avatar_rt::cpu {
namespace {

struct Baseline {
    typedef float F __attribute__((vector_size(16)));
    typedef int32_t I __attribute__((vector_size(16)));
    static constexpr int kWidth = 4, kVectors = 2;
    static F load(const float* p) {
        F x;
        std::memcpy(&x, p, sizeof x);
        return x;
    }
    static void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
    static F set1(float x) { return F{x, x, x, x}; }
    static F add(F a, F b) { return a + b; }
    static F sub(F a, F b) { return a - b; }
    static F mul(F a, F b) { return a * b; }
    static F div(F a, F b) { return a / b; }
    static F fma(F a, F b, F c) { return a * b + c; }
    static F fmsub(F a, F b, F c) { return a * b - c; }
    static F max(F a, F b) {
        const I left = a > b;
        return reinterpret_cast<F>((reinterpret_cast<I>(a) & left) | (reinterpret_cast<I>(b) & ~left));
    }
    static F exponent(F x) { return reinterpret_cast<F>(reinterpret_cast<I>(x) << 23); }
};

}  // namespace

const AttentionKernel kAttentionF32Scalar = make_kernel<F32Policy<Baseline, float>>();
const AttentionKernel kAttentionBf16Scalar = make_kernel<F32Policy<Baseline, uint16_t>>();
const AttentionBackwardKernel kAttentionBackwardF32Scalar = make_backward_kernel<BackwardF32<Baseline, float>>();
const AttentionBackwardKernel kAttentionBackwardBf16Scalar = make_backward_kernel<BackwardF32<Baseline, uint16_t>>();

}  // namespace avatar_rt::cpu
