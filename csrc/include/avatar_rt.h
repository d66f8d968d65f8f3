/* The C interface of avatar_rt. Plain C99: no C++ types, no exceptions, no framework.
 *
 * Every function returns a status; after one other than AVATAR_RT_OK, avatar_rt_last_error() says in one sentence
 * what was got and what was expected. Structs begin with their own size, so that a caller built against an older
 * header keeps working. All functions may be called from any thread.
 */
#ifndef AVATAR_RT_H_
#define AVATAR_RT_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define AVATAR_RT_API __attribute__((visibility("default")))
#else
#define AVATAR_RT_API
#endif

#define AVATAR_RT_ABI_VERSION 1

typedef enum avatar_rt_status {
    AVATAR_RT_OK = 0,
    AVATAR_RT_INPUT_ERROR = 1,      /* an argument is wrong */
    AVATAR_RT_UNSUPPORTED_ERROR = 2 /* the call is right but this build or machine cannot run it */
} avatar_rt_status;

typedef enum avatar_rt_dtype { AVATAR_RT_F32 = 0, AVATAR_RT_BF16 = 1 } avatar_rt_dtype;

/* A tensor [batch, rows, heads, head_dim]: head_dim contiguous, other strides free and in elements. */
typedef struct avatar_rt_view {
    const void* data;
    int64_t rows, batch_stride, row_stride, head_stride;
} avatar_rt_view;

/* out = attention of q over the rows of [k ; ref_k] under one softmax. */
typedef struct avatar_rt_attention_args {
    size_t struct_size; /* sizeof(avatar_rt_attention_args) */
    avatar_rt_dtype dtype;
    int64_t batch, heads, head_dim; /* head_dim at most 256 */
    avatar_rt_view q;
    avatar_rt_view k, v;         /* fresh rows; rows 0: none */
    avatar_rt_view ref_k, ref_v; /* reference rows; rows 0: none */
    void* out;                   /* [batch, q.rows, heads, head_dim], contiguous */
    float* lse;                  /* [batch, heads, q.rows], natural log; NULL: not wanted */
    float scale;                 /* 0: 1 / sqrt(head_dim) */
    int64_t num_frames, radius;  /* above one frame: a query sees fresh rows of frames within radius of its own */
    int32_t num_threads;         /* the result does not depend on it */
    /* Since the second header; 1 for callers whose struct_size ends before it. */
    double strength; /* factor on each reference row's softmax weight; 0: as if there were no reference */
} avatar_rt_attention_args;

AVATAR_RT_API int32_t avatar_rt_abi_version(void);

/* The sentence of this thread's last failure; empty when there was none. Valid until the thread's next call. */
AVATAR_RT_API const char* avatar_rt_last_error(void);

AVATAR_RT_API avatar_rt_status avatar_rt_attention(const avatar_rt_attention_args* args);

#ifdef __cplusplus
}
#endif
#endif
