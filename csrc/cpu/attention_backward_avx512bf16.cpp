// The backward pass in bf16 by vdpbf16ps: a unit is a pair of neighbours along the summed axis. p and ds are rounded
// to bf16 as they are stored; products, sums, exponentials and delta are fp32.
#include "cpu/attention_backward_tile.h"
#include "cpu/vector_avx512.h"

namespace avatar_rt::cpu {
namespace {

struct BackwardPairs {
    using V = Avx512;
    using F = __m512;
    using Element = uint16_t;
    using Unit = uint32_t;
    using Lanes = __m512i;
    static constexpr int kDepth = 2, kKeyRows = 96;

    static __m512i lanes(const uint32_t* p) { return _mm512_loadu_si512(p); }
    static __m512i spread(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
    static F madd(__m512i a, __m512i b, F acc) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }

    static uint32_t pair(uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; }

    // [pair of channels][row]
    static void turn(const uint16_t* x, int64_t stride, int rows, int lanes, int head_dim, uint32_t* to) {
        for (int r = 0; r < lanes; ++r) {
            const uint16_t* row = x + r * stride;
            for (int d = 0; d < head_dim; d += 2)
                to[d / 2 * lanes + r] = r < rows ? pair(row[d], d + 1 < head_dim ? row[d + 1] : 0) : 0u;
        }
    }

    // [pair of rows][channel], zero beyond the rows and channels.
    static void deepen(const uint16_t* x, int64_t stride, int rows, int padded, int head_dim, int width, uint32_t* to) {
        for (int r = 0; r < padded; r += 2, to += width) {
            const uint16_t *even = x + r * stride, *odd = even + stride;
            const int both = r + 1 < rows ? head_dim : 0, own = r < rows ? head_dim : 0;
            for (int d = 0; d < both; ++d) to[d] = pair(even[d], odd[d]);
            for (int d = both; d < own; ++d) to[d] = even[d];
            for (int d = own; d < width; ++d) to[d] = 0;
        }
    }

    // Rows as broadcasts read them: pairs of channels, where they lie.
    static void spell(const uint16_t* x, int64_t stride, int rows, int padded, int head_dim, int width, uint32_t* to) {
        for (int r = 0; r < padded; ++r, to += width) {
            const size_t own = r < rows ? 2 * static_cast<size_t>(head_dim) : 0;
            std::memset(to, 0, 4 * static_cast<size_t>(width));
            if (own) std::memcpy(to, x + r * stride, own);
        }
    }

    // A row of bf16 from each half of `both`, and their elements side by side.
    static void store(__m512i both, uint32_t* low, uint32_t* high) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), _mm512_castsi512_si256(both));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), _mm512_extracti64x4_epi64(both, 1));
    }

    static void weigh(const float* s, const float* dp, int rows, int lanes, float scale_log2, float bias_log2,
                      const Queries<BackwardPairs>& queries, uint32_t* p, uint32_t* ds, uint32_t* deep_ds) {
        alignas(64) static const uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                             21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                             11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const __m512i order = _mm512_load_si512(kInterleave);
        const F factor = V::set1(scale_log2), zero = V::set1(0.f);
        const int half = lanes / 2;
        for (int j = 0; j < lanes; j += 16) {
            const F high = V::load(queries.lse + j), mean = V::load(queries.delta + j);
            const F low = V::sub(V::load(queries.lse_low + j), V::set1(bias_log2));
            for (int k = 0; k < rows; k += 2) {
                const float *even = s + k * lanes + j, *even_dp = dp + k * lanes + j;
                const F p0 = weight_of<V>(V::load(even), factor, high, low);
                const F ds0 = V::mul(p0, V::sub(V::load(even_dp), mean));
                F p1 = zero, ds1 = zero;
                if (k + 1 < rows) {
                    p1 = weight_of<V>(V::load(even + lanes), factor, high, low);
                    ds1 = V::mul(p1, V::sub(V::load(even_dp + lanes), mean));
                }
                const int at = k * half + j / 2;
                store((__m512i)_mm512_cvtne2ps_pbh(p1, p0), p + at, p + at + half);
                const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(ds1, ds0);
                store(both, ds + at, ds + at + half);
                _mm512_storeu_si512(deep_ds + k * half + j, _mm512_permutexvar_epi16(order, both));
            }
        }
    }
};

}  // namespace

const AttentionBackwardKernel kAttentionBackwardBf16Avx512bf16 = make_backward_kernel<BackwardPairs>();

}  // namespace avatar_rt::cpu
