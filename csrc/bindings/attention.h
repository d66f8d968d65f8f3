// What the bindings of both attention passes share.
#pragma once

#include "cpu/attention.h"

#include "views.h"

namespace avatar_rt::bindings {

using OptionalTensor = std::optional<TensorArg>;

// Arguments with q, k and v in place.
cpu::AttentionArgs fresh_args(const TensorArg& q, const OptionalTensor& k, const OptionalTensor& v);

void set_numbers(cpu::AttentionArgs* args, uintptr_t out, uintptr_t lse, float scale, float strength, int num_threads,
                 const std::optional<std::string>& isa);

}  // namespace avatar_rt::bindings
