#include "cpu/norm.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/vector_bf16.h"

namespace avatar_rt::cpu {
namespace {

inline __m512 load(const NormArgs& a, int64_t at) {
    return a.x_f32 ? _mm512_loadu_ps(static_cast<const float*>(a.x) + at)
                   : load_bf16(static_cast<const uint16_t*>(a.x) + at);
}

// Mean to subtract and factor of a row.
void statistics(const NormArgs& a, int64_t at, float* mean, float* factor) {
    const int64_t n = a.channels;
    *mean = 0;
    *factor = 1;
    if (a.norm == Norm::none) return;
    if (a.norm == Norm::layer) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < n; c += 16) sum = _mm512_add_ps(sum, load(a, at + c));
        *mean = _mm512_reduce_add_ps(sum) / static_cast<float>(n);
    }
    const __m512 middle = _mm512_set1_ps(*mean);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < n; c += 16) {
        const __m512 x = _mm512_sub_ps(load(a, at + c), middle);
        sum = _mm512_fmadd_ps(x, x, sum);
    }
    const float squares = _mm512_reduce_add_ps(sum), count = static_cast<float>(n);
    *factor = a.norm == Norm::length ? std::sqrt(count) / std::max(std::sqrt(squares), 1e-12f)
                                     : 1.f / std::sqrt(squares / count + a.eps);
}

void run_row(const NormArgs& a, int64_t row) {
    const int64_t at = a.from.at(row);
    float mean, factor;
    statistics(a, at, &mean, &factor);
    const float* scale = a.scale.data ? a.scale.row(row) : nullptr;
    const float* shift = a.shift.data ? a.shift.row(row) : nullptr;
    const int64_t turn = row % a.period * a.head_dim;
    uint16_t* y = a.y + a.to.at(row);
    for (int64_t c = 0; c < a.channels; c += 16) {
        __m512 x = _mm512_mul_ps(_mm512_sub_ps(load(a, at + c), _mm512_set1_ps(mean)), _mm512_set1_ps(factor));
        if (scale) x = _mm512_mul_ps(x, _mm512_loadu_ps(scale + c));
        if (shift) x = _mm512_add_ps(x, _mm512_loadu_ps(shift + c));
        if (a.cos) {
            const int64_t d = turn + c % a.head_dim;
            const __m512 swapped = _mm512_permute_ps(x, 0xb1);
            x = _mm512_fmadd_ps(x, _mm512_loadu_ps(a.cos + d), _mm512_mul_ps(swapped, _mm512_loadu_ps(a.sin + d)));
        }
        if (a.silu) x = silu(x);
        store_bf16(y + c, x);
    }
}

}  // namespace

void norm_avx512bf16(const NormArgs& a, int num_threads) {
    const int64_t task_rows = schedule().norm_rows, tasks = (a.rows + task_rows - 1) / task_rows;
    parallel_for(tasks, num_threads, [&](int64_t task) {
        for (int64_t row = task * task_rows; row < std::min(a.rows, (task + 1) * task_rows); ++row) run_row(a, row);
    });
}

}  // namespace avatar_rt::cpu
