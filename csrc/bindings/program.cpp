// Programs: recorded kernel calls. avatar_rt/ops/program.py checks shapes; here, only what would read out of bounds of
// C.
#include <memory>

#include "attention.h"
#include "cpu/parallel.h"
#include "cpu/program.h"
#include "native.h"

namespace py = pybind11;

namespace avatar_rt::bindings {
namespace {

using Numbers = std::vector<int64_t>;

cpu::Grid grid_of(const Numbers& v) {
    if (v.size() != 5) input_error("grid: expected [width, height, pixel, line, picture]");
    return {v[0], v[1], v[2], v[3], v[4]};
}

cpu::Table table_of(const std::optional<Numbers>& v) {  // (address, row stride, address of the int32 index or 0)
    if (!v) return {};
    if (v->size() != 3) input_error("table: expected (address, stride, index)");
    return {reinterpret_cast<const float*>((*v)[0]), (*v)[1], reinterpret_cast<const int32_t*>((*v)[2])};
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void add_linear(cpu::Program& program, uintptr_t x, const Numbers& from, int64_t rows, int64_t channels,
                int64_t outputs, const Numbers& taps, uintptr_t weight, uintptr_t bias, const std::string& finish,
                uintptr_t y, bool y_f32, const Numbers& to, const std::optional<Numbers>& gate,
                const std::optional<Numbers>& plus) {
    cpu::LinearArgs a;
    if (taps.empty() || taps.size() > cpu::kMaxTaps) input_error("taps: expected 1 to 9");
    if (rows < 1 || channels < 2 || channels % 2 || outputs < 1)
        input_error("linear: expected rows and outputs of 1 or more and an even number of channels");
    a.x = pointer<const uint16_t>(x);
    a.from = grid_of(from);
    a.rows = rows;
    a.channels = channels;
    a.outputs = outputs;
    a.num_taps = static_cast<int>(taps.size());
    std::copy(taps.begin(), taps.end(), a.taps);
    a.weight = pointer<const uint16_t>(weight);
    a.bias = pointer<const float>(bias);
    a.finish = finish == "residual" ? cpu::Finish::residual : finish == "gelu" ? cpu::Finish::gelu : cpu::Finish::store;
    a.y = pointer<void>(y);
    a.y_f32 = y_f32;
    a.to = grid_of(to);
    a.gate = table_of(gate);
    a.plus = table_of(plus);
    program.add(a);
}

void add_norm(cpu::Program& program, const std::string& norm, uintptr_t x, bool x_f32, const Numbers& from,
              int64_t rows, int64_t channels, float eps, const std::optional<Numbers>& scale,
              const std::optional<Numbers>& shift, uintptr_t cos, uintptr_t sin, int64_t period, int64_t head_dim,
              bool silu, uintptr_t y, const Numbers& to) {
    cpu::NormArgs a;
    if (rows < 1 || channels < 16 || channels % 16 || head_dim % 16)
        input_error("norm: expected rows, and channels and head_dim in multiples of 16");
    a.norm = norm == "layer"    ? cpu::Norm::layer
             : norm == "rms"    ? cpu::Norm::rms
             : norm == "length" ? cpu::Norm::length
                                : cpu::Norm::none;
    a.x = pointer<const void>(x);
    a.x_f32 = x_f32;
    a.from = grid_of(from);
    a.rows = rows;
    a.channels = channels;
    a.eps = eps;
    a.scale = table_of(scale);
    a.shift = table_of(shift);
    a.cos = pointer<const float>(cos);
    a.sin = pointer<const float>(sin);
    a.period = period;
    a.head_dim = head_dim;
    a.silu = silu;
    a.y = pointer<uint16_t>(y);
    a.to = grid_of(to);
    program.add(a);
}

void record(cpu::Program& program, cpu::AttentionArgs args, uintptr_t out, float scale, float strength) {
    set_numbers(&args, out, 0, scale, strength, 1, std::nullopt);
    check(args);
    program.add(args);
}

}  // namespace

void bind_program(py::module_& m) {
    py::class_<cpu::Program, std::shared_ptr<cpu::Program>>(m, "Program", "A recorded sequence of kernel calls.")
        .def(py::init([] {
            if (!cpu::supported(cpu::Isa::avx512bf16))
                input_error("Program: expected a machine with avx512bf16, this one has " +
                            std::string(cpu::isa_name(cpu::best_isa())));
            return std::make_shared<cpu::Program>();
        }))
        .def("linear", &add_linear, py::arg("x"), py::arg("from_grid"), py::arg("rows"), py::arg("channels"),
             py::arg("outputs"), py::arg("taps"), py::arg("weight"), py::arg("bias"), py::arg("finish"), py::arg("y"),
             py::arg("y_f32"), py::arg("to_grid"), py::arg("gate") = py::none(), py::arg("plus") = py::none())
        .def("norm", &add_norm, py::arg("norm"), py::arg("x"), py::arg("x_f32"), py::arg("from_grid"), py::arg("rows"),
             py::arg("channels"), py::arg("eps"), py::arg("scale"), py::arg("shift"), py::arg("cos"), py::arg("sin"),
             py::arg("period"), py::arg("head_dim"), py::arg("silu"), py::arg("y"), py::arg("to_grid"))
        .def(
            "attention",
            [](cpu::Program& program, const TensorArg& q, const OptionalTensor& k, const OptionalTensor& v,
               const OptionalTensor& ref_k, const OptionalTensor& ref_v, uintptr_t out, float scale,
               float strength) { record(program, plain_args(q, k, v, ref_k, ref_v), out, scale, strength); },
            py::arg("q"), py::arg("k").none(true), py::arg("v").none(true), py::arg("ref_k").none(true),
            py::arg("ref_v").none(true), py::arg("out"), py::arg("scale"), py::arg("strength"))
        .def(
            "packed_attention",
            [](cpu::Program& program, const TensorArg& q, const OptionalTensor& k, const OptionalTensor& v,
               const TensorArg& packed_k, const TensorArg& packed_v, const TensorArg& k_scale, const TensorArg& v_scale,
               int64_t rows, uintptr_t out, float scale, float strength) {
                record(program, packed_args(q, k, v, packed_k, packed_v, k_scale, v_scale, rows), out, scale, strength);
            },
            py::arg("q"), py::arg("k").none(true), py::arg("v").none(true), py::arg("packed_k"), py::arg("packed_v"),
            py::arg("k_scale"), py::arg("v_scale"), py::arg("rows"), py::arg("out"), py::arg("scale"),
            py::arg("strength"))
        .def("run", &cpu::Program::run, py::arg("num_threads"), py::call_guard<py::gil_scoped_release>())
        .def("__len__", &cpu::Program::size);
    m.def(
        "set_schedule",
        [](int64_t linear_rows, int64_t norm_rows, int64_t spins) {
            if (linear_rows < 24 || linear_rows % 24 || norm_rows < 1 || spins < 0)
                input_error(
                    "schedule: expected linear_rows in multiples of 24, norm_rows of 1 or more, spins of 0 or more");
            cpu::set_schedule({linear_rows, norm_rows, spins});
        },
        py::arg("linear_rows"), py::arg("norm_rows"), py::arg("spins"),
        "How recorded kernels are cut into tasks and how long idle threads look for one; no result depends on it.");
    m.def("packed_linear_size", &cpu::packed_linear_size, py::arg("num_taps"), py::arg("channels"), py::arg("outputs"));
    m.def(
        "pack_linear",
        [](uintptr_t weight, int64_t num_taps, int64_t channels, int64_t outputs, uintptr_t packed) {
            cpu::pack_linear(pointer<const uint16_t>(weight), num_taps, channels, outputs, pointer<uint16_t>(packed));
        },
        py::arg("weight"), py::arg("num_taps"), py::arg("channels"), py::arg("outputs"), py::arg("packed"));
}

}  // namespace avatar_rt::bindings
