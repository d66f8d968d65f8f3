// What the per-instruction-set kernels are given: some query rows of one head, and the key ranges that all of them see.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/attention_pack.h"

namespace avatar_rt::cpu {

struct KeyRange {
    const void* k;
    const void* v;
    int64_t rows, k_stride, v_stride;  // strides in elements; KeyLayout::pairs has contiguous values
    KeyLayout layout;
    const float *k_scale, *v_scale;  // one per row for KeyLayout::int8, else null
    float bias;                      // added to scaled scores, in powers of two
};

struct AttentionJob {
    const void* q;
    int64_t q_stride;
    int rows;  // at most max_rows of the kernel
    int head_dim;
    KeyRange ranges[2];
    int num_ranges;
    float scale_log2;  // scale * log2(e): the kernels work in powers of two
    void* out;
    int64_t out_stride;
    float* lse;  // rows values, or null
};

struct AttentionKernel {
    int tile_rows;                          // query rows that move through the key loop together
    int max_rows;                           // rows that share one pass over the keys
    size_t (*scratch_bytes)(int head_dim);  // 64-byte aligned memory that run() needs
    void (*run)(const AttentionJob& job, void* scratch);
};

extern const AttentionKernel kAttentionF32Scalar, kAttentionBf16Scalar;
extern const AttentionKernel kAttentionF32Avx2, kAttentionBf16Avx2;
extern const AttentionKernel kAttentionF32Avx512, kAttentionBf16Avx512;
extern const AttentionKernel kAttentionBf16Avx512bf16;

}  // namespace avatar_rt::cpu
