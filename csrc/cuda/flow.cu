#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda/flow.h"

namespace avatar_rt::cuda {
namespace {

__device__ float widen(float x) {
    return x;
}
__device__ float widen(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
__device__ void narrow(float x, float* y) {
    *y = x;
}
__device__ void narrow(float x, __nv_bfloat16* y) {
    *y = __float2bfloat16(x);
}

template <class T>
__global__ void flow_step_kernel(const T* z, const T* velocity, T* out, int64_t count, float dt) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride)
        narrow(fmaf(dt, widen(velocity[i]), widen(z[i])), out + i);
}

template <class T>
void launch(const FlowStepArgs& a, cudaStream_t stream) {
    constexpr int kThreads = 256;
    const int64_t wanted = (a.count + kThreads - 1) / kThreads;
    const int blocks = static_cast<int>(wanted < 4096 ? wanted : 4096);
    flow_step_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const T*>(a.z), static_cast<const T*>(a.velocity),
                                                      static_cast<T*>(a.out), a.count, a.dt);
}

}  // namespace

int flow_step(const FlowStepArgs& args, void* stream) {
    if (args.count == 0) return cudaSuccess;
    if (args.bf16)
        launch<__nv_bfloat16>(args, static_cast<cudaStream_t>(stream));
    else
        launch<float>(args, static_cast<cudaStream_t>(stream));
    return cudaGetLastError();
}

}  // namespace avatar_rt::cuda
