// The sm_90a attention kernel: attention_sm90.h on real threads, tensor maps made on the host for every launch.
// Bound by wgmma at head_dim 128, by wgmma and the exponential alike at 64.
#include <cuda.h>
#include <cuda_runtime.h>

#include "cuda/attention_launch.h"
#include "cuda/attention_sm90.h"
#include "cuda/attention_tensor.h"
#include "cuda/device_team.h"
#include "cuda/instructions_sm80.h"
#include "cuda/instructions_sm90.h"

namespace avatar_rt::cuda {
namespace {

constexpr int kOperands = 5;

struct Maps {
    CUtensorMap map[kOperands];  // in the order of Operand; an operand without rows has none
    int32_t head_step[kOperands], batch_step[kOperands];
};

struct ProducerThread {
    const Maps& maps;

    __device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) { mbarrier_wait(barrier, parity); }
    __device__ __forceinline__ void expect(uint32_t barrier, int bytes) { mbarrier_expect(barrier, bytes); }
    __device__ __forceinline__ void copy(Operand operand, uint32_t to, uint32_t barrier, int element, int32_t row,
                                         const Place& at) {
        const int i = static_cast<int>(operand);
        tensor_copy(to, &maps.map[i], barrier, element, row, at.head * maps.head_step[i],
                    at.batch * maps.batch_step[i]);
    }
};

template <class Tile>
struct ConsumerWarpgroup : DeviceTeam<Tile> {
    __device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) { mbarrier_wait(barrier, parity); }
    __device__ __forceinline__ void release(uint32_t barrier) {
        if (this->thread % 32 == 0) mbarrier_arrive(barrier);
    }
    __device__ __forceinline__ void take_turn(int consumer) { bar_sync(1 + consumer); }
    __device__ __forceinline__ void pass_turn(int consumer) { bar_arrive(1 + (1 - consumer)); }

    __device__ __forceinline__ void begin_scores() {
        hold(this->registers.score[0]);
        wgmma_fence();
    }
    __device__ __forceinline__ void begin_values() {
        hold(this->registers.out[0]);
        hold(this->registers.weight[0]);
        wgmma_fence();
    }
    __device__ __forceinline__ void end_products() { wgmma_commit(); }
    template <class T>
    __device__ __forceinline__ void score_product(uint64_t a, uint64_t b, bool add) {
        wgmma_scores<T>(this->registers.score[0], a, b, add);
    }
    template <class T>
    __device__ __forceinline__ void value_product(int step, uint64_t b) {
        wgmma_values<T>(this->registers.out[0], this->registers.weight[0][step], b);
    }
    template <int kPending>
    __device__ __forceinline__ void wait_products() {
        wgmma_wait<kPending>();
        hold(this->registers.score[0]);
        if (kPending > 0) return;  // the values are still being multiplied
        hold(this->registers.out[0]);
        hold(this->registers.weight[0]);
    }
};

template <class T, int kDim>
__global__ __launch_bounds__(TileSm90<kDim>::kThreads,
                             1) void attention_sm90_kernel(const __grid_constant__ Problem p,
                                                           const __grid_constant__ Maps maps) {
    using Tile = TileSm90<kDim>;
    extern __shared__ __align__(1024) unsigned char memory[];
    const Shared<Tile> shared{(shared_address(memory) + Tile::kAlignment - 1) / Tile::kAlignment * Tile::kAlignment};
    const Place at{static_cast<int32_t>(blockIdx.x) * Tile::kQueries, static_cast<int32_t>(blockIdx.y),
                   static_cast<int32_t>(blockIdx.z)};
    if (threadIdx.x == 0) {
        each_barrier(shared, [](uint32_t barrier, int arrivals) { mbarrier_init(barrier, arrivals); });
        mbarrier_init_fence();
    }
    __syncthreads();
    // From one register of warp 0's, so that the compiler sees one value per warp.
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
    if (warpgroup == 0) {
        registers_down<Tile::kProducerRegisters>();
        if (threadIdx.x == 0) {
            ProducerThread producer{maps};
            produce_sm90<Tile>(producer, p, shared, at);
        }
    } else {
        registers_up<Tile::kConsumerRegisters>();
        ConsumerWarpgroup<Tile> team;
        team.thread = threadIdx.x % 128;
        consume_sm90<T, Tile>(team, p, shared, at, warpgroup - 1);
    }
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// From the driver through the runtime, so that nothing links libcuda.
cudaError_t find_encoder(Encode* encode) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    if (status != cudaSuccess) return status;
    if (result != cudaDriverEntryPointSuccess) return cudaErrorCallRequiresNewerDriver;
    *encode = reinterpret_cast<Encode>(found);
    return cudaSuccess;
}

// Boxes of `panel` head dims and `rows` rows of one head; rows past the end arrive as zeros.
bool encode_map(Encode encode, CUtensorMap* map, DType dtype, const Tensor& t, int panel, int rows) {
    const cuuint64_t sizes[4] = {t.sizes[0], t.sizes[1], t.sizes[2], t.sizes[3]};
    const cuuint64_t strides[3] = {t.strides[0], t.strides[1], t.strides[2]};
    const cuuint32_t box[4] = {static_cast<cuuint32_t>(panel), static_cast<cuuint32_t>(rows), 1, 1};
    const cuuint32_t steps[4] = {1, 1, 1, 1};
    const auto type = dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    return encode(map, type, 4, const_cast<void*>(t.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class T, int kDim>
cudaError_t launch(const AttentionArgs& a, cudaStream_t stream) {
    using Tile = TileSm90<kDim>;
    Encode encode = nullptr;
    cudaError_t status = find_encoder(&encode);
    if (status != cudaSuccess) return status;
    Maps maps = {};
    const View* views[kOperands] = {&a.q, &a.k, &a.v, &a.ref_k, &a.ref_v};
    for (int i = 0; i < kOperands; ++i) {
        if (views[i]->rows == 0) continue;
        const Tensor tensor = tensor_of(*views[i], a.head_dim, a.heads, a.batch);
        maps.head_step[i] = tensor.head_step;
        maps.batch_step[i] = tensor.batch_step;
        const int rows = i == static_cast<int>(Operand::q) ? Tile::kQueries : Tile::kKeys;
        if (!encode_map(encode, &maps.map[i], a.dtype, tensor, Tile::kPanel, rows)) return cudaErrorInvalidValue;
    }
    const auto kernel = attention_sm90_kernel<T, kDim>;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
    if (status != cudaSuccess) return status;
    kernel<<<grid_of<Tile>(a), Tile::kThreads, Tile::kSharedBytes, stream>>>(problem_of(a), maps);
    return cudaGetLastError();
}

}  // namespace

cudaError_t launch_sm90(const AttentionArgs& a, cudaStream_t stream) {
    if (a.dtype == DType::bf16) return a.head_dim == 64 ? launch<Bf16, 64>(a, stream) : launch<Bf16, 128>(a, stream);
    return a.head_dim == 64 ? launch<Fp16, 64>(a, stream) : launch<Fp16, 128>(a, stream);
}

}  // namespace avatar_rt::cuda
