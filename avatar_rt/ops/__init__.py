"""Op contracts: what each op means, its shapes and errors, its definition, cost and gradients, and who may run it."""

from avatar_rt.ops import _packed_attention as _packed_attention
from avatar_rt.ops._dispatch import cost, explain, force
from avatar_rt.ops.attention import local_temporal_attention, sparse_reference_attention
from avatar_rt.ops.conv import causal_conv3d
from avatar_rt.ops.flow import flow_step
from avatar_rt.ops.norm import gate_residual, layernorm_modulate, qk_norm_rope
from avatar_rt.ops.packed import PackedReference, pack_reference

__all__ = [
    "PackedReference",
    "causal_conv3d",
    "cost",
    "explain",
    "flow_step",
    "force",
    "gate_residual",
    "layernorm_modulate",
    "local_temporal_attention",
    "pack_reference",
    "qk_norm_rope",
    "sparse_reference_attention",
]
