// What the emulations of both kernels share.
#pragma once

#include <vector>

#include "cuda/attention_sm80.h"

namespace avatar_rt::cuda {

void emulate_sm80(const AttentionArgs& args);
void emulate_sm90(const AttentionArgs& args);

template <class Tile, class F>
void each_place(const AttentionArgs& a, F&& f) {
    for (int64_t batch = 0; batch < a.batch; ++batch)
        for (int64_t head = 0; head < a.heads; ++head)
            for (int64_t query = 0; query < a.q.rows; query += Tile::kQueries)
                f(Place{static_cast<int32_t>(query), static_cast<int32_t>(head), static_cast<int32_t>(batch)});
}

// As two shuffles do it: lane ^ 1, then lane ^ 2, so every lane adds in its own order.
template <class R, class Value, class F>
void reduce_quads(std::vector<R>& registers, Value&& value, F&& f) {
    for (int distance = 1; distance <= 2; distance *= 2) {
        std::vector<float> before(registers.size());
        for (size_t i = 0; i < before.size(); ++i) before[i] = value(registers[i]);
        for (size_t i = 0; i < before.size(); ++i) value(registers[i]) = f(before[i], before[i ^ distance]);
    }
}

}  // namespace avatar_rt::cuda
