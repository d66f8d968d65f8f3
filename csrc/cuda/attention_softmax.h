// Online softmax on the registers of one thread, for every kernel: mma.sync m16n8k16 and wgmma m64nNk16 hand a warp's
// 16 rows of scores to its lanes in one and the same order (attention_layout.h), and take weights back in it.
//
// Per query: top is the running maximum in the log2 domain, sum the running sum of 2^(s - top). A new tile raises top,
// shrinks what was summed before by 2^(old - new), and adds its own weights.
#pragma once

#include "cuda/attention_layout.h"
#include "cuda/attention_walk.h"

namespace avatar_rt::cuda {

// What one thread holds of `kRowTiles` times 16 queries; index [half] is row lane / 4 and that row plus 8.
template <int kRowTiles, int kKeys, int kDim>
struct Registers {
    float score[kRowTiles][kKeys / 8][4];       // products, then weights
    uint32_t weight[kRowTiles][kKeys / 16][4];  // weights as the A operand of the second product
    float out[kRowTiles][kDim / 8][4];
    float top[kRowTiles][2], sum[kRowTiles][2];
    float peak[kRowTiles][2];    // largest product in this tile: of the thread, then of its query
    float shrink[kRowTiles][2];  // factor on out, from this tile's rise of top
    uint32_t a[kRowTiles][4], b[4];

    AVATAR_RT_DEVICE void clear() {
        unrolled<kRowTiles>([&](int r) {
            unrolled<2>([&](int h) { top[r][h] = kNone, sum[r][h] = 0, shrink[r][h] = 1; });
            unrolled<kDim / 8>([&](int j) { unrolled<4>([&](int i) { out[r][j][i] = 0; }); });
        });
    }

    // Scores of keys that a query does not see become kNone. `row` is the query of this thread's r = 0, half = 0.
    AVATAR_RT_DEVICE void mask(const Problem& p, const KeyTile& tile, int32_t row, int lane) {
        each_query([&](int r, int h) {
            const Rows seen = rows_of(p, tile, row + 16 * r + 8 * h);
            const int32_t first = tile.begin + column_of(lane, 0);
            const int32_t begin = seen.begin - first, end = seen.end - first;
            unrolled<kKeys / 8>([&](int j) {
                unrolled<2>([&](int e) {
                    if (8 * j + e < begin || 8 * j + e >= end) score[r][j][2 * h + e] = kNone;
                });
            });
        });
    }

    AVATAR_RT_DEVICE void find_peak() {
        each_query([&](int r, int h) {
            float found = kNone;
            unrolled<kKeys / 8>(
                [&](int j) { found = fmaxf(found, fmaxf(score[r][j][2 * h], score[r][j][2 * h + 1])); });
            peak[r][h] = found;
        });
    }

    // Scores to weights, once peak is the query's. kNone becomes exactly 0, whichever way 2^x is taken. Which way is a
    // matter of the key's column alone, so that a query's bits do not depend on where it stands.
    template <int kPolynomialOf8>
    AVATAR_RT_DEVICE void weigh(float scale, float bias) {
        each_query([&](int r, int h) {
            const float risen = fmaxf(top[r][h], fmaf(peak[r][h], scale, bias));
            const float base = risen == kNone ? 0.0f : risen;  // a query that has seen nothing yet
            shrink[r][h] = exp2_unit(top[r][h] - base);
            top[r][h] = risen;
            const float offset = bias - base;
            float total = sum[r][h] * shrink[r][h];
            unrolled<kKeys / 8>([&](int j) {
                unrolled<2>([&](int e) {
                    float& s = score[r][j][2 * h + e];
                    const float x = fmaf(s, scale, offset);
                    s = j % 8 < kPolynomialOf8 ? exp2_polynomial(x) : exp2_unit(x);
                });
                total += score[r][j][2 * h] + score[r][j][2 * h + 1];
            });
            sum[r][h] = total;
        });
    }

    AVATAR_RT_DEVICE void rescale() {
        each_query([&](int r, int h) {
            unrolled<kDim / 8>([&](int j) {
                out[r][j][2 * h] *= shrink[r][h];
                out[r][j][2 * h + 1] *= shrink[r][h];
            });
        });
    }

    // Two neighbouring accumulator tiles of 8 keys are one A operand of 16: no lane needs another's registers.
    template <class T>
    AVATAR_RT_DEVICE void pack() {
        unrolled<kRowTiles>([&](int r) {
            unrolled<kKeys / 16>([&](int j) {
                unrolled<4>([&](int i) {
                    const float* s = score[r][2 * j + i / 2] + 2 * (i % 2);
                    weight[r][j][i] = T::pack(s[0], s[1]);
                });
            });
        });
    }

    // Divide by the sums (the query's by now) and write out and LSE of the queries that exist.
    template <class T>
    AVATAR_RT_DEVICE void store(const Problem& p, int32_t row, int lane, int32_t head, int32_t batch) const {
        each_query([&](int r, int h) {
            const int32_t query = row + 16 * r + 8 * h;
            if (query >= p.queries) return;
            const float factor = 1.0f / sum[r][h];
            const int64_t line = (static_cast<int64_t>(batch) * p.queries + query) * p.heads + head;
            uint32_t* to = static_cast<uint32_t*>(p.out) + (line * kDim + column_of(lane, 0)) / 2;
            unrolled<kDim / 8>(
                [&](int j) { to[4 * j] = T::pack(out[r][j][2 * h] * factor, out[r][j][2 * h + 1] * factor); });
            if (p.lse == nullptr || lane % 4) return;
            constexpr float kLn2 = 0.69314718056f;
            p.lse[(static_cast<int64_t>(batch) * p.heads + head) * p.queries + query] =
                (top[r][h] + log2f(sum[r][h])) * kLn2;
        });
    }

  private:
    template <class F>
    static AVATAR_RT_DEVICE void each_query(F&& f) {
        unrolled<kRowTiles>([&](int r) { unrolled<2>([&](int h) { f(r, h); }); });
    }
};

}  // namespace avatar_rt::cuda
