#include "cpu/attention_backward_f32.h"
#include "cpu/attention_f32.h"
#include "cpu/vector_avx512.h"

namespace avatar_rt::cpu {

const AttentionKernel kAttentionF32Avx512 = make_kernel<F32Policy<Avx512, float>>();
const AttentionKernel kAttentionBf16Avx512 = make_kernel<F32Policy<Avx512, uint16_t>>();
const AttentionBackwardKernel kAttentionBackwardF32Avx512 = make_backward_kernel<BackwardF32<Avx512, float>>();
const AttentionBackwardKernel kAttentionBackwardBf16Avx512 = make_backward_kernel<BackwardF32<Avx512, uint16_t>>();

}  // namespace avatar_rt::cpu
