// The sm_80 kernel above its instructions: 4 warps of 32 queries, K and V tiles in a ring of slots, mma.sync.
//
// `Team` is a thread block: on a GPU each thread is one (attention_sm80.cu), on a CPU one object plays all 128
// (attention_emulated_sm80.cpp). It provides
//   each(f)                    f(registers, thread) for every thread
//   copy16(to, from, exists)   starts to copy 16 bytes into shared memory, zeros where `exists` is false; per thread
//   commit(), wait_copies<n>(), sync()
//   ldmatrix(registers, address), ldmatrix_transposed(..), mma<T>(c, a, b)   per warp, operands chosen by functions
//   quad_max(value), quad_sum(value)   over the four lanes that share a row
#pragma once

#include "cuda/attention_softmax.h"

namespace avatar_rt::cuda {

// Where a thread block works.
struct Place {
    int32_t query, head, batch;  // query: the first of its tile
};

// Rows of one operand, strides in bytes.
struct Source {
    const unsigned char* data;
    int64_t batch_stride, row_stride, head_stride;
};

struct Sources {
    Source q, k, v, ref_k, ref_v;
};

template <class Tile>
using RegistersOf = Registers<Tile::kRowTiles, Tile::kKeys, Tile::kDim>;

// The query of a thread's r = 0, half = 0.
template <class Tile>
AVATAR_RT_DEVICE int32_t query_of(const Place& at, int thread) {
    return at.query + thread / 32 * 16 * Tile::kRowTiles + thread % 32 / 4;
}

// Scores to weights; both kernels.
template <class Tile, class Team>
AVATAR_RT_DEVICE void softmax(Team& team, const Problem& p, const KeyTile& tile, const Place& at) {
    using R = RegistersOf<Tile>;
    const float bias = tile.reference ? p.bias : 0.0f;
    if (tile.masked) team.each([&](R& t, int thread) { t.mask(p, tile, query_of<Tile>(at, thread), thread % 32); });
    team.each([](R& t, int) { t.find_peak(); });
    unrolled<Tile::kRowTiles>(
        [&](int r) { unrolled<2>([&](int h) { team.quad_max([&](R& t) -> float& { return t.peak[r][h]; }); }); });
    team.each([&](R& t, int) { t.template weigh<Tile::kPolynomialOf8>(p.scale, bias); });
}

template <class T, class Tile, class Team>
AVATAR_RT_DEVICE void finish(Team& team, const Problem& p, const Place& at) {
    using R = RegistersOf<Tile>;
    unrolled<Tile::kRowTiles>(
        [&](int r) { unrolled<2>([&](int h) { team.quad_sum([&](R& t) -> float& { return t.sum[r][h]; }); }); });
    team.each(
        [&](R& t, int thread) { t.template store<T>(p, query_of<Tile>(at, thread), thread % 32, at.head, at.batch); });
}

template <class Tile, int kRows, class Team>
AVATAR_RT_DEVICE void copy_rows(Team& team, uint32_t to, const Source& from, const Place& at, int32_t begin,
                                int32_t rows) {
    constexpr int kChunks = Tile::kRowBytes / 16, kStep = Tile::kThreads / kChunks;
    static_assert(kStep % 8 == 0 && kRows % kStep == 0, "a thread keeps its chunk's place in the swizzle");
    team.each([&](RegistersOf<Tile>&, int thread) {
        const int row = thread / kChunks, chunk = thread % kChunks;
        const uint32_t place = to + swizzled<Tile::kRowBytes>(row, chunk);
        const unsigned char* data = from.data + at.batch * from.batch_stride + at.head * from.head_stride +
                                    (begin + row) * from.row_stride + 16 * chunk;
        unrolled<kRows / kStep>([&](int i) {
            team.copy16(place + i * kStep * Tile::kRowBytes, data, begin + row + i * kStep < rows);
            data += kStep * from.row_stride;
        });
    });
}

// score = Q K^T, for one tile of keys.
template <class T, class Tile, class Team>
AVATAR_RT_DEVICE void multiply_keys(Team& team, uint32_t q, uint32_t k) {
    using R = RegistersOf<Tile>;
    constexpr int kBytes = Tile::kRowBytes;
    team.each([](R& t, int) {
        unrolled<Tile::kRowTiles>([&](int r) {
            unrolled<Tile::kKeys / 8>([&](int j) { unrolled<4>([&](int i) { t.score[r][j][i] = 0; }); });
        });
    });
    unrolled_by<Tile::kDim / 16, 4>([&](int d) {
        unrolled<Tile::kRowTiles>([&](int r) {
            team.ldmatrix([&](R& t) { return t.a[r]; },
                          [&](int thread) {
                              const int row = 16 * (thread / 32 * Tile::kRowTiles + r) + a_row(thread % 32);
                              return step_of<kBytes>(q, row, a_chunk(thread % 32), d);
                          });
        });
        unrolled<Tile::kKeys / 16>([&](int j) {
            team.ldmatrix([&](R& t) { return t.b; },
                          [&](int thread) {
                              const int row = 16 * j + b_row(thread % 32);
                              return step_of<kBytes>(k, row, b_chunk(thread % 32), d);
                          });
            unrolled<Tile::kRowTiles>([&](int r) {
                unrolled<2>([&](int half) {
                    team.template mma<T>([&](R& t) { return t.score[r][2 * j + half]; },  //
                                         [&](R& t) { return t.a[r]; }, [&](R& t) { return t.b + 2 * half; });
                });
            });
        });
    });
}

// out += weight V, for one tile of keys.
template <class T, class Tile, class Team>
AVATAR_RT_DEVICE void multiply_values(Team& team, uint32_t v) {
    using R = RegistersOf<Tile>;
    unrolled<Tile::kKeys / 16>([&](int k) {
        unrolled<Tile::kDim / 16>([&](int d) {
            team.ldmatrix_transposed([&](R& t) { return t.b; },
                                     [&](int thread) {
                                         const int row = 16 * k + a_row(thread % 32);
                                         return step_of<Tile::kRowBytes>(v, row, a_chunk(thread % 32), d);
                                     });
            unrolled<Tile::kRowTiles>([&](int r) {
                unrolled<2>([&](int half) {
                    team.template mma<T>([&](R& t) { return t.out[r][2 * d + half]; },
                                         [&](R& t) { return t.weight[r][k]; }, [&](R& t) { return t.b + 2 * half; });
                });
            });
        });
    });
}

template <class T, class Tile, class Team>
AVATAR_RT_DEVICE void attend_sm80(Team& team, const Problem& p, const Sources& from, const Place& at, uint32_t shared) {
    using R = RegistersOf<Tile>;
    const KeyWalk<Tile::kKeys> walk(p, at.query, Tile::kQueries);
    const int32_t tiles = walk.count();
    const auto address = [&](int32_t slot) -> uint32_t { return shared + Tile::kQueryBytes + slot * Tile::kSlotBytes; };
    // Loads are K of tile 0, V of tile 0, K of tile 1 .. ; each is a group, an empty one past the end.
    const auto load = [&](int32_t i, int32_t slot) {
        if (i < 2 * tiles) {
            const KeyTile tile = walk[i / 2];
            const Source& source = tile.reference ? (i % 2 ? from.ref_v : from.ref_k) : (i % 2 ? from.v : from.k);
            copy_rows<Tile, Tile::kKeys>(team, address(slot), source, at, tile.begin,
                                         tile.reference ? p.reference : p.fresh);
        }
        team.commit();
    };
    int32_t last = Tile::kSlots - 1;  // the slot of the load that was used up last
    // After this, load i has arrived and everybody is done with load i - 1, whose slot is filled again. Its address.
    const auto arrive = [&](int32_t i) -> uint32_t {
        team.template wait_copies<Tile::kSlots - 2>();
        team.sync();
        load(i + Tile::kSlots - 1, last);
        last = last + 1 == Tile::kSlots ? 0 : last + 1;
        return address(last);
    };
    copy_rows<Tile, Tile::kQueries>(team, shared, from.q, at, at.query, p.queries);
    for (int32_t i = 0; i < Tile::kSlots - 1; ++i) load(i, i);
    team.each([](R& t, int) { t.clear(); });
    for (int32_t j = 0; j < tiles; ++j) {
        multiply_keys<T, Tile>(team, shared, arrive(2 * j));
        softmax<Tile>(team, p, walk[j], at);
        team.each([](R& t, int) {
            t.rescale();
            t.template pack<T>();
        });
        multiply_values<T, Tile>(team, arrive(2 * j + 1));
    }
    finish<T, Tile>(team, p, at);
}

}  // namespace avatar_rt::cuda
