// What the binding files share: tensors come as (address, dtype, shape, strides), so no framework is linked.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

namespace avatar_rt::bindings {

struct TensorArg {
    uintptr_t address = 0;
    std::string dtype;
    std::vector<int64_t> shape, strides;  // strides in elements
};

// Raises avatar_rt.errors.InputError with this sentence.
[[noreturn]] void input_error(const std::string& sentence);

void bind_attention(pybind11::module_& m);
void bind_attention_backward(pybind11::module_& m);
void bind_flow(pybind11::module_& m);
void bind_program(pybind11::module_& m);
void bind_cuda_attention(pybind11::module_& m);

}  // namespace avatar_rt::bindings
