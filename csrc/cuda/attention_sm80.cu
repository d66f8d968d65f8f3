// The sm_80 attention kernel: attention_sm80.h on real threads. It runs on 8.x as it is and on later chips as PTX.
// Bound by the tensor cores; K and V come from L2 once per 128 queries.
#include <cuda_runtime.h>

#include "cuda/attention_launch.h"
#include "cuda/device_team.h"
#include "cuda/instructions_sm80.h"

namespace avatar_rt::cuda {
namespace {

template <class Tile>
struct Block : DeviceTeam<Tile> {
    __device__ __forceinline__ void copy16(uint32_t to, const unsigned char* from, bool exists) {
        cp_async16(to, from, exists);
    }
    __device__ __forceinline__ void commit() { cp_async_commit(); }
    template <int kPending>
    __device__ __forceinline__ void wait_copies() {
        cp_async_wait<kPending>();
    }
    __device__ __forceinline__ void sync() { __syncthreads(); }
    template <class To, class Address>
    __device__ __forceinline__ void ldmatrix(To&& to, Address&& address) {
        ldmatrix_x4(to(this->registers), address(this->thread));
    }
    template <class To, class Address>
    __device__ __forceinline__ void ldmatrix_transposed(To&& to, Address&& address) {
        ldmatrix_x4_transposed(to(this->registers), address(this->thread));
    }
    template <class T, class C, class A, class B>
    __device__ __forceinline__ void mma(C&& c, A&& a, B&& b) {
        mma_m16n8k16<T>(c(this->registers), a(this->registers), b(this->registers));
    }
};

template <class T, int kDim>
__global__ __launch_bounds__(TileSm80<kDim>::kThreads,
                             2) void attention_sm80_kernel(const __grid_constant__ Problem p,
                                                           const __grid_constant__ Sources from) {
    using Tile = TileSm80<kDim>;
    extern __shared__ __align__(1024) unsigned char memory[];
    Block<Tile> block;
    block.thread = threadIdx.x;
    const Place at{static_cast<int32_t>(blockIdx.x) * Tile::kQueries, static_cast<int32_t>(blockIdx.y),
                   static_cast<int32_t>(blockIdx.z)};
    attend_sm80<T, Tile>(block, p, from, at, shared_address(memory));
}

Source source_of(const View& v) {
    return {static_cast<const unsigned char*>(v.data), 2 * v.batch_stride, 2 * v.row_stride, 2 * v.head_stride};
}

template <class T, int kDim>
cudaError_t launch(const AttentionArgs& a, cudaStream_t stream) {
    using Tile = TileSm80<kDim>;
    const auto kernel = attention_sm80_kernel<T, kDim>;
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
    if (status != cudaSuccess) return status;
    const Sources from{source_of(a.q), source_of(a.k), source_of(a.v), source_of(a.ref_k), source_of(a.ref_v)};
    kernel<<<grid_of<Tile>(a), Tile::kThreads, Tile::kSharedBytes, stream>>>(problem_of(a), from);
    return cudaGetLastError();
}

}  // namespace

cudaError_t launch_sm80(const AttentionArgs& a, cudaStream_t stream) {
    if (a.dtype == DType::bf16) return a.head_dim == 64 ? launch<Bf16, 64>(a, stream) : launch<Bf16, 128>(a, stream);
    return a.head_dim == 64 ? launch<Fp16, 64>(a, stream) : launch<Fp16, 128>(a, stream);
}

}  // namespace avatar_rt::cuda
