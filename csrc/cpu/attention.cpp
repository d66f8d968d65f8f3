#include "cpu/attention.h"

#include <algorithm>
#include <cmath>

#include "cpu/attention_job.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace avatar_rt::cpu {
namespace {

const AttentionKernel& kernel_for(DType dtype, Isa isa) {
    const bool f32 = dtype == DType::f32;
#ifdef AVATAR_RT_X86
    switch (isa) {
        case Isa::avx512bf16:
#ifdef AVATAR_RT_AVX512BF16
            if (!f32) return kAttentionBf16Avx512bf16;
#endif
            [[fallthrough]];
        case Isa::avx512:
            return f32 ? kAttentionF32Avx512 : kAttentionBf16Avx512;
        case Isa::avx2:
            return f32 ? kAttentionF32Avx2 : kAttentionBf16Avx2;
        case Isa::scalar:
            break;
    }
#endif
    (void)isa;
    return f32 ? kAttentionF32Scalar : kAttentionBf16Scalar;
}

const char* at(const View& view, int64_t element, int64_t b, int64_t row, int64_t n) {
    return static_cast<const char*>(view.data) +
           element * (b * view.batch_stride + row * view.row_stride + n * view.head_stride);
}

int64_t reference_rows(const AttentionArgs& a) {
    return a.strength > 0 ? a.ref_k.rows : 0;
}

struct Plan {
    const AttentionArgs& args;
    const AttentionKernel& kernel;
    int64_t element, frame_rows, chunk_rows, chunks;

    explicit Plan(const AttentionArgs& a) : args(a), kernel(kernel_for(a.dtype, a.isa)) {
        element = a.dtype == DType::f32 ? 4 : 2;
        frame_rows = a.q.rows / a.num_frames;
        chunk_rows = kernel.max_rows;
        chunks = (frame_rows + chunk_rows - 1) / chunk_rows;
        // Few large tasks leave threads idle; a smaller task only means that its keys are read for fewer rows at a
        // time.
        while (a.num_threads > 1 && chunk_rows > kernel.tile_rows && num_tasks() < 4 * a.num_threads) {
            chunk_rows /= 2;
            chunks = (frame_rows + chunk_rows - 1) / chunk_rows;
        }
    }

    int64_t num_tasks() const { return args.batch * args.heads * args.num_frames * chunks; }

    void run(int64_t task) const {
        const int64_t chunk = task % chunks, frame = task / chunks % args.num_frames;
        const int64_t n = task / chunks / args.num_frames % args.heads,
                      b = task / chunks / args.num_frames / args.heads;
        const int64_t row = frame * frame_rows + chunk * chunk_rows;
        AttentionJob job{};
        job.rows = static_cast<int>(std::min(chunk_rows, frame_rows - chunk * chunk_rows));
        job.head_dim = static_cast<int>(args.head_dim);
        job.q = at(args.q, element, b, row, n);
        job.q_stride = args.q.row_stride;
        job.out_stride = args.heads * args.head_dim;
        job.out = static_cast<char*>(args.out) + element * (((b * args.q.rows + row) * args.heads + n) * args.head_dim);
        job.lse = args.lse ? args.lse + (b * args.heads + n) * args.q.rows + row : nullptr;
        job.scale_log2 = args.scale * 1.44269504f;
        int64_t low = 0, high = args.k.rows;
        if (args.num_frames > 1) {
            low = std::max<int64_t>(frame - args.radius, 0) * frame_rows;
            high = std::min(frame + args.radius + 1, args.num_frames) * frame_rows;
        }
        if (low < high) {
            KeyRange& range = job.ranges[job.num_ranges++];
            range.k = at(args.k, element, b, low, n);
            range.v = at(args.v, element, b, low, n);
            range.rows = high - low;
            range.k_stride = args.k.row_stride;
            range.v_stride = args.v.row_stride;
        }
        if (reference_rows(args) > 0) job.ranges[job.num_ranges++] = reference_range(b, n);
        kernel.run(job, scratch_of_thread(kernel.scratch_bytes(job.head_dim)));
    }

