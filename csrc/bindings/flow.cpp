// The CUDA flow step for Python, in builds that have it.
#include "native.h"

#ifdef AVATAR_RT_CUDA
#include "cuda/flow.h"
#endif

namespace py = pybind11;

namespace avatar_rt::bindings {

void bind_flow(py::module_& m) {
#ifdef AVATAR_RT_CUDA
    m.def(
        "flow_step_cuda",
        [](uintptr_t z, uintptr_t velocity, uintptr_t out, int64_t count, float dt, const std::string& dtype,
           uintptr_t stream) {
            if (dtype != "float32" && dtype != "bfloat16")
                input_error("z: expected dtype float32 or bfloat16, got " + dtype);
            const cuda::FlowStepArgs args{reinterpret_cast<const void*>(z),
                                          reinterpret_cast<const void*>(velocity),
                                          reinterpret_cast<void*>(out),
                                          count,
                                          dt,
                                          dtype == "bfloat16"};
            const int status = cuda::flow_step(args, reinterpret_cast<void*>(stream));
            if (status != 0) throw std::runtime_error("flow_step: CUDA error " + std::to_string(status));
        },
        py::arg("z"), py::arg("velocity"), py::arg("out"), py::arg("count"), py::arg("dt"), py::arg("dtype"),
        py::arg("stream"), "out = z + dt * velocity on a CUDA stream, for contiguous tensors by address.");
#else
    (void)m;
#endif
}

}  // namespace avatar_rt::bindings
