"""Text conditioning of the shipped preset: words hashed into a learned table."""

from __future__ import annotations

import re
import zlib

import torch
import torch.nn as nn
from torch import Tensor

from avatar_rt.config import TextConfig
from avatar_rt.errors import InputError, UnsupportedError

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")


class TextEncoder(nn.Module):
    """Caption -> context rows. Each lower-cased word has a row by its hash; its position is added.

    Rows beyond the caption are zeros, so the empty caption is all zeros, as Wan pads its text. It is small enough to
    be trained together with the transformer.
    """

    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        if cfg.buckets <= 0:
            raise UnsupportedError(
                f"this preset ships no text encoder (text.buckets is {cfg.buckets}): "
                f"pass UMT5 embeddings [S <= {cfg.length}, {cfg.dim}] in place of a caption"
            )
        self.cfg = cfg
        self.words = nn.Embedding(cfg.buckets + 1, cfg.dim)
        self.position = nn.Parameter(torch.randn(cfg.length, cfg.dim) * 0.1)

    def tokenize(self, caption: str) -> Tensor:
        """Ids int64 [length] of the caption's first words: 1 + hash of the word, 0 where there is none."""
        words = _WORD.findall(caption.lower())[: self.cfg.length]
        ids = torch.zeros(self.cfg.length, dtype=torch.int64)
        # CRC-32 is the same on every machine and in every run; Python's own hash is not.
        for i, word in enumerate(words):
            ids[i] = 1 + zlib.crc32(word.encode()) % self.cfg.buckets
        return ids

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [B, length] -> [B, length, dim], dtype of the weights; zeros where the id is 0."""
        if ids.ndim != 2 or ids.shape[1] != self.cfg.length:
            raise InputError(f"text ids: expected [B, {self.cfg.length}], got {list(ids.shape)}")
        rows = self.words(ids) + self.position
        return rows * (ids != 0).unsqueeze(-1)

    def encode(self, captions: list[str]) -> Tensor:
        """B captions -> [B, length, dim] on the device of the weights."""
        ids = torch.stack([self.tokenize(c) for c in captions])
        return self(ids.to(self.words.weight.device))
