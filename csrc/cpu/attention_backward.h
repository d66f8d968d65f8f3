// Gradients of attention over key/value segments (attention.h), from the saved output and LSE:
//
//   delta = rowsum(grad * out) - grad_lse          p  = strength^[s is a reference row] * exp(scale * q.k - lse)
//   dv   += p^T grad     dp = grad v^T             ds = scale * p * (dp - delta)     dq += ds k     dk += ds^T q
//
// Bound by FLOPs: 10 * head_dim per attended pair. Each (key block, query block) pair is visited once; a chunk of key
// blocks owns its dk and dv and a partial dq, and the partials are summed in the chunks' order. Blocks and chunks
// follow from the shape alone, so a result does not depend on threads or on batch neighbours. Query and key blocks
// never cross a frame, so what a key does not see is never touched.
#pragma once

#include <cstddef>

#include "cpu/attention.h"

namespace avatar_rt::cpu {

struct AttentionBackwardArgs {
    AttentionArgs call;               // as given to attention(), rows not packed, with its out and lse
    View grad;                        // of out: [batch, queries, heads, head_dim], strides free
    const float* grad_lse = nullptr;  // contiguous [batch, heads, queries]; may be null
    // Contiguous [batch, rows, heads, head_dim] in the call's dtype; null: not wanted.
    void *dq = nullptr, *dk = nullptr, *dv = nullptr, *dref_k = nullptr, *dref_v = nullptr;
};

// Empty, or one sentence that says what was got and what was expected.
std::string attention_backward_faults(const AttentionBackwardArgs& args);

// Bytes of workspace that attention_backward() needs; args without faults.
size_t attention_backward_workspace(const AttentionBackwardArgs& args);

// Needs attention_backward_faults(args) to be empty and a 64-byte aligned workspace.
void attention_backward(const AttentionBackwardArgs& args, void* workspace);

}  // namespace avatar_rt::cpu
