// bf16 by vdpbf16ps: weights lie in pairs of channels, sixteen outputs to a register; rows enter as broadcast pairs.
#include <algorithm>

#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/vector_bf16.h"

namespace avatar_rt::cpu {
namespace {

// Rows of a register tile for 1..4 vectors of outputs: tile * vectors accumulators, vectors weights, one broadcast.
constexpr int kTileRows[5] = {0, 12, 12, 8, 6};
constexpr int kMostRows = 12;

struct TileJob {
    const LinearArgs& args;
    const uint16_t* rows[kMostRows];
    int64_t first_row, first_output;
    int num_rows;
    const uint16_t* weight;
};

void finish_tile(const TileJob& job, int i, int j, __m512 sum) {
    const LinearArgs& a = job.args;
    const int64_t n = job.first_output + 16 * j, row = job.first_row + i;
    const int left = static_cast<int>(std::min<int64_t>(16, a.outputs - n));
    const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
    if (a.bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, a.bias + n));
    const int64_t at = a.to.at(row) + n;
    if (a.finish == Finish::residual) {
        if (a.gate.data) sum = _mm512_mul_ps(sum, _mm512_maskz_loadu_ps(mask, a.gate.row(row) + n));
        if (a.plus.data) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, a.plus.row(row) + n));
        float* y = static_cast<float*>(a.y) + at;
        _mm512_mask_storeu_ps(y, mask, _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, y)));
        return;
    }
    if (a.finish == Finish::gelu) sum = gelu_tanh(sum);
    if (a.y_f32)
        _mm512_mask_storeu_ps(static_cast<float*>(a.y) + at, mask, sum);
    else
        store_bf16(static_cast<uint16_t*>(a.y) + at, sum, mask);
}

template <int M, int NV>
void tile(const TileJob& job) {
    __m512 acc[M][NV];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < NV; ++j) acc[i][j] = _mm512_setzero_ps();
    const uint16_t* w = job.weight;
    for (int t = 0; t < job.args.num_taps; ++t) {
        const uint16_t* x[M];
        for (int i = 0; i < M; ++i) x[i] = job.rows[i] + job.args.taps[t];
        for (int64_t c = 0; c < job.args.channels; c += 2, w += NV * 32) {
            __m512i weight[NV];
            for (int j = 0; j < NV; ++j) weight[j] = _mm512_loadu_si512(w + 32 * j);
            for (int i = 0; i < M; ++i) {
                int bits;
                std::memcpy(&bits, x[i] + c, 4);
                const __m512i pair = _mm512_set1_epi32(bits);
                for (int j = 0; j < NV; ++j)
                    acc[i][j] = _mm512_dpbf16_ps(acc[i][j], (__m512bh)pair, (__m512bh)weight[j]);
            }
        }
    }
    for (int i = 0; i < M && i < job.num_rows; ++i)
        for (int j = 0; j < NV; ++j) finish_tile(job, i, j, acc[i][j]);
}

void run_task(const LinearArgs& a, int64_t first, int64_t last) {
    const int64_t k = a.num_taps * a.channels;
    for (int64_t n = 0; n < a.outputs; n += kPanel) {
        const int vectors = static_cast<int>((std::min(kPanel, a.outputs - n) + 15) / 16), height = kTileRows[vectors];
        for (int64_t row = first; row < last; row += height) {
            TileJob job{a, {}, row, n, static_cast<int>(std::min<int64_t>(height, last - row)), a.weight + n * k};
            // Rows beyond the end repeat the last one and are not stored.
            for (int i = 0; i < height; ++i) job.rows[i] = a.x + a.from.at(std::min(row + i, last - 1));
            switch (vectors) {
                case 1:
                    tile<kTileRows[1], 1>(job);
                    break;
                case 2:
                    tile<kTileRows[2], 2>(job);
                    break;
                case 3:
                    tile<kTileRows[3], 3>(job);
                    break;
                default:
                    tile<kTileRows[4], 4>(job);
            }
        }
    }
}

}  // namespace

void linear_avx512bf16(const LinearArgs& a, int num_threads) {
    const int64_t task_rows = schedule().linear_rows, tasks = (a.rows + task_rows - 1) / task_rows;
    parallel_for(tasks, num_threads,
                 [&](int64_t task) { run_task(a, task * task_rows, std::min(a.rows, (task + 1) * task_rows)); });
}

}  // namespace avatar_rt::cpu
