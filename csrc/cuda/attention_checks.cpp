#include <cmath>

#include "cuda/attention.h"

namespace avatar_rt::cuda {
namespace {

std::string plain(float value) {
    if (std::isnan(value)) return "nan";
    if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
    return std::to_string(value);
}

std::string view_fault(const std::string& name, const View& view, const AttentionArgs& a) {
    const auto sixteen = [&](const char* what, int64_t elements) {
        return name + ": expected a " + what + " of a multiple of 16 bytes, got " + std::to_string(2 * elements);
    };
    if (view.rows == 0 || a.batch == 0 || a.heads == 0) return "";
    if (view.data == nullptr) return name + ": expected an address, got null";
    if (reinterpret_cast<uintptr_t>(view.data) % 16) return name + ": expected an address of a multiple of 16 bytes";
    if (view.rows > 1 && (view.row_stride <= 0 || view.row_stride % 8)) return sixteen("row stride", view.row_stride);
    if (a.heads > 1 && (view.head_stride < 0 || view.head_stride % 8)) return sixteen("head stride", view.head_stride);
    if (a.batch > 1 && (view.batch_stride < 0 || view.batch_stride % 8))
        return sixteen("batch stride", view.batch_stride);
    return "";
}

}  // namespace

std::string attention_faults(const AttentionArgs& a) {
    constexpr int64_t kMaxRows = 1 << 30;  // rows are counted in 32 bits, one tile past the end
    if (a.head_dim != 64 && a.head_dim != 128) return "q: expected D of 64 or 128, got " + std::to_string(a.head_dim);
    if (a.batch < 0 || a.batch > 65535) return "q: expected B in 0..65535, got " + std::to_string(a.batch);
    if (a.heads < 0 || a.heads > 65535) return "q: expected N in 0..65535, got " + std::to_string(a.heads);
    if (!(a.scale > 0) || std::isinf(a.scale)) return "scale: expected a finite number above 0, got " + plain(a.scale);
    if (!(a.strength >= 0) || std::isinf(a.strength))
        return "strength: expected a finite number of 0 or more, got " + plain(a.strength);
    if (a.k.rows != a.v.rows) return "v: expected S=" + std::to_string(a.k.rows) + ", got " + std::to_string(a.v.rows);
    if (a.ref_k.rows != a.ref_v.rows)
        return "ref_v: expected R=" + std::to_string(a.ref_k.rows) + ", got " + std::to_string(a.ref_v.rows);
    if (a.k.rows == 0 && (a.ref_k.rows == 0 || a.strength == 0))
        return "k, ref_k: expected at least one key row, got none";
    if (a.num_frames < 1 || a.q.rows % a.num_frames)
        return "num_frames: expected a divisor of L=" + std::to_string(a.q.rows) + ", got " +
               std::to_string(a.num_frames);
    if (a.radius < 0) return "radius: expected 0 or more frames, got " + std::to_string(a.radius);
    if (a.num_frames > 1 && a.k.rows != a.q.rows)
        return "k: expected L=" + std::to_string(a.q.rows) + " rows as in q, got " + std::to_string(a.k.rows);
    const struct {
        const char* name;
        const View& view;
    } operands[] = {{"q", a.q}, {"k", a.k}, {"v", a.v}, {"ref_k", a.ref_k}, {"ref_v", a.ref_v}};
    for (const auto& o : operands) {
        if (o.view.rows > kMaxRows)
            return std::string(o.name) + ": expected at most " + std::to_string(kMaxRows) + " rows, got " +
                   std::to_string(o.view.rows);
        const std::string fault = view_fault(o.name, o.view, a);
        if (!fault.empty()) return fault;
    }
    if (a.out == nullptr && a.q.rows * a.batch * a.heads > 0) return "out: expected an address, got null";
    return "";
}

}  // namespace avatar_rt::cuda