    KeyRange reference_range(int64_t b, int64_t n) const {
        const int64_t size = args.ref_layout == KeyLayout::int8 ? 1 : element, rows = args.ref_k.rows;
        KeyRange range{};
        range.k = at(args.ref_k, size, b, 0, n);
        range.v = at(args.ref_v, size, b, 0, n);
        range.rows = rows;
        range.k_stride = args.ref_k.row_stride;
        range.v_stride = args.ref_v.row_stride;
        range.layout = args.ref_layout;
        if (args.ref_layout == KeyLayout::int8) {
            range.k_scale = args.ref_k_scale + (b * args.heads + n) * rows;
            range.v_scale = args.ref_v_scale + (b * args.heads + n) * rows;
        }
        range.bias = static_cast<float>(std::log2(static_cast<double>(args.strength)));
        return range;
    }
};

// Below this a thread's wake-up costs more than it saves.
constexpr double kFlopsPerThread = 2e7;

double flops(const AttentionArgs& a) {
    double fresh = static_cast<double>(a.k.rows);
    if (a.num_frames > 1) fresh = std::min(fresh, (2.0 * a.radius + 1) * fresh / a.num_frames);
    return 4.0 * a.batch * a.heads * a.head_dim * a.q.rows * (fresh + reference_rows(a));
}

std::string expected(const char* what, const std::string& wanted, int64_t got) {
    return std::string(what) + ": expected " + wanted + ", got " + std::to_string(got);
}

}  // namespace

std::string attention_faults(const AttentionArgs& a) {
    if (a.batch < 0 || a.q.rows < 0) return expected("q", "sizes of 0 or more", std::min(a.batch, a.q.rows));
    if (a.heads < 1) return expected("q", "at least one head", a.heads);
    if (a.head_dim < 1 || a.head_dim > kMaxHeadDim)
        return expected("q", "D in 1.." + std::to_string(kMaxHeadDim), a.head_dim);
    if (a.v.rows != a.k.rows) return expected("v", "S=" + std::to_string(a.k.rows), a.v.rows);
    if (a.ref_v.rows != a.ref_k.rows) return expected("ref_v", "R=" + std::to_string(a.ref_k.rows), a.ref_v.rows);
    if (!(a.strength >= 0) || !std::isfinite(a.strength))
        return "strength: expected a finite number of 0 or more, got " + std::to_string(a.strength);
    if (a.k.rows + a.ref_k.rows < 1) return "k, ref_k: expected at least one key row, got none";
    if (a.k.rows + reference_rows(a) < 1) return "k: expected at least one fresh row at strength 0, got none";
    if (a.num_frames < 1 || a.q.rows % a.num_frames != 0)
        return expected("num_frames", "a divisor of L=" + std::to_string(a.q.rows), a.num_frames);
    if (a.num_frames > 1 && a.k.rows != a.q.rows)
        return expected("k", "L=" + std::to_string(a.q.rows) + " rows as in q", a.k.rows);
    if (a.radius < 0) return expected("radius", "0 or more frames", a.radius);
    if (!(a.scale > 0) || !std::isfinite(a.scale))
        return "scale: expected a finite number above 0, got " + std::to_string(a.scale);
    if (a.num_threads < 1) return expected("num_threads", "1 or more", a.num_threads);
    if (!supported(a.isa)) return std::string("isa: expected one that this machine has, got ") + isa_name(a.isa);
    if (a.ref_layout == KeyLayout::pairs && (a.isa != Isa::avx512bf16 || a.dtype != DType::bf16))
        return std::string("ref_v: expected rows, for pairs are read by avx512bf16 in bf16 only, got pairs for ") +
               isa_name(a.isa);
    if (a.ref_layout == KeyLayout::int8 && a.ref_k.rows > 0 && (a.ref_k_scale == nullptr || a.ref_v_scale == nullptr))
        return "ref_k_scale, ref_v_scale: expected addresses for int8 rows, got null";
    return "";
}

void attention(const AttentionArgs& args) {
    const Plan plan(args);
    if (args.q.rows == 0) return;
    const double threads = std::min<double>(args.num_threads, std::max(1.0, flops(args) / kFlopsPerThread));
    parallel_for(plan.num_tasks(), static_cast<int>(threads), [&plan](int64_t task) { plan.run(task); });
}

}  // namespace avatar_rt::cpu
