// One flow-solver step on a GPU: out = z + dt * velocity in fp32, stored in the dtype of z.
// Contiguous tensors of one dtype, no alignment asked for. Bound by bytes: two reads and one write per element.
#pragma once

#include <cstdint>

namespace avatar_rt::cuda {

struct FlowStepArgs {
    const void* z;
    const void* velocity;
    void* out;
    int64_t count;
    float dt;
    bool bf16;  // else fp32
};

// Launches on `stream` (a cudaStream_t); allocates nothing and waits for nothing. Returns the cudaError_t.
int flow_step(const FlowStepArgs& args, void* stream);

}  // namespace avatar_rt::cuda
