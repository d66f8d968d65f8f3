// What the backward kernels of an instruction set are given: one block of queries to pack, one block of keys to run
// against a range of packed queries, or one block of dq to sum. Strides are in elements.
#pragma once

#include <cstddef>
#include <cstdint>

namespace avatar_rt::cpu {

constexpr int kBackwardRows = 96;   // most queries in a block, and keys that meet them at a time
constexpr int kBackwardChunks = 8;  // most partial sums of dq

struct QueryPackJob {
    const void *q, *grad, *out;
    int64_t q_stride, grad_stride, out_stride;
    const float *lse, *grad_lse;  // of the first row; grad_lse may be null
    int rows, head_dim;
    void* packed;
};

struct KeyBlockJob {
    const void *k, *v;
    int64_t k_stride, v_stride;
    int rows, head_dim;
    // Query blocks [first, last) of one head: block i has its packed form and its sums of dq at i times the stride.
    int64_t first, last;
    int64_t blocks_per_frame, block_rows, frame_rows;
    const char* packed;
    size_t packed_stride;
    float* dq;  // null: not wanted
    int64_t dq_stride;
    float scale, scale_log2, bias_log2;
    void *dk, *dv;  // null: not wanted
    int64_t grad_stride;
};

struct QuerySumJob {
    const float* parts[kBackwardChunks];
    int num_parts;
    int rows, head_dim;
    float scale;
    void* dq;
    int64_t dq_stride;
};

struct AttentionBackwardKernel {
    int key_rows;  // most keys in a block: each packed block of queries is fetched once for all of them
    size_t (*packed_bytes)(int head_dim, int block_rows);  // of one block of queries; block_rows: a multiple of 16
    int (*sum_channels)(int head_dim);                     // floats per row of dq sums
    size_t (*scratch_bytes)(int head_dim);                 // that keys() needs
    void (*pack)(const QueryPackJob& job);
    void (*keys)(const KeyBlockJob& job, void* scratch);
    void (*sum)(const QuerySumJob& job);
};

extern const AttentionBackwardKernel kAttentionBackwardF32Scalar, kAttentionBackwardBf16Scalar;
extern const AttentionBackwardKernel kAttentionBackwardF32Avx2, kAttentionBackwardBf16Avx2;
extern const AttentionBackwardKernel kAttentionBackwardF32Avx512, kAttentionBackwardBf16Avx512;
extern const AttentionBackwardKernel kAttentionBackwardBf16Avx512bf16;

}  // namespace avatar_rt::cpu
