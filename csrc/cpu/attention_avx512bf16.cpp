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
        uint32_t* v;  // [pair of keys][channel], the even key in the low half
        int rows;
    };

    static size_t block_bytes(int head_dim) { return kBlock / 2 * sizeof(uint32_t) * ((head_dim + 15) / 16 * 16); }
    static void place(Block* block, void* memory) { block->v = static_cast<uint32_t*>(memory); }

    static void fill(Block* block, const uint16_t* k, int64_t k_stride, const uint16_t* v, int64_t v_stride, int rows,
                     int head_dim) {
        block->k = k;
        block->k_stride = k_stride;
        block->rows = rows;
        uint32_t* to = block->v;
        for (int s = 0; s < rows; s += 2, to += head_dim) {
            const uint16_t *even = v + s * v_stride, *odd = even + v_stride;
            const bool whole = s + 1 < rows;
            int d = 0;
            for (; whole && d + 16 <= head_dim; d += 16) {
                const __m512i low =
                    _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + d)));
                const __m512i high =
                    _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + d)));
                _mm512_storeu_si512(to + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
            for (; d < head_dim; ++d) to[d] = even[d] | (whole ? static_cast<uint32_t>(odd[d]) << 16 : 0u);
        }
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
        for (; d + 6 <= head_dim; d += 6) value_pairs<NV, 6>(b.v + d, head_dim, pairs, w, out + d * NV * 16, alpha);
        for (; d + 2 <= head_dim; d += 2) value_pairs<NV, 2>(b.v + d, head_dim, pairs, w, out + d * NV * 16, alpha);
        if (d < head_dim) value_pairs<NV, 1>(b.v + d, head_dim, pairs, w, out + d * NV * 16, alpha);
    }
};

}  // namespace

const AttentionKernel kAttentionBf16Avx512bf16 = make_kernel<PairPolicy>();

}  // namespace avatar_rt::cpu
