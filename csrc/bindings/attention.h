// What the bindings of both attention passes share.
#pragma once

#include "cpu/attention.h"

#include <optional>

#include "native.h"

namespace avatar_rt::bindings {

using OptionalTensor = std::optional<TensorArg>;

// A [B, rows, N, D] that agrees with q in all but its rows; raises InputError.
cpu::View view_of(const std::string& name, const TensorArg& x, const TensorArg& q, const char* layout);
cpu::View optional_view(const std::string& name, const OptionalTensor& x, const TensorArg& q, const char* layout);

// Arguments with q, k and v in place.
cpu::AttentionArgs fresh_args(const TensorArg& q, const OptionalTensor& k, const OptionalTensor& v);

void set_numbers(cpu::AttentionArgs* args, uintptr_t out, uintptr_t lse, float scale, float strength, int num_threads,
                 const std::optional<std::string>& isa);

}  // namespace avatar_rt::bindings
