// The CUDA attention kernels for Python, in builds that have them, and their emulation on a CPU, in every build.
#include "cuda/attention.h"
#include "cuda/attention_problem.h"
#include "views.h"

namespace py = pybind11;

namespace avatar_rt::bindings {
namespace {

using Tensors = std::optional<TensorArg>;

cuda::AttentionArgs args_of(const TensorArg& q, const Tensors& k, const Tensors& v, const Tensors& ref_k,
                            const Tensors& ref_v, uintptr_t out, uintptr_t lse, float scale, int64_t num_frames,
                            int64_t radius, float strength) {
    cuda::AttentionArgs args;
    args.q = view_of<cuda::View>("q", q, q, "B, L, N, D");
    if (q.dtype != "bfloat16" && q.dtype != "float16")
        input_error("q: expected dtype bfloat16 or float16, got " + q.dtype);
    args.dtype = q.dtype == "bfloat16" ? cuda::DType::bf16 : cuda::DType::f16;
    args.batch = q.shape[0];
    args.heads = q.shape[2];
    args.head_dim = q.shape[3];
    args.k = view_of<cuda::View>("k", k, q, "B, S, N, D");
    args.v = view_of<cuda::View>("v", v, q, "B, S, N, D");
    args.ref_k = view_of<cuda::View>("ref_k", ref_k, q, "B, R, N, D");
    args.ref_v = view_of<cuda::View>("ref_v", ref_v, q, "B, R, N, D");
    args.out = reinterpret_cast<void*>(out);
    args.lse = reinterpret_cast<float*>(lse);
    args.scale = scale;
    args.num_frames = num_frames;
    args.radius = radius;
    args.strength = strength;
    return args;
}

void check(const cuda::AttentionArgs& args) {
    const std::string faults = cuda::attention_faults(args);
    if (!faults.empty()) input_error(faults);
}

void emulated(const TensorArg& q, const Tensors& k, const Tensors& v, const Tensors& ref_k, const Tensors& ref_v,
              uintptr_t out, uintptr_t lse, float scale, int64_t num_frames, int64_t radius, float strength,
              const std::string& kernel) {
    cuda::AttentionArgs args = args_of(q, k, v, ref_k, ref_v, out, lse, scale, num_frames, radius, strength);
    if (kernel != "sm80" && kernel != "sm90") input_error("kernel: expected sm80 or sm90, got '" + kernel + "'");
    args.kernel = kernel == "sm80" ? cuda::Kernel::sm80 : cuda::Kernel::sm90;
    check(args);
    std::string fault;
    {
        py::gil_scoped_release release;
        fault = cuda::attention_emulated(args);
    }
    if (!fault.empty()) throw std::runtime_error("attention_" + kernel + ": " + fault);
}

template <class Tile>
py::dict kernel(const char* name) {
    py::dict d;
    d["kernel"] = name;
    d["head_dim"] = Tile::kDim;
    d["threads"] = Tile::kThreads;
    d["queries"] = Tile::kQueries;
    d["keys"] = Tile::kKeys;
    d["shared_bytes"] = Tile::kSharedBytes;
    return d;
}

#ifdef AVATAR_RT_CUDA_ATTENTION
void attention(const TensorArg& q, const Tensors& k, const Tensors& v, const Tensors& ref_k, const Tensors& ref_v,
               uintptr_t out, uintptr_t lse, float scale, int64_t num_frames, int64_t radius, float strength,
               uintptr_t stream) {
    const cuda::AttentionArgs args = args_of(q, k, v, ref_k, ref_v, out, lse, scale, num_frames, radius, strength);
    check(args);
    const int status = cuda::attention(args, reinterpret_cast<void*>(stream));
    if (status == 0) return;
    const std::string reason = cuda::attention_refusal(0);
    if (reason.empty()) throw std::runtime_error("attention: CUDA error " + std::to_string(status));
    PyErr_SetString(py::module_::import("avatar_rt.errors").attr("UnsupportedError").ptr(),
                    ("attention: " + reason).c_str());
    throw py::error_already_set();
}
#endif

}  // namespace

void bind_cuda_attention(py::module_& m) {
    m.def("cuda_attention_emulated", &emulated, py::arg("q"), py::arg("k").none(true), py::arg("v").none(true),
          py::arg("ref_k").none(true), py::arg("ref_v").none(true), py::arg("out"), py::arg("lse"), py::arg("scale"),
          py::arg("num_frames"), py::arg("radius"), py::arg("strength"), py::arg("kernel"),
          "The CUDA kernel sm80 or sm90 in software, on tensors of a CPU: for tests.");
    m.def(
        "cuda_attention_kernels",
        [] {
            py::list all;
            all.append(kernel<cuda::TileSm80<64>>("sm80"));
            all.append(kernel<cuda::TileSm80<128>>("sm80"));
            all.append(kernel<cuda::TileSm90<64>>("sm90"));
            all.append(kernel<cuda::TileSm90<128>>("sm90"));
            return all;
        },
        "Threads, tile and dynamic shared memory of the CUDA kernels' thread blocks.");
#ifdef AVATAR_RT_CUDA_ATTENTION
    m.def("cuda_attention", &attention, py::arg("q"), py::arg("k").none(true), py::arg("v").none(true),
          py::arg("ref_k").none(true), py::arg("ref_v").none(true), py::arg("out"), py::arg("lse"), py::arg("scale"),
          py::arg("num_frames"), py::arg("radius"), py::arg("strength"), py::arg("stream"),
          "Attention over segments on a CUDA stream of the current device. out is the address of a contiguous\n"
          "[B, L, N, D] in q's dtype, lse of a contiguous fp32 [B, N, L].");
    m.def("cuda_attention_refusal", &cuda::attention_refusal, py::arg("device"),
          "Why no attention kernel can run on this device, or an empty string.");
#else
    m.def(
        "cuda_attention_refusal",
        [](int) { return "avatar_rt._native was built without the CUDA attention kernels: run `make cuda`"; },
        py::arg("device"), "Why no attention kernel can run on this device.");
#endif
}

}  // namespace avatar_rt::bindings
