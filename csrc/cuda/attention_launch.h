// The launchers of the kernels, one per architecture, as attention.cu chooses among them.
#pragma once

#include <cuda_runtime.h>

#include "cuda/attention_problem.h"

namespace avatar_rt::cuda {

cudaError_t launch_sm80(const AttentionArgs& args, cudaStream_t stream);
cudaError_t launch_sm90(const AttentionArgs& args, cudaStream_t stream);

// Neighbouring blocks share a head, and so its keys in L2.
template <class Tile>
dim3 grid_of(const AttentionArgs& a) {
    return dim3(static_cast<unsigned>((a.q.rows + Tile::kQueries - 1) / Tile::kQueries), static_cast<unsigned>(a.heads),
                static_cast<unsigned>(a.batch));
}

}  // namespace avatar_rt::cuda
