// The sm_90a kernel above its instructions: a producer thread that starts bulk tensor copies, and two consumer
// warpgroups of 64 queries that multiply, weigh and add, one tile of scores ahead of the values:
//
//   consumer, tile j:   start S_j = Q K_j^T, start O += W_{j-1} V_{j-1}; when S_j is there, its softmax runs while the
//                       values are still being multiplied; then O is rescaled and W_j packed.
//
// The two consumers take turns at starting products, so that one's softmax meets the other's products.
// Loads, in the order in which they are used up: K_0, K_1, V_0, K_2, V_1, .. , V_last; each fills one slot of a ring.
// A slot has two barriers: `full` (the copy engine has written all its bytes), `empty` (every consumer warp is done).
//
// `Producer` and `Team` (a consumer warpgroup) are a GPU's threads (attention_sm90.cu) or a CPU's (emulated). They have
//   Producer: wait(barrier, parity), expect(barrier, bytes), copy(operand, to, barrier, element, row, place)
//   Team: wait(barrier, parity), release(barrier), take_turn(consumer), pass_turn(consumer),
//         each(f), quad_max(value), quad_sum(value), begin_scores(), score_product<T>(a, b, add),
//         begin_values(), value_product<T>(step, b), end_products(), wait_products<pending>()
#pragma once

#include "cuda/attention_sm80.h"

namespace avatar_rt::cuda {

enum class Operand { q, k, v, ref_k, ref_v };

template <class Tile>
struct Ring {
    int32_t slot = 0;
    uint32_t parity = 0;
    AVATAR_RT_DEVICE void advance() {
        if (++slot == Tile::kSlots) slot = 0, parity ^= 1;
    }
};

// Shared memory of a block, by offsets from its first 1024-byte boundary.
template <class Tile>
struct Shared {
    uint32_t base;
    AVATAR_RT_DEVICE uint32_t query(int consumer) const { return base + consumer * 64 * 2 * Tile::kPanel; }
    AVATAR_RT_DEVICE uint32_t slot(int32_t i) const { return base + Tile::kSlotOffset + i * Tile::kSlotBytes; }
    AVATAR_RT_DEVICE uint32_t query_full() const { return base + Tile::kBarrierOffset; }
    AVATAR_RT_DEVICE uint32_t full(int32_t i) const { return query_full() + 8 * (1 + i); }
    AVATAR_RT_DEVICE uint32_t empty(int32_t i) const { return query_full() + 8 * (1 + Tile::kSlots + i); }
};

// By one thread: f(barrier, arrivals that complete it) for every barrier of the block.
template <class Tile, class F>
AVATAR_RT_DEVICE void each_barrier(const Shared<Tile>& shared, F&& f) {
    f(shared.query_full(), 1);
    for (int32_t i = 0; i < Tile::kSlots; ++i) {
        f(shared.full(i), 1);
        f(shared.empty(i), 4 * Tile::kConsumers);  // one per warp
    }
}

template <class Tile, class Producer>
AVATAR_RT_DEVICE void produce_sm90(Producer& producer, const Problem& p, const Shared<Tile>& shared, const Place& at) {
    const KeyWalk<Tile::kKeys> walk(p, at.query, Tile::kQueries);
    const int32_t tiles = walk.count();
    Ring<Tile> ring;
    const auto load = [&](int32_t j, Operand fresh, Operand reference) {
        const KeyTile tile = walk[j];
        producer.wait(shared.empty(ring.slot), ring.parity ^ 1);  // the first round finds every slot empty
        producer.expect(shared.full(ring.slot), Tile::kSlotBytes);
        for (int panel = 0; panel < Tile::kPanels; ++panel)
            producer.copy(tile.reference ? reference : fresh, shared.slot(ring.slot) + panel * Tile::kKeyPanelBytes,
                          shared.full(ring.slot), panel * Tile::kPanel, tile.begin, at);
        ring.advance();
    };
    producer.expect(shared.query_full(), Tile::kQueryBytes);
    for (int panel = 0; panel < Tile::kPanels; ++panel)
        producer.copy(Operand::q, shared.base + panel * Tile::kQueryPanelBytes, shared.query_full(),
                      panel * Tile::kPanel, at.query, at);
    load(0, Operand::k, Operand::ref_k);
    for (int32_t j = 1; j < tiles; ++j) {
        load(j, Operand::k, Operand::ref_k);
        load(j - 1, Operand::v, Operand::ref_v);
    }
    load(tiles - 1, Operand::v, Operand::ref_v);
}

// score = Q K^T for one tile of keys; 16 head dims a step.
template <class T, class Tile, class Team>
AVATAR_RT_DEVICE void start_scores(Team& team, uint32_t q, uint32_t k) {
    team.begin_scores();
    unrolled<Tile::kDim / 16>([&](int d) {
        const uint32_t inside = 32 * (d % 4);  // a step is 32 of the panel's 128 bytes
        team.template score_product<T>(descriptor(q + d / 4 * Tile::kQueryPanelBytes + inside, 0, kAtomBytes),
                                       descriptor(k + d / 4 * Tile::kKeyPanelBytes + inside, 0, kAtomBytes), d > 0);
    });
    team.end_products();
}

// out += weight V for one tile of keys; 16 keys a step.
template <class T, class Tile, class Team>
AVATAR_RT_DEVICE void start_values(Team& team, uint32_t v) {
    team.begin_values();
    unrolled<Tile::kKeys / 16>([&](int k) {
        team.template value_product<T>(k, descriptor(v + k * 2 * kAtomBytes, Tile::kKeyPanelBytes, kAtomBytes));
    });
    team.end_products();
}

template <class T, class Tile, class Team>
AVATAR_RT_DEVICE void consume_sm90(Team& team, const Problem& p, const Shared<Tile>& shared, const Place& block,
                                   int consumer) {
    using R = RegistersOf<Tile>;
    const KeyWalk<Tile::kKeys> walk(p, block.query, Tile::kQueries);
    const Place at{block.query + 64 * consumer, block.head, block.batch};
    const int32_t tiles = walk.count();
    const auto weights = [](R& t, int) {
        t.rescale();
        t.template pack<T>();
    };
    Ring<Tile> ring;
    const auto next = [&]() -> int32_t {  // waits for the next load; its slot
        const int32_t slot = ring.slot;
        team.wait(shared.full(slot), ring.parity);
        ring.advance();
        return slot;
    };
    team.each([](R& t, int) { t.clear(); });
    if (consumer == 1 && tiles > 1) team.pass_turn(consumer);
    team.wait(shared.query_full(), 0);
    const int32_t first = next();
    start_scores<T, Tile>(team, shared.query(consumer), shared.slot(first));
    team.template wait_products<0>();
    team.release(shared.empty(first));
    softmax<Tile>(team, p, walk[0], at);
    team.each(weights);
    for (int32_t j = 1; j < tiles; ++j) {
        const int32_t keys = next();
        team.take_turn(consumer);
        start_scores<T, Tile>(team, shared.query(consumer), shared.slot(keys));
        const int32_t values = next();
        start_values<T, Tile>(team, shared.slot(values));
        if (consumer == 0 || j + 1 < tiles) team.pass_turn(consumer);  // the last turn has no taker
        team.template wait_products<1>();
        team.release(shared.empty(keys));
        softmax<Tile>(team, p, walk[j], at);
        team.template wait_products<0>();
        team.release(shared.empty(values));
        team.each(weights);
    }
    const int32_t last = next();
    start_values<T, Tile>(team, shared.slot(last));
    team.template wait_products<0>();
    finish<T, Tile>(team, p, at);
}

}  // namespace avatar_rt::cuda
