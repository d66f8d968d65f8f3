// bf16 by vdpbf16ps, which multiplies pairs: queries are packed in pairs of channels, keys are broadcast pair by pair
// where they lie, weights and values go in pairs of keys. Products and sums are fp32; weights are rounded to bf16.
#include "cpu/attention_tile.h"
#include "cpu/vector_avx512.h"

namespace avatar_rt::cpu {
namespace {

using V = Avx512;
using F = __m512;

inline F dot(F acc, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}

inline __m512i pair_of(const uint16_t* p) {
    int bits;
    std::memcpy(&bits, p, 4);
    return _mm512_set1_epi32(bits);
}

template <int NV, int M>
inline void dot_step(F (&acc)[M][NV], const uint32_t* lanes, const __m512i (&rows)[M]) {
    __m512i x[NV];
    for (int j = 0; j < NV; ++j) x[j] = _mm512_loadu_si512(lanes + j * 16);
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < NV; ++j) acc[m][j] = dot(acc[m][j], rows[m], x[j]);
}

template <int NV, int M>
void score_pairs(const uint16_t* k, int64_t stride, const uint32_t* q, int head_dim, float* scores, F* peak) {
    F acc[M][NV];
    __m512i key[M];
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < NV; ++j) acc[m][j] = _mm512_setzero_ps();
    for (int d = 0; d + 2 <= head_dim; d += 2, q += NV * 16) {
        for (int m = 0; m < M; ++m) key[m] = pair_of(k + m * stride + d);
        dot_step<NV, M>(acc, q, key);
    }
    if (head_dim % 2) {  // the row ends on half a pair: never read past it
        for (int m = 0; m < M; ++m) key[m] = _mm512_set1_epi32(k[m * stride + head_dim - 1]);
        dot_step<NV, M>(acc, q, key);
    }
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < NV; ++j) {
            _mm512_storeu_ps(scores + (m * NV + j) * 16, acc[m][j]);
            peak[j] = V::max(acc[m][j], peak[j]);
        }
}

template <int NV, int M>
void value_pairs(const uint32_t* v, int64_t stride, int pairs, const uint32_t* weights, float* out, const F* alpha) {
    F acc[M][NV];
    __m512i value[M];
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < NV; ++j) acc[m][j] = _mm512_setzero_ps();
    for (int s = 0; s < pairs; ++s, v += stride, weights += NV * 16) {
        for (int m = 0; m < M; ++m) value[m] = _mm512_set1_epi32(static_cast<int>(v[m]));
        dot_step<NV, M>(acc, weights, value);
    }
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < NV; ++j) {
            float* to = out + (m * NV + j) * 16;
            V::store(to, alpha ? V::fma(V::load(to), alpha[j], acc[m][j]) : acc[m][j]);
        }
}

struct PairPolicy {
    using V = Avx512;
    using Element = uint16_t;
    using PackedQ = uint32_t;

    struct Block {
        const uint16_t* k;
        int64_t k_stride;
        const uint32_t* v;  // [pair of keys][channel], the even key in the low half
        int rows;
        uint16_t* own_k;  // memory for what cannot be read in place
        uint32_t* own_v;
    };

    static size_t block_bytes(int head_dim) { return 2 * half_bytes(head_dim); }
    static size_t half_bytes(int head_dim) { return kBlock * sizeof(uint16_t) * ((head_dim + 31) / 32 * 32); }
    static void place(Block* block, void* memory) { block->own_k = static_cast<uint16_t*>(memory); }

