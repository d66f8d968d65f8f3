// One thread block of the sm_80 kernel, played by one CPU thread in lockstep.
#include "cuda/attention_emulated.h"
#include "cuda/attention_sm80.h"
#include "cuda/emulated.h"

namespace avatar_rt::cuda {
namespace {

template <class Tile>
class Block {
  public:
    using R = RegistersOf<Tile>;

    Block() : shared_(Tile::kSharedBytes), registers_(Tile::kThreads) {}

    template <class F>
    void each(F&& f) {
        for (int thread = 0; thread < Tile::kThreads; ++thread) f(registers_[thread], thread);
    }

    // The copy happens when its group is waited for; until then its place holds NaN.
    void copy16(uint32_t to, const unsigned char* from, bool exists) {
        std::memset(shared_.at(to, 16), 0xFF, 16);
        group_.push_back({to, exists ? from : nullptr});
    }
    void commit() {
        groups_.push_back(std::move(group_));
        group_.clear();
    }
    template <int kPending>
    void wait_copies() {
        for (; groups_.size() > kPending; groups_.pop_front())
            for (const Copy& copy : groups_.front()) {
                unsigned char* to = shared_.at(copy.to, 16);
                copy.from ? std::memcpy(to, copy.from, 16) : std::memset(to, 0, 16);
            }
    }
    void sync() {}

    template <class To, class Address>
    void ldmatrix(To&& to, Address&& address) {
        load(false, to, address);
    }
    template <class To, class Address>
    void ldmatrix_transposed(To&& to, Address&& address) {
        load(true, to, address);
    }
    template <class T, class C, class A, class B>
    void mma(C&& c, A&& a, B&& b) {
        for (int w = 0; w < Tile::kWarps; ++w) {
            const auto lane_of = [&](int lane) -> R& { return registers_[32 * w + lane]; };
            mma_m16n8k16<T>([&](int lane) { return c(lane_of(lane)); }, [&](int lane) { return a(lane_of(lane)); },
                            [&](int lane) { return b(lane_of(lane)); });
        }
    }

    template <class F>
    void quad_max(F&& value) {
        reduce_quads(registers_, value, [](float a, float b) { return std::fmax(a, b); });
    }
    template <class F>
    void quad_sum(F&& value) {
        reduce_quads(registers_, value, [](float a, float b) { return a + b; });
    }

  private:
    struct Copy {
        uint32_t to;
        const unsigned char* from;
    };

    template <class To, class Address>
    void load(bool transposed, To&& to, Address&& address) {
        for (int w = 0; w < Tile::kWarps; ++w)
            ldmatrix_x4(
                shared_, transposed, [&](int lane) { return to(registers_[32 * w + lane]); },
                [&](int lane) { return address(32 * w + lane); });
    }

    SharedMemory shared_;
    std::vector<R> registers_;
    std::vector<Copy> group_;
    std::deque<std::vector<Copy>> groups_;
};

Source source_of(const View& v) {
    return {static_cast<const unsigned char*>(v.data), 2 * v.batch_stride, 2 * v.row_stride, 2 * v.head_stride};
}

template <class T, int kDim>
void run(const AttentionArgs& a) {
    using Tile = TileSm80<kDim>;
    const Problem p = problem_of(a);
    const Sources from{source_of(a.q), source_of(a.k), source_of(a.v), source_of(a.ref_k), source_of(a.ref_v)};
    each_place<Tile>(a, [&](const Place& at) {
        Block<Tile> block;
        attend_sm80<T, Tile>(block, p, from, at, 0);
    });
}

}  // namespace

void emulate_sm80(const AttentionArgs& a) {
    if (a.dtype == DType::bf16)
        a.head_dim == 64 ? run<Bf16, 64>(a) : run<Bf16, 128>(a);
    else
        a.head_dim == 64 ? run<Fp16, 64>(a) : run<Fp16, 128>(a);
}

}  // namespace avatar_rt::cuda
