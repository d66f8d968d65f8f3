// What the bindings of both attention passes share.
#pragma once

#include "cpu/attention.h"

#include "views.h"

namespace avatar_rt::bindings {

using OptionalTensor = std::optional<TensorArg>;

// Arguments with q, k and v in place.
cpu::AttentionArgs fresh_args(const TensorArg& q, const OptionalTensor& k, const OptionalTensor& v);

// The same with the reference's rows, plain or packed.
cpu::AttentionArgs plain_args(const TensorArg& q, const OptionalTensor& k, const OptionalTensor& v,
                              const OptionalTensor& ref_k, const OptionalTensor& ref_v);
cpu::AttentionArgs packed_args(const TensorArg& q, const OptionalTensor& k, const OptionalTensor& v,
                               const TensorArg& packed_k, const TensorArg& packed_v, const TensorArg& k_scale,
                               const TensorArg& v_scale, int64_t rows);

// Raises InputError when the kernel could not run them.
void check(const cpu::AttentionArgs& args);

void set_numbers(cpu::AttentionArgs* args, uintptr_t out, uintptr_t lse, float scale, float strength, int num_threads,
                 const std::optional<std::string>& isa);

}  // namespace avatar_rt::bindings
