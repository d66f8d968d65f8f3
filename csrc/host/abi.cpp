// The C interface over the CPU kernels.
#include <cmath>
#include <cstddef>
#include <string>

#include "avatar_rt.h"
#include "cpu/attention.h"

namespace {

using avatar_rt::cpu::View;

thread_local std::string last_error;

avatar_rt_status fail(avatar_rt_status status, const std::string& sentence) {
    last_error = sentence;
    return status;
}

View view_of(const avatar_rt_view& v) {
    return {v.data, v.rows, v.batch_stride, v.row_stride, v.head_stride};
}

// Size of the first header's struct, its padding included: the least that a caller may pass.
constexpr size_t kFirstSize = offsetof(avatar_rt_attention_args, strength);
static_assert(kFirstSize % alignof(avatar_rt_attention_args) == 0, "a new member may not lie in the old padding");

// Whether the caller's struct reaches past a member.
#define AVATAR_RT_HAS(args, member) \
    ((args)->struct_size >= offsetof(avatar_rt_attention_args, member) + sizeof((args)->member))

bool missing(const avatar_rt_view& v) {
    return v.rows > 0 && v.data == nullptr;
}

}  // namespace

extern "C" {

int32_t avatar_rt_abi_version(void) {
    return AVATAR_RT_ABI_VERSION;
}

const char* avatar_rt_last_error(void) {
    return last_error.c_str();
}

avatar_rt_status avatar_rt_attention(const avatar_rt_attention_args* a) {
    if (a == nullptr) return fail(AVATAR_RT_INPUT_ERROR, "args: expected a struct, got NULL");
    if (a->struct_size < kFirstSize)
        return fail(AVATAR_RT_INPUT_ERROR, "struct_size: expected " + std::to_string(kFirstSize) + " or more, got " +
                                               std::to_string(a->struct_size));
    if (a->dtype != AVATAR_RT_F32 && a->dtype != AVATAR_RT_BF16)
        return fail(AVATAR_RT_INPUT_ERROR, "dtype: expected F32 (0) or BF16 (1), got " + std::to_string(a->dtype));
    if (missing(a->q) || missing(a->k) || missing(a->v) || missing(a->ref_k) || missing(a->ref_v) || a->out == nullptr)
        return fail(AVATAR_RT_INPUT_ERROR, "data: expected an address for every tensor that has rows, got NULL");

    avatar_rt::cpu::AttentionArgs args;
    args.dtype = a->dtype == AVATAR_RT_F32 ? avatar_rt::cpu::DType::f32 : avatar_rt::cpu::DType::bf16;
    args.batch = a->batch;
    args.heads = a->heads;
    args.head_dim = a->head_dim;
    args.q = view_of(a->q);
    args.k = view_of(a->k);
    args.v = view_of(a->v);
    args.ref_k = view_of(a->ref_k);
    args.ref_v = view_of(a->ref_v);
    args.out = a->out;
    args.lse = a->lse;
    args.scale = a->scale != 0 ? a->scale : 1 / std::sqrt(static_cast<float>(a->head_dim));
    args.strength = AVATAR_RT_HAS(a, strength) ? static_cast<float>(a->strength) : 1.f;
    args.num_frames = a->num_frames;
    args.radius = a->radius;
    args.num_threads = a->num_threads;
    args.isa = avatar_rt::cpu::best_isa();
    const std::string faults = avatar_rt::cpu::attention_faults(args);
    if (!faults.empty()) return fail(AVATAR_RT_INPUT_ERROR, faults);
    avatar_rt::cpu::attention(args);
    last_error.clear();
    return AVATAR_RT_OK;
}

}  // extern "C"
