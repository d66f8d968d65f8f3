#include "cpu/attention_backward.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/attention_backward_job.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace avatar_rt::cpu {
namespace {

const AttentionBackwardKernel& kernel_for(DType dtype, Isa isa) {
    const bool f32 = dtype == DType::f32;
#ifdef AVATAR_RT_X86
    switch (isa) {
        case Isa::avx512bf16:
#ifdef AVATAR_RT_AVX512BF16
            if (!f32) return kAttentionBackwardBf16Avx512bf16;
#endif
            [[fallthrough]];
        case Isa::avx512:
            return f32 ? kAttentionBackwardF32Avx512 : kAttentionBackwardBf16Avx512;
        case Isa::avx2:
            return f32 ? kAttentionBackwardF32Avx2 : kAttentionBackwardBf16Avx2;
        case Isa::scalar:
            break;
    }
#endif
    (void)isa;
    return f32 ? kAttentionBackwardF32Scalar : kAttentionBackwardBf16Scalar;
}

int64_t pieces(int64_t rows, int64_t most) {
    return (rows + most - 1) / most;
}

// `rows` in equal blocks of at most `most`, whose size is a multiple of `step`.
struct Blocks {
    int64_t rows, count, size;
    Blocks(int64_t rows, int64_t most, int64_t step) : rows(rows), count(pieces(rows, most)) {
        size = pieces(pieces(rows, std::max<int64_t>(count, 1)), step) * step;
        size = std::max<int64_t>(size, step);
    }
    int64_t first(int64_t i) const { return i * size; }
    int rows_of(int64_t i) const { return static_cast<int>(std::min(size, rows - i * size)); }
};

// The shape in blocks and the workspace in bytes. A group is the heads that are worked on at the same time.
struct Plan {
    const AttentionBackwardArgs& args;
    const AttentionArgs& call;
    const AttentionBackwardKernel& kernel;
    const int64_t element, heads, frames;
    const Blocks queries;  // of a frame
    const Blocks fresh;    // of a frame where there are frames, else of all
    const Blocks reference;
    int64_t num_queries, num_fresh, num_keys, chunks, group;
    size_t packed_stride, dq_stride, head_bytes;  // dq_stride in floats

    static constexpr int64_t kGroupBytes = 16 << 20;

    explicit Plan(const AttentionBackwardArgs& a)
        : args(a),
          call(a.call),
          kernel(kernel_for(a.call.dtype, a.call.isa)),
          element(a.call.dtype == DType::f32 ? 4 : 2),
          heads(a.call.batch * a.call.heads),
          frames(a.call.radius < a.call.num_frames - 1 ? a.call.num_frames : 1),
          queries(a.call.q.rows / frames, kBackwardRows, 16),
          fresh(frames > 1 ? a.call.q.rows / frames : a.call.k.rows, kernel.key_rows, 12),
          reference(a.call.strength > 0 ? a.call.ref_k.rows : 0, kernel.key_rows, 12) {
        num_queries = frames * queries.count;
        num_fresh = frames * fresh.count;
        num_keys = num_fresh + reference.count;
        chunks = std::min<int64_t>(kBackwardChunks, pieces(num_keys * kernel.key_rows, 384));
        const int head_dim = static_cast<int>(call.head_dim);
        packed_stride = kernel.packed_bytes(head_dim, static_cast<int>(queries.size));
        dq_stride = args.dq ? static_cast<size_t>(queries.size) * kernel.sum_channels(head_dim) : 0;
        head_bytes = num_queries * (packed_stride + chunks * dq_stride * sizeof(float));
        const int64_t fitting = kGroupBytes / std::max<int64_t>(static_cast<int64_t>(head_bytes), 1);
        group = std::max(fitting, pieces(4 * call.num_threads, std::max<int64_t>(chunks, 1)));
        group = std::max<int64_t>(std::min(group, heads), 1);
    }

    const char* at(const View& view, int64_t head, int64_t row) const {
        const int64_t b = head / call.heads, n = head % call.heads;
        return static_cast<const char*>(view.data) +
               element * (b * view.batch_stride + row * view.row_stride + n * view.head_stride);
    }

