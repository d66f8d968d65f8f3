// Attention on a GPU over key/value segments read where they lie: [fresh ; reference] under one softmax, optionally
// with the fresh rows limited to a band of frames.
//
//   s[l, k] = scale * q[l] . k[k] (+ log strength for a reference row)
//   out[l] = sum_k softmax_k(s[l]) v[k]        lse[l] = log sum_k exp(s[l, k])
//
// Layout [batch, rows, heads, head_dim], head_dim contiguous; addresses and strides are multiples of 16 bytes.
// Accumulated in fp32. Bound by FLOPs, 4 * head_dim per attended pair, and at head_dim 64 on sm_90 by the exponential.
// Work is split over batch, heads and query rows only, and a query's arithmetic is the same wherever it stands.
// A NaN or infinity in a row of v that a query does not see may still reach it when the row is within the length of v
// and in a tile that a neighbour sees: masked weights are zeros, and zero times infinity is NaN.
#pragma once

#include <cstdint>
#include <string>

namespace avatar_rt::cuda {

enum class DType { bf16, f16 };
enum class Kernel { best, sm80, sm90 };  // best: sm90 on compute capability 9.0, else sm80

// Strides are in elements; 0 repeats.
struct View {
    const void* data = nullptr;
    int64_t rows = 0, batch_stride = 0, row_stride = 0, head_stride = 0;
};

struct AttentionArgs {
    DType dtype = DType::bf16;
    int64_t batch = 0, heads = 0, head_dim = 0;
    View q;                // rows: queries, frame after frame
    View k, v;             // fresh rows; none when rows is 0
    View ref_k, ref_v;     // reference rows; none when rows is 0
    void* out = nullptr;   // contiguous [batch, queries, heads, head_dim]
    float* lse = nullptr;  // contiguous [batch, heads, queries]; may be null
    float scale = 0;
    int64_t num_frames = 1;  // queries and, when above 1, fresh rows per frame: rows / num_frames
    int64_t radius = 0;      // frames seen before and after the own one; unused for one frame
    float strength = 1;      // factor on the weight of each reference row; 0 leaves the reference out
    Kernel kernel = Kernel::best;
};

// Empty, or one sentence that says what was got and what was expected.
std::string attention_faults(const AttentionArgs& args);

// Launches on `stream` (a cudaStream_t) of the current device; allocates nothing, waits for nothing, keeps nothing, so
// that a CUDA graph or a TensorRT plugin can own the call. Returns the cudaError_t. Needs attention_faults(args) empty.
int attention(const AttentionArgs& args, void* stream);

// Why no kernel here can run on `device`, or empty: no driver, no such device, an architecture that is not built.
std::string attention_refusal(int device);

// The same kernels in software: every lane, fragment, barrier and copy, on a CPU, over CPU memory. Needs
// attention_faults(args) empty and a kernel other than `best`. Returns empty, or what the kernel did wrong (a barrier
// that nobody completes, a copy outside shared memory).
std::string attention_emulated(const AttentionArgs& args);

}  // namespace avatar_rt::cuda
