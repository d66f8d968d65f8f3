// The backward pass of one block of keys against blocks of queries, written once over a policy P.
//
// All five products are one routine, c[m][lane] += sum_t a(m, t) * b[t][lane], in which `a` enters as broadcasts and
// `b` as vectors. With queries across the lanes of scores ([key][query]) every operand of it exists without turning
// anything inside the loop: q and grad are packed once per head in two forms, k and v once per key block.
//
//   product            m      lanes     t         a                     b
//   s   = k q^T        key    query     channel   k     [key][t]        turned q     [t][query]
//   dp  = v grad^T     key    query     channel   v     [key][t]        turned grad  [t][query]
//   dv += p^T grad     key    channel   query     p     [key][t]        grad         [t][channel]
//   dk += ds^T q       key    channel   query     ds    [key][t]        q            [t][channel]
//   dq += ds k         query  channel   key       ds    [t][query]      k            [t][channel]
//
// A step t is P::kDepth neighbours along the summed axis in one 4-byte unit: one float, or two bf16.
// Included by one file per instruction set; everything is in an unnamed namespace so that no two of them share code.
#pragma once

#include "cpu/attention_backward_job.h"
#include "cpu/attention_tile.h"

namespace avatar_rt::cpu {
namespace {

constexpr int kRunOfGrad = kRun / 2;  // as kRun, where no forward pass is to be met
constexpr int kStrip = 24;            // keys whose scores are made and used up at a time, in the nearest cache

inline int up(int x, int multiple) {
    return (x + multiple - 1) / multiple * multiple;
}

// The next `count` 4-byte units of `memory`, from a line's start. Memory may be null, which is how a size is found.
template <class T>
void take(T** to, void* memory, size_t count, size_t* size) {
    *to = memory ? reinterpret_cast<T*>(static_cast<char*>(memory) + *size) : nullptr;
    *size += (count * 4 + 63) / 64 * 64;
}

// Rows of the register tile of NV vectors: as many as the registers hold. They divide kStrip and kBackwardRows.
template <class P, int NV>
constexpr int tile_rows() {
    if (P::V::kVectors == 2) return 6;
    return NV == 4 ? 6 : NV == 3 ? 8 : 12;
}

// kAlong: a(m, t) = a[m * stride + t], else a[t * stride + m].
template <class P, bool kAlong, int NV, int M>
inline void tile(const typename P::Unit* a, int64_t stride, const typename P::Unit* b, int64_t b_stride, int steps,
                 float* c, int64_t c_stride, bool add) {
    using V = typename P::V;
    using F = typename V::F;
    constexpr int W = V::kWidth;
    F acc[M][NV];
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < NV; ++j) acc[m][j] = V::set1(0.f);
    for (int t = 0; t < steps; ++t, b += b_stride, a += kAlong ? 1 : stride) {
        typename P::Lanes x[NV];
        for (int j = 0; j < NV; ++j) x[j] = P::lanes(b + j * W);
        for (int m = 0; m < M; ++m) {
            const typename P::Lanes y = P::spread(a[kAlong ? m * stride : m]);
            for (int j = 0; j < NV; ++j) acc[m][j] = P::madd(y, x[j], acc[m][j]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < NV; ++j) {
            float* to = c + m * c_stride + j * W;
            V::store(to, add ? V::add(V::load(to), acc[m][j]) : acc[m][j]);
        }
}

template <class P, bool kAlong, int NV>
void columns(const typename P::Unit* a, int64_t stride, int rows, const typename P::Unit* b, int64_t b_stride,
             int steps, float* c, int64_t c_stride, bool add) {
    constexpr int M = tile_rows<P, NV>();
    const int64_t a_step = kAlong ? stride : 1;
    int m = 0;
    for (; m + M <= rows; m += M)
        tile<P, kAlong, NV, M>(a + m * a_step, stride, b, b_stride, steps, c + m * c_stride, c_stride, add);
    for (; m < rows; m += 2)
        tile<P, kAlong, NV, 2>(a + m * a_step, stride, b, b_stride, steps, c + m * c_stride, c_stride, add);
}

// `rows` is even, `b` and `c` are `vectors` vectors wide.
template <class P, bool kAlong>
void product(const typename P::Unit* a, int64_t stride, int rows, const typename P::Unit* b, int64_t b_stride,
             int vectors, int steps, float* c, int64_t c_stride, bool add) {
    constexpr int W = P::V::kWidth;
    while (vectors > 0) {
        int n = vectors < 2 ? 1 : 2;
        if constexpr (P::V::kVectors == 4) n = vectors == 4 || vectors > 6 ? 4 : vectors > 2 ? 3 : vectors;
        if constexpr (P::V::kVectors == 4) {
            if (n == 4) columns<P, kAlong, 4>(a, stride, rows, b, b_stride, steps, c, c_stride, add);
            if (n == 3) columns<P, kAlong, 3>(a, stride, rows, b, b_stride, steps, c, c_stride, add);
        }
        if (n == 2) columns<P, kAlong, 2>(a, stride, rows, b, b_stride, steps, c, c_stride, add);
        if (n == 1) columns<P, kAlong, 1>(a, stride, rows, b, b_stride, steps, c, c_stride, add);
        vectors -= n;
        b += n * W;
        c += n * W;
    }
}

// Sizes that follow from the head dim, in units.
template <class P>
struct Sizes {
    int channels, steps, width;  // of a row as `b` or `c`; of a sum over channels; of a row as `a`

    explicit Sizes(int head_dim)
        : channels(up(head_dim, P::V::kWidth)),
          steps(up(head_dim, P::kDepth) / P::kDepth),
          width(P::kDepth == 1 ? channels : up(head_dim, 16) / P::kDepth) {}
};

// exp2_lanes with a polynomial of one degree more: its error goes into every gradient, with nothing to divide it out.
template <class V>
inline typename V::F exp2_exact(typename V::F x) {
    const typename V::F rounding = V::set1(12582912.f + 127.f);
    x = V::max(V::set1(-126.f), x);
    const typename V::F n = V::add(x, rounding), f = V::sub(x, V::sub(n, rounding));
    typename V::F p = V::set1(1.534581243e-04f);
    p = V::fma(p, f, V::set1(1.339993090e-03f));
    p = V::fma(p, f, V::set1(9.618489072e-03f));
    p = V::fma(p, f, V::set1(5.550328642e-02f));
    p = V::fma(p, f, V::set1(2.402264625e-01f));
    p = V::fma(p, f, V::set1(6.931471825e-01f));
    p = V::fma(p, f, V::set1(1.f));
    return V::mul(p, V::exponent(n));
}

// p = 2^(s * scale - high - low). The LSE comes in two parts, because in powers of two its own rounding would be as
// large as the products'; the factor is the forward pass's, so that what it rounded away is missing on both sides.
template <class V>
inline typename V::F weight_of(typename V::F s, typename V::F scale, typename V::F high, typename V::F low) {
    return exp2_exact<V>(V::sub(V::fmsub(s, scale, high), low));
}

// A packed block of queries. Lanes and rows beyond the block's own are zero, which adds nothing to any sum.
template <class P>
struct Queries {
    float *lse, *lse_low, *delta;  // lse in the power-of-two domain: the sum of both
    typename P::Unit *turned_q, *turned_grad, *q, *grad;
    size_t size = 0;

    Queries(void* memory, int head_dim, int block_rows) {
        const Sizes<P> sizes(head_dim);
        const size_t rows = static_cast<size_t>(block_rows), turned = rows * sizes.steps;
        const size_t deep = rows / P::kDepth * sizes.channels;
        take(&lse, memory, rows, &size);
        take(&lse_low, memory, rows, &size);
        take(&delta, memory, rows, &size);
        take(&turned_q, memory, turned, &size);
        take(&turned_grad, memory, turned, &size);
        take(&q, memory, deep, &size);
        take(&grad, memory, deep, &size);
    }
};

template <class P>
size_t packed_bytes(int head_dim, int block_rows) {
    return Queries<P>(nullptr, head_dim, block_rows).size;
}

// delta = sum_d grad * out, in the very order in which dp is summed: where one key has all the weight, out is its value
// row and dp - delta is exactly zero.
template <class P>
void sum_of_products(const typename P::Unit* grad, const typename P::Unit* out, int steps, int lanes, float* delta) {
    using V = typename P::V;
    constexpr int run = kRunOfGrad / P::kDepth;
    for (int j = 0; j < lanes; j += V::kWidth)
        for (int first = 0; first < steps; first += run) {
            typename V::F sum = V::set1(0.f);
            for (int t = first; t < steps && t < first + run; ++t)
                sum = P::madd(P::lanes(out + t * lanes + j), P::lanes(grad + t * lanes + j), sum);
            V::store(delta + j, first > 0 ? V::add(V::load(delta + j), sum) : sum);
        }
}

template <class P>
void pack(const QueryPackJob& job) {
    using E = typename P::Element;
    const int lanes = up(job.rows, P::V::kWidth);
    const Sizes<P> sizes(job.head_dim);
    const Queries<P> to(job.packed, job.head_dim, lanes);
    const E *q = static_cast<const E*>(job.q), *grad = static_cast<const E*>(job.grad);
    const E* out = static_cast<const E*>(job.out);
    for (int r = 0; r < lanes; ++r) {
        const bool inside = r < job.rows;
        const double lse = inside ? job.lse[r] * 1.4426950408889634 : 0;
        to.lse[r] = static_cast<float>(lse);
        to.lse_low[r] = static_cast<float>(lse - to.lse[r]);
    }
    P::turn(grad, job.grad_stride, job.rows, lanes, job.head_dim, to.turned_grad);
    P::turn(out, job.out_stride, job.rows, lanes, job.head_dim, to.turned_q);  // until q takes its place
    sum_of_products<P>(to.turned_grad, to.turned_q, sizes.steps, lanes, to.delta);
    for (int r = 0; job.grad_lse && r < job.rows; ++r) to.delta[r] -= job.grad_lse[r];
    P::turn(q, job.q_stride, job.rows, lanes, job.head_dim, to.turned_q);
    P::deepen(q, job.q_stride, job.rows, lanes, job.head_dim, sizes.channels, to.q);
    P::deepen(grad, job.grad_stride, job.rows, lanes, job.head_dim, sizes.channels, to.grad);
}

template <class P>
struct KeyScratch {
    typename P::Unit *k, *v, *deep_k, *p, *ds, *deep_ds;
    float *s, *dp, *dk, *dv;
    size_t size = 0;

    KeyScratch(void* memory, int head_dim) {
        const Sizes<P> sizes(head_dim);
        constexpr size_t lanes = kBackwardRows, square = lanes * lanes / P::kDepth, rows = P::kKeyRows;
        take(&k, memory, rows * sizes.width, &size);
        take(&v, memory, rows * sizes.width, &size);
        take(&p, memory, square, &size);
        take(&ds, memory, square, &size);
        deep_k = k;
        deep_ds = ds;
        if (P::kDepth > 1) take(&deep_k, memory, rows / P::kDepth * sizes.channels, &size);
        if (P::kDepth > 1) take(&deep_ds, memory, square, &size);
        take(&s, memory, kStrip * lanes, &size);
        take(&dp, memory, kStrip * lanes, &size);
        take(&dk, memory, rows * sizes.channels, &size);
        take(&dv, memory, rows * sizes.channels, &size);
    }
};

template <class P>
size_t key_scratch_bytes(int head_dim) {
    return KeyScratch<P>(nullptr, head_dim).size;
}

// A strip of scores or of dp, in runs of `run` steps.
template <class P>
void scores(int run, const typename P::Unit* a, const Sizes<P>& sizes, int rows, const typename P::Unit* turned,
            int vectors, float* to) {
    const int lanes = vectors * P::V::kWidth;
    for (int t = 0; t < sizes.steps; t += run)
        product<P, true>(a + t, sizes.width, rows, turned + t * lanes, lanes, vectors,
                         sizes.steps - t < run ? sizes.steps - t : run, to, lanes, t > 0);
}

// p and ds of keys [first, first + rows) of a block against a block of queries, a strip of keys at a time.
template <class P>
void weigh(const KeyBlockJob& job, int first, int rows, const Queries<P>& queries, int lanes, const KeyScratch<P>& to) {
    const Sizes<P> sizes(job.head_dim);
    const int vectors = lanes / P::V::kWidth;
    const typename P::Unit *k = to.k + first * sizes.width, *v = to.v + first * sizes.width;
    for (int at = 0; at < rows; at += kStrip) {
        const int own = rows - at < kStrip ? rows - at : kStrip, strip = up(own, 2);
        scores<P>(kRun / P::kDepth, k + at * sizes.width, sizes, strip, queries.turned_q, vectors, to.s);
        scores<P>(kRunOfGrad / P::kDepth, v + at * sizes.width, sizes, strip, queries.turned_grad, vectors, to.dp);
        P::weigh(to.s, to.dp, own, lanes, job.scale_log2, job.bias_log2, queries, to.p + at * lanes / P::kDepth,
                 to.ds + at * lanes / P::kDepth, to.deep_ds + at / P::kDepth * lanes);
    }
}

// All five products of keys [first, first + rows) against query block i.
template <class P>
void run_pair(const KeyBlockJob& job, int first, int rows, int64_t i, const KeyScratch<P>& own) {
    const Sizes<P> sizes(job.head_dim);
    const int64_t left = job.frame_rows - i % job.blocks_per_frame * job.block_rows;
    const int lanes = up(static_cast<int>(left < job.block_rows ? left : job.block_rows), P::V::kWidth);
    const Queries<P> queries(const_cast<char*>(job.packed + i * job.packed_stride), job.head_dim, lanes);
    weigh<P>(job, first, rows, queries, lanes, own);
    const int c = sizes.channels, vectors = c / P::V::kWidth, depth = lanes / P::kDepth, keys = up(rows, 2);
    if (job.dv) product<P, true>(own.p, depth, keys, queries.grad, c, vectors, depth, own.dv + first * c, c, true);
    if (job.dk) product<P, true>(own.ds, depth, keys, queries.q, c, vectors, depth, own.dk + first * c, c, true);
    if (job.dq)
        product<P, false>(own.deep_ds, lanes, lanes, own.deep_k + first / P::kDepth * c, c, vectors, keys / P::kDepth,
                          job.dq + i * job.dq_stride, c, true);
}

template <class E>
void write_rows(const float* from, int64_t from_stride, int rows, int head_dim, float scale, void* to, int64_t stride) {
    for (int r = 0; r < rows; ++r)
        for (int d = 0; d < head_dim; ++d)
            from_f32(from[r * from_stride + d] * scale, static_cast<E*>(to) + r * stride + d);
}

template <class P>
void run_keys(const KeyBlockJob& job, void* memory) {
    using E = typename P::Element;
    const Sizes<P> sizes(job.head_dim);
    const KeyScratch<P> own(memory, job.head_dim);
    const int rows = up(job.rows, 2);
    P::spell(static_cast<const E*>(job.k), job.k_stride, job.rows, rows, job.head_dim, sizes.width, own.k);
    P::spell(static_cast<const E*>(job.v), job.v_stride, job.rows, rows, job.head_dim, sizes.width, own.v);
    if (P::kDepth > 1)
        P::deepen(static_cast<const E*>(job.k), job.k_stride, job.rows, rows, job.head_dim, sizes.channels, own.deep_k);
    std::memset(own.dk, 0, sizeof(float) * rows * sizes.channels);
    std::memset(own.dv, 0, sizeof(float) * rows * sizes.channels);
    for (int64_t i = job.first; i < job.last; ++i)
        for (int first = 0; first < job.rows; first += kBackwardRows)
            run_pair<P>(job, first, job.rows - first < kBackwardRows ? job.rows - first : kBackwardRows, i, own);
    if (job.dk) write_rows<E>(own.dk, sizes.channels, job.rows, job.head_dim, job.scale, job.dk, job.grad_stride);
    if (job.dv) write_rows<E>(own.dv, sizes.channels, job.rows, job.head_dim, 1.f, job.dv, job.grad_stride);
}

template <class P>
int sum_channels(int head_dim) {
    return Sizes<P>(head_dim).channels;
}

template <class P>
void sum_queries(const QuerySumJob& job) {
    using V = typename P::V;
    using E = typename P::Element;
    const int channels = Sizes<P>(job.head_dim).channels;
    alignas(64) float row[256];
    for (int r = 0; r < job.rows; ++r) {
        for (int d = 0; d < channels; d += V::kWidth) {
            typename V::F sum = V::set1(0.f);
            for (int i = 0; i < job.num_parts; ++i) sum = V::add(sum, V::load(job.parts[i] + r * channels + d));
            V::store(row + d, sum);
        }
        write_rows<E>(row, 0, 1, job.head_dim, job.scale, static_cast<E*>(job.dq) + r * job.dq_stride, 0);
    }
}

template <class P>
constexpr AttentionBackwardKernel make_backward_kernel() {
    return {P::kKeyRows, &packed_bytes<P>, &sum_channels<P>, &key_scratch_bytes<P>,
            &pack<P>,    &run_keys<P>,     &sum_queries<P>};
}

}  // namespace
}  // namespace avatar_rt::cpu