    // A row of a contiguous [batch, rows, heads, head_dim]; null stays null.
    char* at(void* data, int64_t rows, int64_t head, int64_t row) const {
        const int64_t b = head / call.heads, n = head % call.heads;
        return data ? static_cast<char*>(data) + element * ((b * rows + row) * call.heads + n) * call.head_dim
                    : nullptr;
    }

    int64_t query_row(int64_t block) const {
        return block / queries.count * (call.q.rows / frames) + queries.first(block % queries.count);
    }

    int64_t first_key(int64_t chunk) const { return chunk * num_keys / chunks; }

    // Query blocks that see a key block.
    void seen_by(int64_t key, int64_t* first, int64_t* last) const {
        *first = 0;
        *last = num_queries;
        if (frames == 1 || key >= num_fresh) return;
        const int64_t frame = key / fresh.count;
        *first = std::max<int64_t>(frame - call.radius, 0) * queries.count;
        *last = std::min(frame + call.radius + 1, frames) * queries.count;
    }

    // Query blocks that a chunk's key blocks are seen by: one range, as the blocks' ranges overlap or touch.
    void seen_by_chunk(int64_t chunk, int64_t* first, int64_t* last) const {
        *first = num_queries;
        *last = 0;
        for (int64_t key = first_key(chunk); key < first_key(chunk + 1); ++key) {
            int64_t low, high;
            seen_by(key, &low, &high);
            *first = std::min(*first, low);
            *last = std::max(*last, high);
        }
    }

    char* packed(char* memory) const { return memory; }
    float* dq_parts(char* memory, int64_t chunk) const {
        return reinterpret_cast<float*>(memory + num_queries * packed_stride) + chunk * num_queries * dq_stride;
    }

    void pack(int64_t head, int64_t block, char* memory) const {
        const int64_t row = query_row(block), at_lse = head * call.q.rows + row;
        QueryPackJob job{};
        job.q = at(call.q, head, row);
        job.q_stride = call.q.row_stride;
        job.grad = at(args.grad, head, row);
        job.grad_stride = args.grad.row_stride;
        job.out = at(call.out, call.q.rows, head, row);
        job.out_stride = call.heads * call.head_dim;
        job.lse = call.lse + at_lse;
        job.grad_lse = args.grad_lse ? args.grad_lse + at_lse : nullptr;
        job.rows = queries.rows_of(block % queries.count);
        job.head_dim = static_cast<int>(call.head_dim);
        job.packed = packed(memory) + block * packed_stride;
        kernel.pack(job);
    }

    void run_chunk(int64_t head, int64_t chunk, char* memory) const {
        int64_t first, last;
        seen_by_chunk(chunk, &first, &last);
        if (args.dq && first < last)
            std::memset(dq_parts(memory, chunk) + first * dq_stride, 0, (last - first) * dq_stride * sizeof(float));
        for (int64_t key = first_key(chunk); key < first_key(chunk + 1); ++key) run_key(head, chunk, key, memory);
    }

    void run_key(int64_t head, int64_t chunk, int64_t key, char* memory) const {
        const bool is_fresh = key < num_fresh;
        const Blocks& blocks = is_fresh ? fresh : reference;
        const View &k = is_fresh ? call.k : call.ref_k, &v = is_fresh ? call.v : call.ref_v;
        const int64_t index = is_fresh ? key % fresh.count : key - num_fresh;
        const int64_t row = (is_fresh ? key / fresh.count * fresh.rows : 0) + blocks.first(index);
        KeyBlockJob job{};
        job.k = at(k, head, row);
        job.v = at(v, head, row);
        job.k_stride = k.row_stride;
        job.v_stride = v.row_stride;
        job.rows = blocks.rows_of(index);
        job.head_dim = static_cast<int>(call.head_dim);
        seen_by(key, &job.first, &job.last);
        job.blocks_per_frame = queries.count;
        job.block_rows = queries.size;
        job.frame_rows = queries.rows;
        job.packed = packed(memory);
        job.packed_stride = packed_stride;
        job.dq = args.dq ? dq_parts(memory, chunk) : nullptr;
        job.dq_stride = dq_stride;
        job.scale = call.scale;
        job.scale_log2 = call.scale * 1.44269504f;  // as in the forward pass
        job.bias_log2 = is_fresh ? 0.f : std::log2(call.strength);
        job.dk = at(is_fresh ? args.dk : args.dref_k, k.rows, head, row);
        job.dv = at(is_fresh ? args.dv : args.dref_v, v.rows, head, row);
        job.grad_stride = call.heads * call.head_dim;
        if (job.dk || job.dv || job.dq) kernel.keys(job, scratch_of_thread(kernel.scratch_bytes(job.head_dim)));
    }

