// One thread block of the sm_90a kernel, played by three CPU threads: the producer and two consumer warpgroups.
#include <thread>

#include "cuda/attention_emulated.h"
#include "cuda/attention_sm90.h"
#include "cuda/emulated.h"

namespace avatar_rt::cuda {
namespace {

template <class Tile>
class Producer {
  public:
    Producer(SharedMemory& shared, Barriers& barriers, const AttentionArgs& a) : shared_(shared), barriers_(barriers) {
        for (const View* v : {&a.q, &a.k, &a.v, &a.ref_k, &a.ref_v})
            tensors_.push_back(tensor_of(*v, a.head_dim, a.heads, a.batch));
    }

    void wait(uint32_t barrier, uint32_t parity) { barriers_.wait(barrier, parity); }
    void expect(uint32_t barrier, int bytes) { barriers_.expect(barrier, bytes); }
    void copy(Operand operand, uint32_t to, uint32_t barrier, int element, int32_t row, const Place& at) {
        const Tensor& t = tensors_[static_cast<int>(operand)];
        const int rows = operand == Operand::q ? Tile::kQueries : Tile::kKeys;
        copy_box(shared_, t, to, Tile::kPanel, rows,
                 {element, row, int64_t{at.head} * t.head_step, int64_t{at.batch} * t.batch_step});
        barriers_.complete(barrier, rows * 2 * Tile::kPanel);
    }

  private:
    SharedMemory& shared_;
    Barriers& barriers_;
    std::vector<Tensor> tensors_;
};

// A warpgroup of 128 threads. Products happen when they are waited for; scores are NaN until then.
template <class Tile>
class Warpgroup {
  public:
    using R = RegistersOf<Tile>;

    Warpgroup(SharedMemory& shared, Barriers& barriers) : shared_(shared), barriers_(barriers), registers_(128) {}

    void wait(uint32_t barrier, uint32_t parity) { barriers_.wait(barrier, parity); }
    void release(uint32_t barrier) {
        for (int warp = 0; warp < 4; ++warp) barriers_.arrive(barrier);
    }
    void take_turn(int consumer) { barriers_.sync_named(1 + consumer); }
    void pass_turn(int consumer) { barriers_.arrive_named(1 + (1 - consumer)); }

    template <class F>
    void each(F&& f) {
        for (int thread = 0; thread < 128; ++thread) f(registers_[thread], thread);
    }
    template <class F>
    void quad_max(F&& value) {
        reduce_quads(registers_, value, [](float a, float b) { return std::fmax(a, b); });
    }
    template <class F>
    void quad_sum(F&& value) {
        reduce_quads(registers_, value, [](float a, float b) { return a + b; });
    }

    void begin_scores() { products_.emplace_back(); }
    void begin_values() { products_.emplace_back(); }
    void end_products() {}
    template <class T>
    void score_product(uint64_t a, uint64_t b, bool add) {
        products_.back().push_back([this, a, b, add] { scores<T>(a, b, add); });
        each([](R& t, int) {
            for (auto& tile : t.score[0]) std::fill(tile, tile + 4, std::nanf(""));
        });
    }
    template <class T>
    void value_product(int step, uint64_t b) {
        products_.back().push_back([this, step, b] { values<T>(step, b); });
    }
    template <int kPending>
    void wait_products() {
        for (; products_.size() > kPending; products_.pop_front())
            for (const auto& product : products_.front()) product();
    }

  private:
    // d += left right^T over 16 summed elements; left [64][16], right [columns][16], d as lanes hold it.
    template <class D>
    void accumulate(const std::vector<float>& left, const std::vector<float>& right, bool add, int columns, D&& d) {
        for (int thread = 0; thread < 128; ++thread)
            for (int j = 0; j < columns / 8; ++j)
                for (int i = 0; i < 4; ++i) {
                    const float* row = &left[16 * (16 * (thread / 32) + row_of(thread % 32, i))];
                    const float* column = &right[16 * (8 * j + column_of(thread % 32, i))];
                    float sum = add ? d(registers_[thread])[j][i] : 0.0f;
                    for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
                    d(registers_[thread])[j][i] = sum;
                }
    }

    template <class T>
    std::vector<float> operand(uint64_t descriptor, bool k_major, int outer) {
        std::vector<float> x(16 * outer);
        for (int i = 0; i < outer; ++i)
            for (int k = 0; k < 16; ++k)
                x[16 * i + k] = widened<T>(shared_.half(operand_address(descriptor, k_major, i, k)));
        return x;
    }

    template <class T>
    void scores(uint64_t a, uint64_t b, bool add) {
        accumulate(operand<T>(a, true, 64), operand<T>(b, true, Tile::kKeys), add, Tile::kKeys,
                   [](R& t) { return t.score[0]; });
    }

    template <class T>
    void values(int step, uint64_t b) {
        std::vector<float> left(16 * 64);
        for (int thread = 0; thread < 128; ++thread)
            for (int i = 0; i < 4; ++i)
                for (int e = 0; e < 2; ++e) {
                    const int row = 16 * (thread / 32) + thread % 32 / 4 + 8 * (i % 2);
                    const int column = 2 * (thread % 4) + e + 8 * (i / 2);
                    left[16 * row + column] =
                        widened<T>(static_cast<uint16_t>(registers_[thread].weight[0][step][i] >> 16 * e));
                }
        accumulate(left, operand<T>(b, false, Tile::kDim), true, Tile::kDim, [](R& t) { return t.out[0]; });
    }

    SharedMemory& shared_;
    Barriers& barriers_;
    std::vector<R> registers_;
    std::deque<std::vector<std::function<void()>>> products_;
};

template <class T, class Tile>
void run_block(const AttentionArgs& a, const Problem& p, const Place& at) {
    SharedMemory memory(Tile::kSharedBytes);
    Barriers barriers;
    const Shared<Tile> shared{0};
    each_barrier(shared, [&](uint32_t barrier, int arrivals) { barriers.init(barrier, arrivals); });
    const auto role = [&](auto&& work) {
        return std::thread([&barriers, work] {
            try {
                work();
            } catch (const std::exception& e) {
                barriers.fail(e.what());
            }
        });
    };
    std::vector<std::thread> roles;
    roles.push_back(role([&] {
        Producer<Tile> producer(memory, barriers, a);
        produce_sm90<Tile>(producer, p, shared, at);
    }));
    for (int consumer = 0; consumer < Tile::kConsumers; ++consumer)
        roles.push_back(role([&, consumer] {
            Warpgroup<Tile> team(memory, barriers);
            consume_sm90<T, Tile>(team, p, shared, at, consumer);
        }));
    for (std::thread& r : roles) r.join();
    const std::string fault = barriers.left_over();
    if (!fault.empty()) throw Fault(fault);
}

template <class T, int kDim>
void run(const AttentionArgs& a) {
    using Tile = TileSm90<kDim>;
    const Problem p = problem_of(a);
    each_place<Tile>(a, [&](const Place& at) { run_block<T, Tile>(a, p, at); });
}

}  // namespace

void emulate_sm90(const AttentionArgs& a) {
    if (a.dtype == DType::bf16)
        a.head_dim == 64 ? run<Bf16, 64>(a) : run<Bf16, 128>(a);
    else
        a.head_dim == 64 ? run<Fp16, 64>(a) : run<Fp16, 128>(a);
}

std::string attention_emulated(const AttentionArgs& a) {
    try {
        a.kernel == Kernel::sm80 ? emulate_sm80(a) : emulate_sm90(a);
    } catch (const Fault& e) {
        return e.what();
    }
    return "";
}

}  // namespace avatar_rt::cuda
