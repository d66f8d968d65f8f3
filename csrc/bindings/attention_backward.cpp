// The gradients of attention for Python.
#include "cpu/attention_backward.h"

#include <array>
#include <cstdlib>
#include <memory>
#include <new>

#include "attention.h"

namespace py = pybind11;

namespace avatar_rt::bindings {
namespace {

void attention_backward(const TensorArg& grad, uintptr_t grad_lse, const TensorArg& q, const OptionalTensor& k,
                        const OptionalTensor& v, const OptionalTensor& ref_k, const OptionalTensor& ref_v,
                        uintptr_t out, uintptr_t lse, const std::array<uintptr_t, 5>& grads, float scale,
                        float strength, int64_t num_frames, int64_t radius, int num_threads,
                        const std::optional<std::string>& isa) {
    cpu::AttentionBackwardArgs args;
    args.call = fresh_args(q, k, v);
    args.call.ref_k = view_of<cpu::View>("ref_k", ref_k, q, "B, R, N, D");
    args.call.ref_v = view_of<cpu::View>("ref_v", ref_v, q, "B, R, N, D");
    args.call.num_frames = num_frames;
    args.call.radius = radius;
    set_numbers(&args.call, out, lse, scale, strength, num_threads, isa);
    args.grad = view_of<cpu::View>("grad", grad, q, "B, L, N, D");
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

void bind_attention_backward(py::module_& m) {
    m.def("attention_backward", &attention_backward, py::arg("grad"), py::arg("grad_lse"), py::arg("q"),
          py::arg("k").none(true), py::arg("v").none(true), py::arg("ref_k").none(true), py::arg("ref_v").none(true),
          py::arg("out"), py::arg("lse"), py::arg("grads"), py::arg("scale"), py::arg("strength") = 1.f,
          py::arg("num_frames") = 1, py::arg("radius") = 0, py::arg("num_threads") = 1, py::arg("isa") = py::none(),
          "Gradients of attention. out, lse and grad_lse (0: none) are addresses as attention() wrote them; grads\n"
          "are the addresses of contiguous [B, rows, N, D] for q, k, v, ref_k, ref_v in q's dtype, 0: not wanted.");
}

}  // namespace avatar_rt::bindings
