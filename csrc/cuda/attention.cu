// Which kernel runs where, and why none does.
#include "cuda/attention.h"

#include <cuda_runtime.h>

#include "cuda/attention_launch.h"

namespace avatar_rt::cuda {
namespace {

// 10 * major + minor of the device's compute capability.
cudaError_t capability_of(int device, int* capability) {
    int major = 0, minor = 0;
    cudaError_t status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    *capability = 10 * major + minor;
    return status;
}

std::string version(int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

}  // namespace

int attention(const AttentionArgs& args, void* stream) {
    if (args.batch == 0 || args.heads == 0 || args.q.rows == 0) return cudaSuccess;
    Kernel kernel = args.kernel;
    if (kernel == Kernel::best) {
        int device = 0, capability = 0;
        cudaError_t status = cudaGetDevice(&device);
        if (status == cudaSuccess) status = capability_of(device, &capability);
        if (status != cudaSuccess) return status;
        kernel = capability == 90 ? Kernel::sm90 : Kernel::sm80;  // wgmma is of 9.0 alone, not of what followed
    }
    const auto launch = kernel == Kernel::sm90 ? launch_sm90 : launch_sm80;
    return launch(args, static_cast<cudaStream_t>(stream));
}

std::string attention_refusal(int device) {
    int count = 0, driver = 0, capability = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorInsufficientDriver) {
        if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no CUDA driver is loaded";
        return "the CUDA driver supports " + version(driver) + ", this build needs " + version(CUDART_VERSION);
    }
    if (status == cudaErrorNoDevice) return "no CUDA device is visible";
    if (status == cudaSuccess) status = capability_of(device, &capability);
    if (status != cudaSuccess) return std::string("CUDA says: ") + cudaGetErrorString(status);
    if (capability < 80)
        return "compute capability " + std::to_string(capability / 10) + "." + std::to_string(capability % 10) +
               " is below 8.0";
    return "";
}

}  // namespace avatar_rt::cuda
