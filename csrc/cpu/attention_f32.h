// The fp32 policy of attention_tile.h over a vector type V, for fp32 inputs and, widened block by block, bf16 inputs.
#pragma once

#include "cpu/attention_tile.h"

namespace avatar_rt::cpu {
namespace {

// One register tile of scores: M keys against NV vectors of queries.
template <class V, int NV, int M>
void score_rows(const float* k, int64_t stride, const float* q, int head_dim, float* scores, typename V::F* peak) {
    using F = typename V::F;
    for (int first = 0; first < head_dim; first += kRun) {
        const int end = head_dim - first < kRun ? head_dim : first + kRun;
        F acc[M][NV];
        for (int m = 0; m < M; ++m)
            for (int j = 0; j < NV; ++j) acc[m][j] = V::set1(0.f);
        for (int d = first; d < end; ++d, q += NV * V::kWidth) {
            F x[NV];
            for (int j = 0; j < NV; ++j) x[j] = V::load(q + j * V::kWidth);
            for (int m = 0; m < M; ++m) {
                const F key = V::set1(k[m * stride + d]);
                for (int j = 0; j < NV; ++j) acc[m][j] = V::fma(key, x[j], acc[m][j]);
            }
        }
        for (int m = 0; m < M; ++m)
            for (int j = 0; j < NV; ++j) {
                float* to = scores + (m * NV + j) * V::kWidth;
                if (first > 0) acc[m][j] = V::add(V::load(to), acc[m][j]);
                V::store(to, acc[m][j]);
                if (end == head_dim) peak[j] = V::max(acc[m][j], peak[j]);
            }
    }
}

// One register tile of outputs: M channels of NV vectors of queries, summed over a block's keys from zero.
template <class V, int NV, int M>
void value_rows(const float* v, int64_t stride, int rows, const float* weights, float* out,
                const typename V::F* alpha) {
    using F = typename V::F;
    F acc[M][NV];
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < NV; ++j) acc[m][j] = V::set1(0.f);
    for (int s = 0; s < rows; ++s, v += stride, weights += NV * V::kWidth) {
        F x[NV];
        for (int j = 0; j < NV; ++j) x[j] = V::load(weights + j * V::kWidth);
        for (int m = 0; m < M; ++m) {
            const F value = V::set1(v[m]);
            for (int j = 0; j < NV; ++j) acc[m][j] = V::fma(value, x[j], acc[m][j]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < NV; ++j) {
            float* to = out + (m * NV + j) * V::kWidth;
            V::store(to, alpha ? V::fma(V::load(to), alpha[j], acc[m][j]) : acc[m][j]);
        }
}

template <class Vec, class Input>
struct F32Policy {
    using V = Vec;
    using Element = Input;
    using PackedQ = float;
    static constexpr bool kWiden = sizeof(Input) == 2;

    struct Block {
        const float *k, *v;
        int64_t k_stride, v_stride;
        int rows;
        float* wide;
    };

    static size_t block_bytes(int head_dim) { return 2 * kBlock * sizeof(float) * ((head_dim + 15) / 16 * 16); }
    static void place(Block* block, void* memory) { block->wide = static_cast<float*>(memory); }

    // Rows are read where they lie when they are fp32, else from a copy.
    static void fill(Block* block, const KeyRange& range, int64_t first, int rows, int head_dim) {
        block->rows = rows;
        if (range.layout == KeyLayout::int8) {
            fill_wide<int8_t>(block, range, first, head_dim);
        } else if constexpr (kWiden) {
            fill_wide<Input>(block, range, first, head_dim);
        } else if (range.k_stride == head_dim && range.v_stride == head_dim) {
            block->k = static_cast<const float*>(range.k) + first * head_dim;
            block->v = static_cast<const float*>(range.v) + first * head_dim;
            block->k_stride = block->v_stride = head_dim;
        } else {
            fill_wide<float>(block, range, first, head_dim);
        }
    }

    template <class Stored>
    static void fill_wide(Block* block, const KeyRange& range, int64_t first, int head_dim) {
        float *to_k = block->wide, *to_v = to_k + kBlock * head_dim;
        block->k = to_k;
        block->v = to_v;
        block->k_stride = block->v_stride = head_dim;
        for (int64_t s = first; s < first + block->rows; ++s, to_k += head_dim, to_v += head_dim) {
            const Stored* k = static_cast<const Stored*>(range.k) + s * range.k_stride;
            const Stored* v = static_cast<const Stored*>(range.v) + s * range.v_stride;
            if constexpr (sizeof(Stored) == 1) {
                widen_as<Input>(k, range.k_scale[s], head_dim, to_k);
                widen_as<Input>(v, range.v_scale[s], head_dim, to_v);
            } else {
                for (int d = 0; d < head_dim; ++d) to_k[d] = to_f32(k[d]);
                for (int d = 0; d < head_dim; ++d) to_v[d] = to_f32(v[d]);
            }
        }
    }

    // [channel][query]; lanes beyond the rows are zero, which is harmless and never read.
    static void pack(const Input* q, int64_t stride, int rows, int lanes, int head_dim, float* packed) {
        for (int d = 0; d < head_dim; ++d)
            for (int r = 0; r < lanes; ++r) packed[d * lanes + r] = r < rows ? to_f32(q[r * stride + d]) : 0.f;
    }

    template <int NV>
    static void scores(const Block& b, const float* q, int head_dim, float* out, typename V::F* peak) {
        constexpr int kStep = NV * V::kWidth;
        int s = 0;
        for (; s + 6 <= b.rows; s += 6)
            score_rows<V, NV, 6>(b.k + s * b.k_stride, b.k_stride, q, head_dim, out + s * kStep, peak);
        for (; s + 2 <= b.rows; s += 2)
            score_rows<V, NV, 2>(b.k + s * b.k_stride, b.k_stride, q, head_dim, out + s * kStep, peak);
        if (s < b.rows) score_rows<V, NV, 1>(b.k + s * b.k_stride, b.k_stride, q, head_dim, out + s * kStep, peak);
    }

    template <int NV>
    static void weights(int rows, float* scores, typename V::F scale, const typename V::F* peak, typename V::F* sum) {
        for (int j = 0; j < NV; ++j) sum[j] = V::set1(0.f);
        for (int s = 0; s < rows; ++s)
            for (int j = 0; j < NV; ++j, scores += V::kWidth) {
                const typename V::F e = exp2_lanes<V>(V::fmsub(V::load(scores), scale, peak[j]));
                sum[j] = V::add(sum[j], e);
                V::store(scores, e);
            }
    }

    template <int NV>
    static void values(const Block& b, const float* weights, int head_dim, float* out, const typename V::F* alpha) {
        constexpr int kStep = NV * V::kWidth;
        int d = 0;
        for (; d + 6 <= head_dim && head_dim - d != 8; d += 6)
            value_rows<V, NV, 6>(b.v + d, b.v_stride, b.rows, weights, out + d * kStep, alpha);
        for (; d + 4 <= head_dim; d += 4)
            value_rows<V, NV, 4>(b.v + d, b.v_stride, b.rows, weights, out + d * kStep, alpha);
        for (; d + 2 <= head_dim; d += 2)
            value_rows<V, NV, 2>(b.v + d, b.v_stride, b.rows, weights, out + d * kStep, alpha);
        if (d < head_dim) value_rows<V, NV, 1>(b.v + d, b.v_stride, b.rows, weights, out + d * kStep, alpha);
    }
};

}  // namespace
}  // namespace avatar_rt::cpu
