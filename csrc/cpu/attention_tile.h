// The online-softmax loop, written once over a policy P that supplies the arithmetic of an instruction set.
//
// Query rows lie across vector lanes: a tile holds kVectors * width queries, scores and outputs are kept transposed
// ([key][query], [channel][query]), and keys and values enter as broadcasts. So keys need no repacking, row maxima
// and sums need no shuffles, and a lane's result never depends on the other lanes.
//
// Included by one file per instruction set; everything is in an unnamed namespace so that no two of them share code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/attention_job.h"

namespace avatar_rt::cpu {
namespace {

constexpr int kBlock = 144;  // keys per softmax step: even, and a multiple of the 6-row register tile
constexpr int kTiles = 8;    // tiles that share one pass over the keys, so that each key block is read from cache

// Channels that a score sums at a time: a long sum is as exact as the short ones it is made of. Both passes do the
// same, or the weights that the backward pass remakes would not be those that the LSE is of.
constexpr int kRun = 64;

inline float bf16_to_f32(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

inline uint16_t f32_to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // keep NaN a NaN
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float to_f32(float x) {
    return x;
}
inline float to_f32(uint16_t x) {
    return bf16_to_f32(x);
}
inline void from_f32(float x, float* y) {
    *y = x;
}
inline void from_f32(float x, uint16_t* y) {
    *y = f32_to_bf16(x);
}

// An int8 row times its factor, rounded to the element type E and kept as T.
template <class E, class T>
inline void widen_as(const int8_t* x, float scale, int count, T* y) {
    for (int i = 0; i < count; ++i) {
        E value;
        from_f32(scale * static_cast<float>(x[i]), &value);
        if constexpr (sizeof(T) == sizeof(E))
            y[i] = value;
        else
            y[i] = to_f32(value);
    }
}

// 2^x for x <= 0 (a little above is fine); below -126 it is 2^-126, which no sum in fp32 can see. The rounding constant
// leaves the exponent's bits at the bottom of the sum; the product with them keeps a NaN, which adding bits would not.
// Polynomial: least largest relative error on [-1/2, 1/2] of degree 5 with p(0) = 1, 1.6e-7 in fp32.
template <class V>
inline typename V::F exp2_lanes(typename V::F x) {
    const typename V::F rounding = V::set1(12582912.f + 127.f);  // 1.5 * 2^23, and the bias of the exponent
    x = V::max(V::set1(-126.f), x);                              // the second operand is what survives a NaN
    const typename V::F n = V::add(x, rounding), f = V::sub(x, V::sub(n, rounding));
    typename V::F p = V::set1(1.326472731e-03f);
    p = V::fma(p, f, V::set1(9.671512991e-03f));
    p = V::fma(p, f, V::set1(5.550733581e-02f));
    p = V::fma(p, f, V::set1(2.402224243e-01f));
    p = V::fma(p, f, V::set1(6.931470037e-01f));
    p = V::fma(p, f, V::set1(1.f));
    return V::mul(p, V::exponent(n));
}

// Per tile: packed queries, transposed output sums, and per query the running maximum (times scale_log2) and sum.
template <class P>
struct Tile {
    typename P::PackedQ* q;
    float *out, *peak, *sum;
    int rows, vectors;
};

template <class P>
struct Scratch {
    typename P::Block block;
    float* scores;
    Tile<P> tiles[kTiles];

    static constexpr int kLanes = P::V::kVectors * P::V::kWidth;

    // What placing everything in no memory at all comes to, so that size and layout cannot disagree.
    static size_t bytes(int head_dim) { return Scratch(nullptr, head_dim).size; }

    size_t size = 0;

    Scratch(void* memory, int head_dim) {
        auto take = [&](size_t bytes) {
            char* here = memory ? static_cast<char*>(memory) + size : nullptr;
            size += (bytes + 63) / 64 * 64;
            return reinterpret_cast<float*>(here);
        };
        const size_t lanes = kLanes * sizeof(float), d = static_cast<size_t>(head_dim);
        P::place(&block, take(P::block_bytes(head_dim)));
        scores = take(kBlock * lanes);
        for (Tile<P>& t : tiles) {
            t.q = reinterpret_cast<typename P::PackedQ*>(take(d * lanes));
            t.out = take(d * lanes);
            t.peak = take(lanes);
            t.sum = take(lanes);
        }
    }
};

// Scores of a key block against one tile, softmax step, and the weighted sum of the block's values.
template <class P, int NV>
void step(const typename P::Block& block, const Tile<P>& t, int head_dim, float scale_log2, float bias, bool first,
          float* scores) {
    using V = typename P::V;
    using F = typename V::F;
    constexpr int W = V::kWidth;
    F peak[NV], alpha[NV], sum[NV], old[NV];
    for (int j = 0; j < NV; ++j) peak[j] = V::set1(-INFINITY);
    P::template scores<NV>(block, t.q, head_dim, scores, peak);
    for (int j = 0; j < NV; ++j) {
        old[j] = V::load(t.peak + j * W);
        peak[j] = V::fma(peak[j], V::set1(scale_log2), V::set1(bias));
        if (!first) peak[j] = V::max(old[j], peak[j]);
        V::store(t.peak + j * W, peak[j]);
        alpha[j] = first ? V::set1(0.f) : exp2_lanes<V>(V::sub(old[j], peak[j]));
    }
    for (int j = 0; j < NV; ++j) peak[j] = V::sub(peak[j], V::set1(bias));
    P::template weights<NV>(block.rows, scores, V::set1(scale_log2), peak, sum);
    for (int j = 0; j < NV; ++j) {
        const F before = first ? V::set1(0.f) : V::load(t.sum + j * W);
        V::store(t.sum + j * W, V::fma(before, alpha[j], sum[j]));
    }
    P::template values<NV>(block, scores, head_dim, t.out, first ? nullptr : alpha);
}

template <class P>
void step_any(const typename P::Block& block, const Tile<P>& t, int head_dim, float scale_log2, float bias, bool first,
              float* s) {
    switch (t.vectors) {
        case 1:
            return step<P, 1>(block, t, head_dim, scale_log2, bias, first, s);
        case 2:
            return step<P, 2>(block, t, head_dim, scale_log2, bias, first, s);
        case 3:
            if constexpr (P::V::kVectors > 2) return step<P, 3>(block, t, head_dim, scale_log2, bias, first, s);
            break;
        case 4:
            if constexpr (P::V::kVectors > 2) return step<P, 4>(block, t, head_dim, scale_log2, bias, first, s);
            break;
    }
}

// Divide by the sums and turn the tile back to rows.
template <class P>
void finish(const Tile<P>& t, const AttentionJob& job, int first_row) {
    using V = typename P::V;
    using E = typename P::Element;
    const int lanes = t.vectors * V::kWidth;
    for (int d = 0; d < job.head_dim; ++d)
        for (int j = 0; j < lanes; j += V::kWidth)
            V::store(t.out + d * lanes + j, V::div(V::load(t.out + d * lanes + j), V::load(t.sum + j)));
    for (int r = 0; r < t.rows; ++r) {
        E* row = static_cast<E*>(job.out) + (first_row + r) * job.out_stride;
        for (int d = 0; d < job.head_dim; ++d) from_f32(t.out[d * lanes + r], row + d);
        if (job.lse) job.lse[first_row + r] = 0.693147181f * t.peak[r] + logf(t.sum[r]);
    }
}

template <class P>
void run(const AttentionJob& job, void* memory) {
    using E = typename P::Element;
    Scratch<P> scratch(memory, job.head_dim);
    constexpr int W = P::V::kWidth, kLanes = Scratch<P>::kLanes;
    const int num_tiles = (job.rows + kLanes - 1) / kLanes;
    for (int i = 0; i < num_tiles; ++i) {
        Tile<P>& t = scratch.tiles[i];
        t.rows = job.rows - i * kLanes < kLanes ? job.rows - i * kLanes : kLanes;
        t.vectors = (t.rows + W - 1) / W;
        P::pack(static_cast<const E*>(job.q) + i * kLanes * job.q_stride, job.q_stride, t.rows, t.vectors * W,
                job.head_dim, t.q);
    }
    bool first = true;
    for (int g = 0; g < job.num_ranges; ++g) {
        const KeyRange& range = job.ranges[g];
        for (int64_t at = 0; at < range.rows; at += kBlock) {
            const int rows = static_cast<int>(range.rows - at < kBlock ? range.rows - at : kBlock);
            P::fill(&scratch.block, range, at, rows, job.head_dim);
            for (int i = 0; i < num_tiles; ++i)
                step_any<P>(scratch.block, scratch.tiles[i], job.head_dim, job.scale_log2, range.bias, first,
                            scratch.scores);
            first = false;
        }
    }
    for (int i = 0; i < num_tiles; ++i) finish<P>(scratch.tiles[i], job, i * kLanes);
}

template <class P>
constexpr AttentionKernel make_kernel() {
    return {Scratch<P>::kLanes, Scratch<P>::kLanes * kTiles, &Scratch<P>::bytes, &run<P>};
}

}  // namespace
}  // namespace avatar_rt::cpu
