// The sizes of a call as the kernels take them, and the shapes of their tiles: plain data and arithmetic, on any side.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/attention.h"

namespace avatar_rt::cuda {

struct Problem {
    int32_t queries = 0, fresh = 0, reference = 0, heads = 0;
    int32_t num_frames = 1, frame_rows = 0, radius = 0;
    float scale = 0;  // of the scores, times log2(e): softmax runs on powers of two
    float bias = 0;   // log2(strength), on the reference rows' scores
    void* out = nullptr;
    float* lse = nullptr;
};

inline Problem problem_of(const AttentionArgs& a) {
    constexpr double kLog2E = 1.4426950408889634;
    Problem p;
    p.queries = static_cast<int32_t>(a.q.rows);
    p.fresh = static_cast<int32_t>(a.k.rows);
    p.reference = a.strength > 0 ? static_cast<int32_t>(a.ref_k.rows) : 0;
    p.heads = static_cast<int32_t>(a.heads);
    p.num_frames = static_cast<int32_t>(a.num_frames);
    p.frame_rows = static_cast<int32_t>(a.q.rows / a.num_frames);
    p.radius = static_cast<int32_t>(a.radius < a.num_frames ? a.radius : a.num_frames);
    p.scale = static_cast<float>(a.scale * kLog2E);
    p.bias = p.reference ? static_cast<float>(std::log2(static_cast<double>(a.strength))) : 0.0f;
    p.out = a.out;
    p.lse = a.lse;
    return p;
}

// A thread block of the sm_80 kernel: 4 warps of 32 queries each, which visit the keys in tiles of 64. K and V tiles
// take turns in a ring of slots that cp.async keeps filling.
template <int kHeadDim>
struct TileSm80 {
    static constexpr int kDim = kHeadDim;
    static constexpr int kWarps = 4, kThreads = 32 * kWarps;
    static constexpr int kRowTiles = 2;  // of 16 queries, per warp: each B fragment read is used twice
    static constexpr int kQueries = 16 * kRowTiles * kWarps;
    static constexpr int kKeys = 64;
    static constexpr int kPolynomialOf8 = 0;  // tensor cores, not exponentials, are the bound before sm_90
    static constexpr int kRowBytes = 2 * kDim;
    static constexpr int kSlotBytes = kKeys * kRowBytes;
    static constexpr int kSlots = kDim == 64 ? 4 : 3;  // two blocks fit a multiprocessor of 164 KB
    static constexpr int kQueryBytes = kQueries * kRowBytes;
    static constexpr int kSharedBytes = kQueryBytes + kSlots * kSlotBytes;
};

// A thread block of the sm_90a kernel: one producer warpgroup that starts bulk tensor copies, two consumer warpgroups
// of 64 queries each.
template <int kHeadDim>
struct TileSm90 {
    static constexpr int kDim = kHeadDim;
    static constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
    static constexpr int kRowTiles = 1;
    static constexpr int kQueries = 64 * kConsumers;
    static constexpr int kKeys = 128;
    // At head_dim 64 the special-function unit would take as long as the tensor cores: a quarter of the exponentials
    // goes to multiply-adds (2 of every 8 columns of 8 keys). A first guess, to be tuned on the part.
    static constexpr int kPolynomialOf8 = kDim == 64 ? 2 : 0;
    static constexpr int kPanel = 64;  // head dims in one copy: 128 bytes, the widest swizzle
    static constexpr int kPanels = kDim / kPanel;
    static constexpr int kKeyPanelBytes = kKeys * 2 * kPanel, kQueryPanelBytes = kQueries * 2 * kPanel;
    static constexpr int kSlotBytes = kPanels * kKeyPanelBytes;
    static constexpr int kSlots = kDim == 64 ? 8 : 6;
    static constexpr int kQueryBytes = kPanels * kQueryPanelBytes;
    static constexpr int kSlotOffset = kQueryBytes;
    static constexpr int kBarrierOffset = kSlotOffset + kSlots * kSlotBytes;  // query, full[slot], empty[slot]
    static constexpr int kBarriers = 1 + 2 * kSlots;
    static constexpr int kAlignment = 1024;  // of an atom of the swizzle
    static constexpr int kSharedBytes = kBarrierOffset + 8 * kBarriers + kAlignment;
    static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
    static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * 128 <= 65536, "registers of one block");
};

}  // namespace avatar_rt::cuda
