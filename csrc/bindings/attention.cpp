// The attention kernel for Python: the checks and sentences of avatar_rt/ops/attention.py, then the call.
#include "cpu/attention.h"

#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>

#include "cpu/attention_backward.h"

#include "native.h"

namespace py = pybind11;

namespace avatar_rt::bindings {
namespace {

using cpu::View;

std::string list(const std::vector<int64_t>& values) {
    std::string text = "[";
    for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
    return text + "]";
}

void expect(const std::string& name, const char* letter, int64_t wanted, const TensorArg& x, int axis,
            const char* layout) {
    if (x.shape[axis] != wanted)
        input_error(name + ": expected " + letter + "=" + std::to_string(wanted) + ", got " +
                    std::to_string(x.shape[axis]) + " (shape " + list(x.shape) + " for [" + layout + "])");
}

View view_of(const std::string& name, const TensorArg& x, const TensorArg& q, const char* layout) {
    if (x.shape.size() != 4) input_error(name + ": expected 4 dimensions [" + layout + "], got shape " + list(x.shape));
    expect(name, "B", q.shape[0], x, 0, layout);
    expect(name, "N", q.shape[2], x, 2, layout);
    expect(name, "D", q.shape[3], x, 3, layout);
    if (x.dtype != q.dtype) input_error(name + ": expected dtype " + q.dtype + " like q, got " + x.dtype);
    if (x.shape[3] > 1 && x.strides[3] != 1)
        input_error(name + ": expected a contiguous last dimension, got strides " + list(x.strides));
    return {reinterpret_cast<const void*>(x.address), x.shape[1], x.strides[0], x.strides[1], x.strides[2]};
}

View optional_view(const std::string& name, const std::optional<TensorArg>& x, const TensorArg& q, const char* layout) {
    return x ? view_of(name, *x, q, layout) : View{};
}

cpu::DType dtype_of(const TensorArg& q) {
    if (q.dtype == "float32") return cpu::DType::f32;
    if (q.dtype == "bfloat16") return cpu::DType::bf16;
    input_error("q: expected dtype float32 or bfloat16, got " + q.dtype);
}

using OptionalTensor = std::optional<TensorArg>;

cpu::AttentionArgs args_of(const TensorArg& q, const OptionalTensor& k, const OptionalTensor& v,
                           const OptionalTensor& ref_k, const OptionalTensor& ref_v, uintptr_t out, uintptr_t lse,
                           float scale, int64_t num_frames, int64_t radius, int num_threads,
                           const std::optional<std::string>& isa) {
    cpu::AttentionArgs args;
    args.q = view_of("q", q, q, "B, L, N, D");
    args.dtype = dtype_of(q);
    args.batch = q.shape[0];
    args.heads = q.shape[2];
    args.head_dim = q.shape[3];
    args.k = optional_view("k", k, q, "B, S, N, D");
    args.v = optional_view("v", v, q, "B, S, N, D");
    args.ref_k = optional_view("ref_k", ref_k, q, "B, R, N, D");
    args.ref_v = optional_view("ref_v", ref_v, q, "B, R, N, D");
    args.out = reinterpret_cast<void*>(out);
    args.lse = reinterpret_cast<float*>(lse);
    args.scale = scale;
    args.num_frames = num_frames;
    args.radius = radius;
    args.num_threads = num_threads;
    args.isa = cpu::best_isa();
    if (isa && !cpu::parse_isa(isa->c_str(), &args.isa))
        input_error("isa: expected scalar, avx2, avx512 or avx512bf16, got '" + *isa + "'");
    return args;
}

void attention(const TensorArg& q, const OptionalTensor& k, const OptionalTensor& v, const OptionalTensor& ref_k,
               const OptionalTensor& ref_v, uintptr_t out, uintptr_t lse, float scale, int64_t num_frames,
               int64_t radius, int num_threads, const std::optional<std::string>& isa) {
    const cpu::AttentionArgs args =
        args_of(q, k, v, ref_k, ref_v, out, lse, scale, num_frames, radius, num_threads, isa);
    const std::string faults = cpu::attention_faults(args);
    if (!faults.empty()) input_error(faults);
    py::gil_scoped_release release;
    cpu::attention(args);
}

void attention_backward(const TensorArg& grad, uintptr_t grad_lse, const TensorArg& q, const OptionalTensor& k,
                        const OptionalTensor& v, const OptionalTensor& ref_k, const OptionalTensor& ref_v,
                        uintptr_t out, uintptr_t lse, const std::array<uintptr_t, 5>& grads, float scale,
                        float strength, int64_t num_frames, int64_t radius, int num_threads,
                        const std::optional<std::string>& isa) {
    cpu::AttentionBackwardArgs args;
    args.call = args_of(q, k, v, ref_k, ref_v, out, lse, scale, num_frames, radius, num_threads, isa);
    args.strength = strength;
    args.grad = view_of("grad", grad, q, "B, L, N, D");
    args.grad_lse = reinterpret_cast<const float*>(grad_lse);
    void** to[] = {&args.dq, &args.dk, &args.dv, &args.dref_k, &args.dref_v};
    for (int i = 0; i < 5; ++i) *to[i] = reinterpret_cast<void*>(grads[i]);
    const std::string faults = cpu::attention_backward_faults(args);
    if (!faults.empty()) input_error(faults);
    py::gil_scoped_release release;
    const size_t bytes = cpu::attention_backward_workspace(args);
    const std::unique_ptr<void, void (*)(void*)> workspace(std::aligned_alloc(64, (bytes + 64) / 64 * 64), std::free);
    if (!workspace) throw std::bad_alloc();
    cpu::attention_backward(args, workspace.get());
}

}  // namespace

void bind_attention(py::module_& m) {
    m.def("attention", &attention, py::arg("q"), py::arg("k").none(true), py::arg("v").none(true),
          py::arg("ref_k").none(true), py::arg("ref_v").none(true), py::arg("out"), py::arg("lse"), py::arg("scale"),
          py::arg("num_frames") = 1, py::arg("radius") = 0, py::arg("num_threads") = 1, py::arg("isa") = py::none(),
          "Attention over segments. out is the address of a contiguous [B, L, N, D] in q's dtype, lse of a contiguous\n"
          "fp32 [B, N, L]. isa forces an instruction set; None takes the best.");
    m.def("attention_backward", &attention_backward, py::arg("grad"), py::arg("grad_lse"), py::arg("q"),
          py::arg("k").none(true), py::arg("v").none(true), py::arg("ref_k").none(true), py::arg("ref_v").none(true),
          py::arg("out"), py::arg("lse"), py::arg("grads"), py::arg("scale"), py::arg("strength") = 1.f,
          py::arg("num_frames") = 1, py::arg("radius") = 0, py::arg("num_threads") = 1, py::arg("isa") = py::none(),
          "Gradients of attention. out, lse and grad_lse (0: none) are addresses as attention() wrote them; grads\n"
          "are the addresses of contiguous [B, rows, N, D] for q, k, v, ref_k, ref_v in q's dtype, 0: not wanted.");
}

}  // namespace avatar_rt::bindings
