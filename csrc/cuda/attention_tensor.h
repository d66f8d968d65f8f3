// A strided operand as the tensor copy engine is told about it: four dimensions, innermost first.
#pragma once

#include "cuda/attention.h"

namespace avatar_rt::cuda {

struct Tensor {
    const void* data;
    uint64_t sizes[4];              // head_dim, rows, heads, batch
    uint64_t strides[3];            // bytes, of all but the innermost
    int32_t head_step, batch_step;  // coordinate per head and per batch: 0 where the operand repeats
};

// The engine has no stride of 0: a repeated dimension has size 1 and is always asked for at 0.
inline Tensor tensor_of(const View& view, int64_t head_dim, int64_t heads, int64_t batch) {
    const bool head_repeats = view.head_stride == 0, batch_repeats = view.batch_stride == 0;
    Tensor t{view.data,
             {static_cast<uint64_t>(head_dim), static_cast<uint64_t>(view.rows),
              static_cast<uint64_t>(head_repeats ? 1 : heads), static_cast<uint64_t>(batch_repeats ? 1 : batch)},
             {2 * static_cast<uint64_t>(view.row_stride), 2 * static_cast<uint64_t>(view.head_stride),
              2 * static_cast<uint64_t>(view.batch_stride)},
             !head_repeats,
             !batch_repeats};
    for (int i = 0; i < 3; ++i)
        if (t.sizes[i + 1] == 1) t.strides[i] = 16;  // of no consequence, and views of one row may have odd strides
    return t;
}

}  // namespace avatar_rt::cuda
