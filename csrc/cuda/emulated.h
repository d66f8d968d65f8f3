// Software twins of the instructions that the attention kernels use, on a CPU: what stays untried without a GPU is
// whether the thin wrappers in instructions_sm80.h and instructions_sm90.h spell the same instructions.
//
// They are strict where hardware would be silent: shared memory starts as NaN and has bounds, asynchronous work happens
// as late as it may (its results are NaN until it is waited for), and a barrier that nobody completes is an error.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/attention_layout.h"
#include "cuda/attention_tensor.h"

namespace avatar_rt::cuda {

struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

template <class T>
float widened(uint16_t x) {
    static const std::vector<float> table = [] {
        std::vector<float> values(65536);
        for (int i = 0; i < 65536; ++i) values[i] = T::widen(static_cast<uint16_t>(i));
        return values;
    }();
    return table[x];
}

class SharedMemory {
  public:
    explicit SharedMemory(size_t bytes) : bytes_(bytes, 0xFF) {}  // NaN in both formats

    unsigned char* at(uint32_t address, uint32_t count) {
        if (address % (count < 16 ? count : 16) || address + count > bytes_.size())
            throw Fault("shared address " + std::to_string(address) + " of " + std::to_string(count) + " bytes");
        return bytes_.data() + address;
    }
    uint16_t half(uint32_t address) {
        uint16_t x;
        std::memcpy(&x, at(address, 2), 2);
        return x;
    }

  private:
    std::vector<unsigned char> bytes_;
};

// mma.sync.aligned.m16n8k16.row.col of one warp: c += a b, operands by lane.
template <class T, class C, class A, class B>
void mma_m16n8k16(C&& c, A&& a, B&& b) {
    float left[16][16], right[8][16];  // right by column
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = 2 * (lane % 4);
        for (int i = 0; i < 4; ++i)
            for (int e = 0; e < 2; ++e)
                left[g + 8 * (i % 2)][t + e + 8 * (i / 2)] = widened<T>(static_cast<uint16_t>(a(lane)[i] >> 16 * e));
        for (int i = 0; i < 2; ++i)
            for (int e = 0; e < 2; ++e)
                right[g][t + e + 8 * i] = widened<T>(static_cast<uint16_t>(b(lane)[i] >> 16 * e));
    }
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            const float *row = left[row_of(lane, i)], *column = right[column_of(lane, i)];
            float sum = c(lane)[i];
            for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
            c(lane)[i] = sum;
        }
}

// ldmatrix.sync.aligned.m8n8.x4(.trans).shared.b16 of one warp.
template <class To, class Address>
void ldmatrix_x4(SharedMemory& shared, bool transposed, To&& to, Address&& address) {
    uint16_t matrix[4][8][8];
    for (int lane = 0; lane < 32; ++lane) std::memcpy(matrix[lane / 8][lane % 8], shared.at(address(lane), 16), 16);
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4, column = 2 * (lane % 4);
            const uint32_t low = transposed ? matrix[i][column][row] : matrix[i][row][column];
            const uint32_t high = transposed ? matrix[i][column + 1][row] : matrix[i][row][column + 1];
            to(lane)[i] = low | high << 16;
        }
}

// Address of element (outer, summed) of a wgmma operand in shared memory with the 128-byte swizzle, by its descriptor.
inline uint32_t operand_address(uint64_t d, bool k_major, int outer, int summed) {
    const auto field = [&](int bit) { return static_cast<uint32_t>(d >> bit & 0x3FFF) << 4; };
    if (d >> 62 != 1 || (d >> 49 & 7) != 0) throw Fault("matrix descriptor without the 128-byte swizzle");
    const uint32_t start = field(0), leading = field(16), stride = field(32);
    if (k_major) return swizzle128(start + outer / 8 * stride + outer % 8 * 128 + summed * 2);
    return swizzle128(start + outer / 64 * leading + outer % 64 * 2 + summed / 8 * stride + summed % 8 * 128);
}

// One thread block's mbarriers and named barriers, for roles that run as threads.
class Barriers {
  public:
    void init(uint32_t address, int arrivals) { mbarriers_[address] = {arrivals, arrivals, 0, 0}; }