    void sum(int64_t head, int64_t block, char* memory) const {
        QuerySumJob job{};
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            int64_t first, last;
            seen_by_chunk(chunk, &first, &last);
            if (first <= block && block < last)
                job.parts[job.num_parts++] = dq_parts(memory, chunk) + block * dq_stride;
        }
        job.rows = queries.rows_of(block % queries.count);
        job.head_dim = static_cast<int>(call.head_dim);
        job.scale = call.scale;
        job.dq = at(args.dq, call.q.rows, head, query_row(block));
        job.dq_stride = call.heads * call.head_dim;
        kernel.sum(job);
    }
};

// Below this a thread's wake-up costs more than it saves.
constexpr double kFlopsPerThread = 2e7;

double flops(const Plan& plan) {
    double seen = 0;
    for (int64_t key = 0; key < plan.num_keys; ++key) {
        int64_t first, last;
        plan.seen_by(key, &first, &last);
        seen += static_cast<double>(last - first) * plan.queries.size * plan.kernel.key_rows;
    }
    return 10.0 * plan.heads * plan.call.head_dim * seen;
}

void clear(void* data, const View& like, const AttentionArgs& call) {
    const size_t element = call.dtype == DType::f32 ? 4 : 2;
    if (data) std::memset(data, 0, element * call.batch * like.rows * call.heads * call.head_dim);
}

}  // namespace

std::string attention_backward_faults(const AttentionBackwardArgs& a) {
    const std::string faults = attention_faults(a.call);
    if (!faults.empty()) return faults;
    if (a.call.ref_layout != KeyLayout::rows) return "ref_k: expected plain rows, got a packed reference";
    if (a.grad.rows != a.call.q.rows)
        return "grad: expected L=" + std::to_string(a.call.q.rows) + ", got " + std::to_string(a.grad.rows);
    return "";
}

size_t attention_backward_workspace(const AttentionBackwardArgs& args) {
    const Plan plan(args);
    return plan.group * plan.head_bytes;
}

void attention_backward(const AttentionBackwardArgs& args, void* workspace) {
    const Plan plan(args);
    const int threads =
        static_cast<int>(std::min<double>(args.call.num_threads, std::max(1.0, flops(plan) / kFlopsPerThread)));
    if (args.call.strength == 0) {
        clear(args.dref_k, args.call.ref_k, args.call);
        clear(args.dref_v, args.call.ref_v, args.call);
    }
    for (int64_t start = 0; start < plan.heads; start += plan.group) {
        const int64_t count = std::min(plan.group, plan.heads - start);
        const auto each = [&](int64_t per_head, auto body) {
            parallel_for(count * per_head, threads, [&](int64_t task) {
                const int64_t head = task / per_head;
                body(start + head, task % per_head, static_cast<char*>(workspace) + head * plan.head_bytes);
            });
        };
        each(plan.num_queries, [&](int64_t head, int64_t i, char* memory) { plan.pack(head, i, memory); });
        each(plan.chunks, [&](int64_t head, int64_t i, char* memory) { plan.run_chunk(head, i, memory); });
        if (args.dq) each(plan.num_queries, [&](int64_t head, int64_t i, char* memory) { plan.sum(head, i, memory); });
    }
}

}  // namespace avatar_rt::cpu
