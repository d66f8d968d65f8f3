// The attention kernel for Python: the checks and sentences of avatar_rt/ops/attention.py, then the call.
#include "attention.h"

#include <algorithm>

#include "cpu/peak.h"

namespace py = pybind11;

namespace avatar_rt::bindings {
namespace {

cpu::DType dtype_of(const TensorArg& q) {
    if (q.dtype == "float32") return cpu::DType::f32;
    if (q.dtype == "bfloat16") return cpu::DType::bf16;
    input_error("q: expected dtype float32 or bfloat16, got " + q.dtype);
}

}  // namespace

cpu::AttentionArgs fresh_args(const TensorArg& q, const std::optional<TensorArg>& k,
                              const std::optional<TensorArg>& v) {
    cpu::AttentionArgs args;
    args.q = view_of<cpu::View>("q", q, q, "B, L, N, D");
    args.dtype = dtype_of(q);
    args.batch = q.shape[0];
    args.heads = q.shape[2];
    args.head_dim = q.shape[3];
    args.k = view_of<cpu::View>("k", k, q, "B, S, N, D");
    args.v = view_of<cpu::View>("v", v, q, "B, S, N, D");
    return args;
}

void set_numbers(cpu::AttentionArgs* args, uintptr_t out, uintptr_t lse, float scale, float strength, int num_threads,
                 const std::optional<std::string>& isa) {
    args->out = reinterpret_cast<void*>(out);
    args->lse = reinterpret_cast<float*>(lse);
    args->scale = scale;
    args->strength = strength;
    args->num_threads = num_threads;
    args->isa = cpu::best_isa();
    if (isa && !cpu::parse_isa(isa->c_str(), &args->isa))
        input_error("isa: expected scalar, avx2, avx512 or avx512bf16, got '" + *isa + "'");
}

namespace {

// A packed tensor [B, N, ...] of contiguous heads, as the view of one that has `rows` rows of `row_size` elements.
cpu::View packed_view(const std::string& name, const TensorArg& x, const std::string& dtype,
                      const std::vector<int64_t>& shape, int64_t rows, int64_t row_size) {
    if (x.shape != shape) input_error(name + ": expected shape " + list(shape) + ", got " + list(x.shape));
    if (x.dtype != dtype) input_error(name + ": expected dtype " + dtype + ", got " + x.dtype);
    int64_t step = 1;
    for (size_t i = shape.size(); i-- > 0; step *= shape[i])
        if (shape[i] > 1 && rows > 0 && x.strides[i] != step)
            input_error(name + ": expected a contiguous tensor, got strides " + list(x.strides));
    const int64_t head = step / std::max<int64_t>(1, shape[0] * shape[1]);
    return {reinterpret_cast<const void*>(x.address), rows, shape[1] * head, row_size, head};
}

}  // namespace

cpu::AttentionArgs plain_args(const TensorArg& q, const OptionalTensor& k, const OptionalTensor& v,
                              const OptionalTensor& ref_k, const OptionalTensor& ref_v) {
    cpu::AttentionArgs args = fresh_args(q, k, v);
    args.ref_k = view_of<cpu::View>("ref_k", ref_k, q, "B, R, N, D");
    args.ref_v = view_of<cpu::View>("ref_v", ref_v, q, "B, R, N, D");
    return args;
}

cpu::AttentionArgs packed_args(const TensorArg& q, const OptionalTensor& k, const OptionalTensor& v,
                               const TensorArg& packed_k, const TensorArg& packed_v, const TensorArg& k_scale,
                               const TensorArg& v_scale, int64_t rows) {
    cpu::AttentionArgs args = fresh_args(q, k, v);
    const int64_t b = q.shape[0], n = q.shape[2], d = q.shape[3];
    const std::vector<int64_t> as_rows{b, n, rows, d}, as_pairs{b, n, (rows + 1) / 2, d, 2}, factors{b, n, rows};
    const bool int8 = packed_k.dtype == "int8", pairs = packed_v.shape.size() == 5;
    const std::string dtype = int8 ? "int8" : q.dtype;
    args.ref_layout = int8 ? cpu::KeyLayout::int8 : pairs ? cpu::KeyLayout::pairs : cpu::KeyLayout::rows;
    args.ref_k = packed_view("packed.k", packed_k, dtype, as_rows, rows, d);
    args.ref_v = packed_view("packed.v", packed_v, dtype, pairs ? as_pairs : as_rows, rows, pairs ? 2 * d : d);
    if (int8) {
        args.ref_k_scale =
            static_cast<const float*>(packed_view("packed.k_scale", k_scale, "float32", factors, rows, 1).data);
        args.ref_v_scale =
            static_cast<const float*>(packed_view("packed.v_scale", v_scale, "float32", factors, rows, 1).data);
    }
    return args;
}

void check(const cpu::AttentionArgs& args) {
    const std::string faults = cpu::attention_faults(args);
    if (!faults.empty()) input_error(faults);
}

namespace {

// The call itself, once its tensors are in place.
void call(cpu::AttentionArgs& args, uintptr_t out, uintptr_t lse, float scale, float strength, int num_threads,
          const std::optional<std::string>& isa) {
    set_numbers(&args, out, lse, scale, strength, num_threads, isa);
    check(args);
    py::gil_scoped_release release;
    cpu::attention(args);
}

void attention(const TensorArg& q, const std::optional<TensorArg>& k, const std::optional<TensorArg>& v,
               const std::optional<TensorArg>& ref_k, const std::optional<TensorArg>& ref_v, uintptr_t out,
               uintptr_t lse, float scale, int64_t num_frames, int64_t radius, int num_threads,
               const std::optional<std::string>& isa, float strength) {
    cpu::AttentionArgs args = plain_args(q, k, v, ref_k, ref_v);
    args.num_frames = num_frames;
    args.radius = radius;
    call(args, out, lse, scale, strength, num_threads, isa);
}

void packed_attention(const TensorArg& q, const std::optional<TensorArg>& k, const std::optional<TensorArg>& v,
                      const TensorArg& packed_k, const TensorArg& packed_v, const TensorArg& k_scale,
                      const TensorArg& v_scale, int64_t rows, uintptr_t out, uintptr_t lse, float scale,
                      int num_threads, const std::optional<std::string>& isa, float strength) {
    cpu::AttentionArgs args = packed_args(q, k, v, packed_k, packed_v, k_scale, v_scale, rows);
    call(args, out, lse, scale, strength, num_threads, isa);
}

}  // namespace

void bind_attention(py::module_& m) {
    m.def("attention", &attention, py::arg("q"), py::arg("k").none(true), py::arg("v").none(true),
          py::arg("ref_k").none(true), py::arg("ref_v").none(true), py::arg("out"), py::arg("lse"), py::arg("scale"),
          py::arg("num_frames") = 1, py::arg("radius") = 0, py::arg("num_threads") = 1, py::arg("isa") = py::none(),
          py::arg("strength") = 1.f,
          "Attention over segments. out is the address of a contiguous [B, L, N, D] in q's dtype, lse of a contiguous\n"
          "fp32 [B, N, L]. isa forces an instruction set; None takes the best.");
    m.def("packed_attention", &packed_attention, py::arg("q"), py::arg("k").none(true), py::arg("v").none(true),
          py::arg("packed_k"), py::arg("packed_v"), py::arg("k_scale"), py::arg("v_scale"), py::arg("rows"),
          py::arg("out"), py::arg("lse"), py::arg("scale"), py::arg("num_threads") = 1, py::arg("isa") = py::none(),
          py::arg("strength") = 1.f,
          "Attention over fresh rows and a packed reference: [B, N, R, D] rows in q's dtype or int8, or values as\n"
          "[B, N, (R + 1) / 2, D, 2] pairs.");
    m.def(
        "fma_peak",
        [](const std::string& dtype, double seconds) {
            if (dtype != "float32" && dtype != "bfloat16")
                input_error("dtype: expected float32 or bfloat16, got " + dtype);
            py::gil_scoped_release release;
            return cpu::fma_peak(dtype == "float32" ? cpu::DType::f32 : cpu::DType::bf16, seconds);
        },
        py::arg("dtype"), py::arg("seconds"),
        "GFLOP/s of multiply-adds on registers, per second of one thread's time.");
}

}  // namespace avatar_rt::bindings
