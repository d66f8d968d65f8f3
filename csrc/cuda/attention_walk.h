// Which keys a tile of queries visits: the tiles of the fresh rows within the band, then those of the reference.
//
// Tiles of fresh keys begin at multiples of the tile, wherever the band begins. So a query meets its keys in the same
// tiles and registers whatever its neighbours see, and a tile in which it sees nothing changes none of its bits.
#pragma once

#include "cuda/attention_problem.h"
#include "cuda/numbers.h"

namespace avatar_rt::cuda {

struct Rows {
    int32_t begin, end;
};

struct KeyTile {
    int32_t begin;   // first row, in its segment
    bool reference;  // else fresh
    bool masked;     // some query of the tile does not see some of its keys
};

AVATAR_RT_DEVICE int32_t least(int32_t a, int32_t b) {
    return a < b ? a : b;
}
AVATAR_RT_DEVICE int32_t most(int32_t a, int32_t b) {
    return a > b ? a : b;
}

// The fresh rows that a query sees. Queries past the end are as good as the last one: nobody stores them.
AVATAR_RT_DEVICE Rows fresh_rows_of(const Problem& p, int32_t query) {
    if (p.num_frames == 1) return {0, p.fresh};
    const int32_t frame = least(query / p.frame_rows, p.num_frames - 1);
    return {most(frame - p.radius, 0) * p.frame_rows, least(frame + p.radius + 1, p.num_frames) * p.frame_rows};
}

// The rows of the tile's segment that a query sees.
AVATAR_RT_DEVICE Rows rows_of(const Problem& p, const KeyTile& tile, int32_t query) {
    if (tile.reference) return {0, p.reference};
    return fresh_rows_of(p, query);
}

template <int kKeys>
class KeyWalk {
  public:
    // For the queries first .. first + rows - 1.
    AVATAR_RT_DEVICE KeyWalk(const Problem& p, int32_t first, int32_t rows) : reference_(p.reference) {
        const Rows early = fresh_rows_of(p, first);
        const Rows late = fresh_rows_of(p, least(first + rows, p.queries) - 1);
        common_ = {late.begin, early.end};
        first_tile_ = early.begin / kKeys;
        fresh_tiles_ = p.fresh > 0 ? (late.end + kKeys - 1) / kKeys - first_tile_ : 0;
    }

    AVATAR_RT_DEVICE int32_t count() const { return fresh_tiles_ + (reference_ + kKeys - 1) / kKeys; }

    AVATAR_RT_DEVICE KeyTile operator[](int32_t i) const {
        const bool reference = i >= fresh_tiles_;
        const int32_t begin = (reference ? i - fresh_tiles_ : i + first_tile_) * kKeys;
        const Rows seen = reference ? Rows{0, reference_} : common_;
        return {begin, reference, begin < seen.begin || begin + kKeys > seen.end};
    }

  private:
    Rows common_;  // fresh rows that every query of the tile sees
    int32_t reference_, first_tile_, fresh_tiles_;
};

}  // namespace avatar_rt::cuda