    void expect(uint32_t address, int64_t bytes) {  // mbarrier.arrive.expect_tx
        change(address, [&](MBarrier& m) { m.bytes += bytes, --m.pending; });
    }
    void arrive(uint32_t address) {
        change(address, [](MBarrier& m) { --m.pending; });
    }
    void complete(uint32_t address, int64_t bytes) {  // what a finished copy does
        change(address, [&](MBarrier& m) { m.bytes -= bytes; });
    }
    // Until the phase of this parity has completed.
    void wait(uint32_t address, uint32_t parity) {
        until("mbarrier " + std::to_string(address), [&] { return (find(address).phase & 1) != parity; });
    }

    // bar.arrive and bar.sync of one warpgroup, on a barrier of two warpgroups.
    void arrive_named(int id) {
        std::lock_guard<std::mutex> lock(mutex_);
        ++named_[id];
        changed_.notify_all();
    }
    void sync_named(int id) {
        int64_t goal;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            goal = (++named_[id] + 1) / 2 * 2;  // the end of the pair that this arrival belongs to
            changed_.notify_all();
        }
        until("named barrier " + std::to_string(id), [&] { return named_[id] >= goal; });
    }

    void fail(const std::string& what) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (fault_.empty()) fault_ = what;
        changed_.notify_all();
    }

    // After all roles have ended: empty, or what was left undone.
    std::string left_over() const {
        if (!fault_.empty()) return fault_;
        for (const auto& [address, m] : mbarriers_)
            if (m.bytes != 0) return "mbarrier " + std::to_string(address) + " ends with bytes on their way";
        for (const auto& [id, arrivals] : named_)
            if (arrivals % 2) return "named barrier " + std::to_string(id) + " ends half complete";
        return "";
    }

  private:
    struct MBarrier {
        int arrivals, pending;
        int64_t bytes, phase;
    };

    MBarrier& find(uint32_t address) {
        const auto found = mbarriers_.find(address);
        if (found == mbarriers_.end()) throw Fault("no mbarrier at " + std::to_string(address));
        return found->second;
    }

    template <class F>
    void change(uint32_t address, F&& f) {
        std::lock_guard<std::mutex> lock(mutex_);
        MBarrier& m = find(address);
        f(m);
        if (m.pending < 0) throw Fault("mbarrier " + std::to_string(address) + " has one arrival too many");
        if (m.pending == 0 && m.bytes == 0) ++m.phase, m.pending = m.arrivals;
        changed_.notify_all();
    }

    template <class F>
    void until(const std::string& name, F&& reached) {
        std::unique_lock<std::mutex> lock(mutex_);
        const bool in_time =
            changed_.wait_for(lock, std::chrono::seconds(60), [&] { return !fault_.empty() || reached(); });
        if (!fault_.empty()) throw Fault(fault_);
        if (!in_time) throw Fault(name + " is never completed");
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    std::map<uint32_t, MBarrier> mbarriers_;
    std::map<int, int64_t> named_;
    std::string fault_;
};

// cp.async.bulk.tensor of a box of one panel of head dims and `rows` rows: zeros outside the tensor, 128-byte swizzle.
inline void copy_box(SharedMemory& shared, const Tensor& tensor, uint32_t to, int panel, int rows,
                     const int64_t (&corner)[4]) {
    if (to % 1024) throw Fault("tensor copy to an address that is no multiple of 1024");
    for (int row = 0; row < rows; ++row)
        for (int i = 0; i < panel; ++i) {
            const int64_t at[4] = {corner[0] + i, corner[1] + row, corner[2], corner[3]};
            bool inside = true;
            int64_t offset = 2 * at[0];
            for (int d = 0; d < 4; ++d) {
                inside = inside && at[d] >= 0 && at[d] < static_cast<int64_t>(tensor.sizes[d]);
                if (d) offset += at[d] * static_cast<int64_t>(tensor.strides[d - 1]);
            }
            uint16_t x = 0;
            if (inside) std::memcpy(&x, static_cast<const char*>(tensor.data) + offset, 2);
            std::memcpy(shared.at(swizzle128(to + row * 2 * panel + 2 * i), 2), &x, 2);
        }
}

}  // namespace avatar_rt::cuda
