// The fp32 policy of attention_backward_tile.h over a vector type V, for fp32 inputs and bf16 inputs, which widen as
// they are packed.
#pragma once

#include "cpu/attention_backward_tile.h"

namespace avatar_rt::cpu {
namespace {

template <class Vec, class Input>
struct BackwardF32 {
    using V = Vec;
    using F = typename V::F;
    using Element = Input;
    using Unit = float;
    using Lanes = F;
    static constexpr int kDepth = 1, kKeyRows = 192;

    static F lanes(const float* p) { return V::load(p); }
    static F spread(float x) { return V::set1(x); }
    static F madd(F a, F b, F acc) { return V::fma(a, b, acc); }

    // [channel][row]
    static void turn(const Input* x, int64_t stride, int rows, int lanes, int head_dim, float* to) {
        for (int r = 0; r < lanes; ++r)
            for (int d = 0; d < head_dim; ++d) to[d * lanes + r] = r < rows ? to_f32(x[r * stride + d]) : 0.f;
    }

    // [row][channel], zero beyond the rows and channels.
    static void deepen(const Input* x, int64_t stride, int rows, int padded, int head_dim, int width, float* to) {
        for (int r = 0; r < padded; ++r, to += width) {
            const int own = r < rows ? head_dim : 0;
            for (int d = 0; d < own; ++d) to[d] = to_f32(x[r * stride + d]);
            for (int d = own; d < width; ++d) to[d] = 0;
        }
    }

    // Rows as broadcasts read them: the same form.
    static void spell(const Input* x, int64_t stride, int rows, int padded, int head_dim, int width, float* to) {
        deepen(x, stride, rows, padded, head_dim, width, to);
    }

    static void weigh(const float* s, const float* dp, int rows, int lanes, float scale_log2, float bias_log2,
                      const Queries<BackwardF32>& queries, float* p, float* ds, float*) {
        const F factor = V::set1(scale_log2), zero = V::set1(0.f);
        for (int j = 0; j < lanes; j += V::kWidth) {
            const F high = V::load(queries.lse + j), mean = V::load(queries.delta + j);
            const F low = V::sub(V::load(queries.lse_low + j), V::set1(bias_log2));
            for (int k = 0; k < rows; ++k) {
                const int at = k * lanes + j;
                const F weight = weight_of<V>(V::load(s + at), factor, high, low);
                V::store(p + at, weight);
                V::store(ds + at, V::mul(weight, V::sub(V::load(dp + at), mean)));
            }
            for (int k = rows; k < up(rows, 2); ++k) {
                V::store(p + k * lanes + j, zero);
                V::store(ds + k * lanes + j, zero);
            }
        }
    }
};

}  // namespace
}  // namespace avatar_rt::cpu
