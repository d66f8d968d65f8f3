// avatar_rt._native: the kernels for Python, over raw addresses. The ops in avatar_rt/ops are its only callers.
#include "native.h"

#include "avatar_rt.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace avatar_rt::bindings {

void input_error(const std::string& sentence) {
    PyErr_SetString(py::module_::import("avatar_rt.errors").attr("InputError").ptr(), sentence.c_str());
    throw py::error_already_set();
}

}  // namespace avatar_rt::bindings

PYBIND11_MODULE(_native, m) {
    using namespace avatar_rt;
    using bindings::TensorArg;
    m.doc() = "Native kernels of avatar_rt over raw addresses.";
    m.attr("abi_version") = AVATAR_RT_ABI_VERSION;
#ifdef AVATAR_RT_CUDA
    m.attr("cuda") = true;
#else
    m.attr("cuda") = false;
#endif
    py::class_<TensorArg>(m, "Tensor", "A tensor by address, dtype name, shape and strides (in elements).")
        .def(py::init(
                 [](uintptr_t address, std::string dtype, std::vector<int64_t> shape, std::vector<int64_t> strides) {
                     if (shape.size() != strides.size()) bindings::input_error("strides: expected one per dimension");
                     return TensorArg{address, std::move(dtype), std::move(shape), std::move(strides)};
                 }),
             py::arg("address"), py::arg("dtype"), py::arg("shape"), py::arg("strides"));
    m.def(
        "isas",
        [] {
            std::vector<std::string> names;
            for (cpu::Isa isa : {cpu::Isa::scalar, cpu::Isa::avx2, cpu::Isa::avx512, cpu::Isa::avx512bf16})
                if (cpu::supported(isa)) names.emplace_back(cpu::isa_name(isa));
            return names;
        },
        "Instruction sets that this build contains and this machine runs, worst first.");
    bindings::bind_attention(m);
    bindings::bind_attention_backward(m);
    bindings::bind_flow(m);
    bindings::bind_program(m);
    bindings::bind_cuda_attention(m);
}
