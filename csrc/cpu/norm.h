// Rows normalised, scaled, rotated or gated, and rounded to bf16 where the next product reads them.
//
//   layer:   n = (x - mean) / sqrt(variance + eps)        rms:  n = x / sqrt(mean(x^2) + eps)
//   length:  n = x * sqrt(C) / max(|x|, 1e-12)            none: n = x
//   y = n * scale[index[r]] + shift[index[r]]; then channel pairs (2i, 2i+1) turned by cos, sin; then SiLU.
//
// Bound by bytes. In fp32 throughout; a row's result depends on that row alone.
#pragma once

#include "cpu/linear.h"

namespace avatar_rt::cpu {

enum class Norm { none, layer, rms, length };

struct NormArgs {
    Norm norm = Norm::none;
    const void* x = nullptr;
    bool x_f32 = true;
    Grid from;
    int64_t rows = 0, channels = 0;  // channels: a multiple of 16
    float eps = 0;
    Table scale, shift;
    const float *cos = nullptr, *sin = nullptr;  // [period, head_dim]: cosines twice each; sines as -s, s
    int64_t period = 1, head_dim = 16;           // row r turns by row r % period; head_dim: a multiple of 16
    bool silu = false;
    uint16_t* y = nullptr;
    Grid to;
};

// Needs Isa::avx512bf16.
void norm_avx512bf16(const NormArgs& args, int num_threads);

}  // namespace avatar_rt::cpu
