"""Our parameter names and those of published checkpoints, in both directions."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor, nn

from avatar_rt.errors import InputError
from avatar_rt.models.vae import VideoVAE, vae_names

SCHEMES = ("diffusers", "wan", "tavr")


class Name(NamedTuple):
    """A tensor's name elsewhere. None: as ours. ``row``: a vector of ours is stored there as [1, C]."""

    key: str | None = None
    row: bool = False

    def of(self, ours: str) -> str:
        return ours if self.key is None else self.key

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        return (1, *tensor.shape) if self.row else tuple(tensor.shape)


# Ours -> theirs, the first pattern that matches the start of a name; what follows the match stays as it is.
_DIFFUSERS = (
    (r"patch_embedding\.", "patch_embedding."),
    (r"text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"time_projection\.1\.", "condition_embedder.time_proj."),
    (r"(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"(blocks\.\d+)\.self_attn\.([qkv])\.", r"\1.attn1.to_\2."),
    (r"(blocks\.\d+)\.self_attn\.o\.", r"\1.attn1.to_out.0."),
    (r"(blocks\.\d+)\.self_attn\.norm_", r"\1.attn1.norm_"),
    (r"(blocks\.\d+)\.cross_attn\.([qkv])\.", r"\1.attn2.to_\2."),
    (r"(blocks\.\d+)\.cross_attn\.o\.", r"\1.attn2.to_out.0."),
    (r"(blocks\.\d+)\.cross_attn\.norm_", r"\1.attn2.norm_"),
    (r"(blocks\.\d+)\.norm3\.", r"\1.norm2."),  # the norm before the text attention is second there, third here
    (r"(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
    (r"head\.head\.", "proj_out."),
    (r"head\.modulation$", "scale_shift_table"),
)
_WAN = (  # ours keep the original Wan 2.1 names where Wan has the part
    (r"((patch|text|time)_embedding|time_projection|head)\.", r"\1."),
    (r"(blocks\.\d+\.(self_attn|cross_attn|norm3|ffn)\.)", r"\1"),
    (r"(blocks\.\d+\.modulation)$", r"\1"),
)
_TAVR = (
    *_WAN,
    (r"(blocks\.\d+\.audio_attn)\.([qkv])_adapter\.", r"\1.videoref_aud_\2_adapter."),
    (r"(blocks\.\d+\.(audio_attn|norm4)\.)", r"\1"),
    (r"audio_embedding\.", "aud_embedding."),
    (r"audio_position$", "audio_pos_embedding.weight"),
    (r"reference_audio_embedding\.", "videoref_aud_embedding."),
    (r"reference_audio_position$", "videoref_audio_pos_embedding.weight"),
)
_TAVR_ROWS = {
    "anchor_embedding": "ref_pos_embedding.weight",
    "reference_embedding": "cross_videoref_pos_embedding.weight",
    "reference_time": "time_embedding_videoref",
    "null_audio": "null_audio_feature.weight",
    "null_reference_audio": "null_videoref_audio_feature.weight",
}
_RULES = {"diffusers": (_DIFFUSERS, {}), "wan": (_WAN, {}), "tavr": (_TAVR, _TAVR_ROWS)}


def foreign_names(module: nn.Module, scheme: str | None) -> dict[str, Name]:
    """Our name -> name under ``scheme``, for every tensor of the module's state dict.

    Args:
        module: VideoRefDiT under any scheme, VideoVAE under ``diffusers``; anything under None (our own names).
        scheme: None, ``diffusers`` (its Wan classes), ``wan`` (the original release), ``tavr``.

    Raises: InputError on an unknown scheme, or on a tensor that has no name under it.
    """
    if scheme is None:
        return {key: Name() for key in module.state_dict()}
    if scheme not in SCHEMES:
        raise InputError(f"names: expected None or one of {', '.join(SCHEMES)}, got {scheme!r}")
    if isinstance(module, VideoVAE) and scheme == "diffusers":
        return {ours: Name(theirs) for ours, theirs in vae_names(module.cfg).items()}
    rules, rows = _RULES[scheme]
    names = {key: Name(rows[key], row=True) if key in rows else _rename(key, rules) for key in module.state_dict()}
    unnamed = [key for key, name in names.items() if name is None]
    if unnamed:
        what = f"{len(unnamed)} tensors of {type(module).__name__}, the first is {unnamed[0]}"
        raise InputError(f"names: {scheme} has no name for {what}")
    return {key: name for key, name in names.items() if name is not None}


def _rename(key: str, rules: tuple[tuple[str, str], ...]) -> Name | None:
    for pattern, theirs in rules:
        match = re.match(pattern, key)
        if match:
            return Name(match.expand(theirs) + key[match.end() :])
    return None
