// Attention over key/value segments read where they lie: [fresh ; reference] under one softmax, optionally with the
// fresh rows limited to a band of frames.
//
//   out[b, l, n] = sum_s softmax_s(scale * q[b, l, n] . k[b, s, n]) v[b, s, n]      lse[b, n, l] = log sum_s exp(...)
//
// where reference rows have log(strength) added to their scores.
//
// Layout [batch, rows, heads, head_dim], head_dim contiguous, other strides free, no alignment asked for.
// Bound by FLOPs: 4 * head_dim per attended pair. Work is split over batch, heads and query rows only, and each
// query's arithmetic is the same wherever it stands, so a result does not depend on threads or on its neighbours.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/attention_pack.h"
#include "cpu/isa.h"

namespace avatar_rt::cpu {

enum class DType { f32, bf16 };

// Strides are in elements.
struct View {
    const void* data = nullptr;
    int64_t rows = 0, batch_stride = 0, row_stride = 0, head_stride = 0;
};

struct AttentionArgs {
    DType dtype = DType::f32;
    int64_t batch = 0, heads = 0, head_dim = 0;
    View q;             // rows: queries, frame after frame
    View k, v;          // fresh rows; none when rows is 0
    View ref_k, ref_v;  // reference rows; none when rows is 0; laid out as ref_layout says
    KeyLayout ref_layout = KeyLayout::rows;
    const float *ref_k_scale = nullptr, *ref_v_scale = nullptr;  // contiguous [batch, heads, rows] for int8
    void* out = nullptr;                                         // contiguous [batch, queries, heads, head_dim]
    float* lse = nullptr;                                        // contiguous [batch, heads, queries]; may be null
    float scale = 0;
    float strength = 1;      // factor on each reference row's softmax weight, before normalising; 0: no reference
    int64_t num_frames = 1;  // queries and, when above 1, fresh rows per frame: rows / num_frames
    int64_t radius = 0;      // frames seen before and after the own one; unused for one frame
    int num_threads = 1;
    Isa isa = Isa::scalar;
};

// Empty, or one sentence that says what was got and what was expected.
std::string attention_faults(const AttentionArgs& args);

// Needs attention_faults(args) to be empty.
void attention(const AttentionArgs& args);

}  // namespace avatar_rt::cpu
