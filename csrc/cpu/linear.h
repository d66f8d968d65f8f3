// Rows times packed weights in bf16, with what follows done on the accumulators: a plain linear layer (one tap), or a
// convolution over zero-bordered pictures whose channels are contiguous (one tap per kernel position).
//
//   sum[r, n] = bias[n] + sum over taps t, channels c of x[at(r) + tap[t] + c] * weight[t, c, n]
//   store:     y[r, n] = sum          gelu: y = gelu(sum), tanh form          y is bf16 or fp32
//   residual:  y[r, n] += sum * gate[gate_index[r], n] + plus[plus_index[r], n]          y is fp32
//
// Bound by FLOPs: 2 per tap, channel and output. Products of pairs by vdpbf16ps, sums in fp32 in one order per row, so
// a row's result depends neither on its neighbours nor on threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace avatar_rt::cpu {

// Where rows lie: row r is pixel r % width of line r / width % height of picture r / (width * height). Strides in
// elements. Plain rows are one line.
struct Grid {
    int64_t width = 1, height = 1, pixel = 0, line = 0, picture = 0;

    int64_t at(int64_t row) const {
        if (row < width) return row * pixel;
        const int64_t lines = row / width;
        return row % width * pixel + lines % height * line + lines / height * picture;
    }
};

enum class Finish { store, gelu, residual };

// A row-indexed fp32 table; no index: every row takes row 0. No data: left out.
struct Table {
    const float* data = nullptr;
    int64_t stride = 0;
    const int32_t* index = nullptr;

    const float* row(int64_t r) const { return data + (index ? index[r] : 0) * stride; }
};

constexpr int kMaxTaps = 9;
constexpr int64_t kPanel = 64;  // outputs whose weights lie together

struct LinearArgs {
    const uint16_t* x = nullptr;
    Grid from;
    int64_t rows = 0, channels = 0, outputs = 0;  // channels: even
    int num_taps = 1;
    int64_t taps[kMaxTaps] = {0};
    const uint16_t* weight = nullptr;  // from pack_linear
    const float* bias = nullptr;       // [outputs]; may be null
    Finish finish = Finish::store;
    void* y = nullptr;
    bool y_f32 = false;
    Grid to;
    Table gate, plus;  // of Finish::residual
};

// Elements of the packed weights.
int64_t packed_linear_size(int64_t num_taps, int64_t channels, int64_t outputs);

// weight [outputs, num_taps, channels] bf16, contiguous -> per panel of 64 outputs, tap and channel pair: 64 pairs (of
// the last panel, the outputs rounded up to 16).
void pack_linear(const uint16_t* weight, int64_t num_taps, int64_t channels, int64_t outputs, uint16_t* packed);

// Needs Isa::avx512bf16.
void linear_avx512bf16(const LinearArgs& args, int num_threads);

}  // namespace avatar_rt::cpu
