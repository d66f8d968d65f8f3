// Tensors from Python as the strided views of an op's operands, checked with the sentences of avatar_rt/ops.
#pragma once

#include <optional>

#include "native.h"

namespace avatar_rt::bindings {

inline std::string list(const std::vector<int64_t>& values) {
    std::string text = "[";
    for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
    return text + "]";
}

inline void expect(const std::string& name, const char* letter, int64_t wanted, const TensorArg& x, int axis,
                   const char* layout) {
    if (x.shape[axis] != wanted)
        input_error(name + ": expected " + letter + "=" + std::to_string(wanted) + ", got " +
                    std::to_string(x.shape[axis]) + " (shape " + list(x.shape) + " for [" + layout + "])");
}

// `View` of cpu/ or of cuda/: [batch, rows, heads, head_dim] with q's batch, heads, head_dim and dtype.
template <class View>
View view_of(const std::string& name, const std::optional<TensorArg>& given, const TensorArg& q, const char* layout) {
    if (!given) return {};
    const TensorArg& x = *given;
    if (x.shape.size() != 4) input_error(name + ": expected 4 dimensions [" + layout + "], got shape " + list(x.shape));
    expect(name, "B", q.shape[0], x, 0, layout);
    expect(name, "N", q.shape[2], x, 2, layout);
    expect(name, "D", q.shape[3], x, 3, layout);
    if (x.dtype != q.dtype) input_error(name + ": expected dtype " + q.dtype + " like q, got " + x.dtype);
    if (x.shape[3] > 1 && x.strides[3] != 1)
        input_error(name + ": expected a contiguous last dimension, got strides " + list(x.strides));
    return {reinterpret_cast<const void*>(x.address), x.shape[1], x.strides[0], x.strides[1], x.strides[2]};
}

}  // namespace avatar_rt::bindings