    static void fill(Block* block, const KeyRange& range, int64_t first, int rows, int head_dim) {
        block->rows = rows;
        block->own_v = reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(block->own_k) + half_bytes(head_dim));
        block->v = block->own_v;
        if (range.layout == KeyLayout::int8) return fill_int8(block, range, first, head_dim);
        copy_keys(block, static_cast<const uint16_t*>(range.k) + first * range.k_stride, range.k_stride, head_dim);
        if (range.layout == KeyLayout::pairs) {
            block->v = static_cast<const uint32_t*>(range.v) + first / 2 * head_dim;
            if (rows % 2) drop_last_half(block, head_dim);
            return;
        }
        const uint16_t* v = static_cast<const uint16_t*>(range.v) + first * range.v_stride;
        for (int s = 0; s < rows; s += 2, v += 2 * range.v_stride)
            interleave(v, s + 1 < rows ? v + range.v_stride : nullptr, head_dim, block->own_v + s / 2 * head_dim);
    }

    // Beyond the last row of an odd number anything may lie, and zero times a NaN is a NaN.
    static void drop_last_half(Block* block, int head_dim) {
        const int whole = block->rows / 2 * head_dim;
        std::memcpy(block->own_v, block->v, whole * sizeof(uint32_t));
        for (int d = whole; d < whole + head_dim; ++d) block->own_v[d] = block->v[d] & 0xffffu;
        block->v = block->own_v;
    }

    static void copy_keys(Block* block, const uint16_t* k, int64_t stride, int head_dim) {
        block->k = block->own_k;
        block->k_stride = head_dim;
        for (int s = 0; s < block->rows; ++s)
            std::memcpy(block->own_k + s * head_dim, k + s * stride, head_dim * sizeof(uint16_t));
    }

    static void fill_int8(Block* block, const KeyRange& range, int64_t first, int head_dim) {
        block->k = block->own_k;
        block->k_stride = head_dim;
        uint16_t row[2][kMaxHeadDim];
        for (int s = 0; s < block->rows; ++s) {
            const int64_t at = first + s;
            widen_as<uint16_t>(static_cast<const int8_t*>(range.k) + at * range.k_stride, range.k_scale[at], head_dim,
                               block->own_k + s * head_dim);
            widen_as<uint16_t>(static_cast<const int8_t*>(range.v) + at * range.v_stride, range.v_scale[at], head_dim,
                               row[s % 2]);
            if (s % 2 || s + 1 == block->rows)
                interleave(row[0], s % 2 ? row[1] : nullptr, head_dim, block->own_v + s / 2 * head_dim);
        }
    }

    // `odd` is null when the block ends on half a pair.
    static void interleave(const uint16_t* even, const uint16_t* odd, int head_dim, uint32_t* to) {
        int d = 0;
        for (; odd && d + 16 <= head_dim; d += 16) {
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + d)));
            const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + d)));
            _mm512_storeu_si512(to + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
        for (; d < head_dim; ++d) to[d] = even[d] | (odd ? static_cast<uint32_t>(odd[d]) << 16 : 0u);
    }

    static void pack(const uint16_t* q, int64_t stride, int rows, int lanes, int head_dim, uint32_t* packed) {
        for (int d = 0; d < head_dim; d += 2)
            for (int r = 0; r < lanes; ++r) {
                const uint16_t* row = q + r * stride;
                const uint32_t high = r < rows && d + 1 < head_dim ? row[d + 1] : 0u;
                packed[d / 2 * lanes + r] = (r < rows ? row[d] : 0u) | high << 16;
            }
    }

    template <int NV>
    static void scores(const Block& b, const uint32_t* q, int head_dim, float* out, F* peak) {
        const uint16_t* k = b.k;
        int s = 0;
        for (; s + 6 <= b.rows; s += 6)
            score_pairs<NV, 6>(k + s * b.k_stride, b.k_stride, q, head_dim, out + s * NV * 16, peak);
        for (; s + 2 <= b.rows; s += 2)
            score_pairs<NV, 2>(k + s * b.k_stride, b.k_stride, q, head_dim, out + s * NV * 16, peak);
        if (s < b.rows) score_pairs<NV, 1>(k + s * b.k_stride, b.k_stride, q, head_dim, out + s * NV * 16, peak);
    }

    // Weights replace the scores: two rows of fp32 become one row of pairs, behind the reading position.
    template <int NV>
    static void weights(int rows, float* scores, F scale, const F* peak, F* sum) {
        alignas(64) static const uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                             21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                             11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const __m512i order = _mm512_load_si512(kInterleave);
        float* to = scores;
        for (int j = 0; j < NV; ++j) sum[j] = _mm512_setzero_ps();
        for (int s = 0; s < rows; s += 2, scores += 2 * NV * 16, to += NV * 16) {
            const bool whole = s + 1 < rows;
            for (int j = 0; j < NV; ++j) {
                const F even = exp2_lanes<V>(V::fmsub(V::load(scores + j * 16), scale, peak[j]));
                F odd = _mm512_setzero_ps();
                if (whole) odd = exp2_lanes<V>(V::fmsub(V::load(scores + (NV + j) * 16), scale, peak[j]));
                sum[j] = V::add(sum[j], V::add(even, odd));
                const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
                _mm512_storeu_si512(to + j * 16, _mm512_permutexvar_epi16(order, both));
            }
        }
    }

    template <int NV>
    static void values(const Block& b, const float* weights, int head_dim, float* out, const F* alpha) {
        const uint32_t* w = reinterpret_cast<const uint32_t*>(weights);
        const int pairs = (b.rows + 1) / 2;
        int d = 0;
        for (; d + 6 <= head_dim && head_dim - d != 8; d += 6)
            value_pairs<NV, 6>(b.v + d, head_dim, pairs, w, out + d * NV * 16, alpha);
        for (; d + 4 <= head_dim; d += 4) value_pairs<NV, 4>(b.v + d, head_dim, pairs, w, out + d * NV * 16, alpha);
        for (; d + 2 <= head_dim; d += 2) value_pairs<NV, 2>(b.v + d, head_dim, pairs, w, out + d * NV * 16, alpha);
        if (d < head_dim) value_pairs<NV, 1>(b.v + d, head_dim, pairs, w, out + d * NV * 16, alpha);
    }
};

}  // namespace

const AttentionKernel kAttentionBf16Avx512bf16 = make_kernel<PairPolicy>();

}  // namespace avatar_rt::cpu
