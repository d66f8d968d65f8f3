"""The mouth's reader of stage 2: what it reads, from where, and what it teaches."""

from __future__ import annotations

from typing import Any

import torch
from small_stages import CFG, build

from avatar_rt.models.motion import MOTION_NAMES
from training.methods.a2v import A2VMethod, A2VSettings, mouth_shares
from training.methods.flow import Bucket

ONE = (Bucket(3, people=2, windows=2),)


def _step(**settings: Any) -> tuple[A2VMethod, dict[str, torch.Tensor]]:
    """A method, and its losses of one step."""
    method = build(A2VMethod, A2VSettings(buckets=ONE, drop_all=0.0, **settings))
    return method, method.step(0, torch.Generator().manual_seed(3))


def _names(reader: Any) -> list[str]:
    """What a reader reads of each of a latent's frames."""
    return [(MOTION_NAMES * 4)[i] for i in reader.channels.tolist()]


def test_the_mouth_is_read_off_the_rows_of_its_place() -> None:
    """In training alone, of the free latents alone, and from where the mask has the mouth."""
    method, values = _step(read_weight=0.5, next_rate=1.0, free_rate=0.0)
    assert float(values["read"].detach()) > 0.5 and method.rows is None
    plain = _step(next_rate=1.0, free_rate=0.0)[1]
    torch.testing.assert_close(values["loss"], plain["loss"] + 0.5 * values["read"])
    reader, (b, _) = method.module["mouth_reader"], method.batch(0, torch.Generator().manual_seed(3))
    assert not any("tongue" not in n and not n.startswith(("jaw", "mouth")) for n in _names(reader))
    share = mouth_shares(b.weight[:, 1], (2, 2))
    torch.testing.assert_close(share.sum(1), torch.ones(len(share)))
    rows = torch.randn(*b.motion.shape[:2], share.shape[1], CFG.dit.dim)
    with torch.no_grad():
        told, elsewhere = reader(rows, share), rows.clone()
        elsewhere[:, :, share[0] < 1e-3] += 9
        torch.testing.assert_close(reader(elsewhere, share), told, atol=1e-3, rtol=0)
        whole = b.motion.clone()
        whole[b.given] += 100  # what is carried over is not asked for
        assert torch.equal(reader.loss(rows, share, whole, ~b.given), reader.loss(rows, share, b.motion, ~b.given))
    with torch.no_grad():  # validation and sampling pay nothing for it
        method.loss(b, torch.full((len(b.x),), 0.5), torch.Generator(), step=None)
    assert method.rows is None


def test_reading_the_mouth_reaches_the_speech_path() -> None:
    """From the first step on: the zeroed projection of the speech's attention gets a gradient from it alone."""
    method, values = _step(drop_audio=0.0, read_weight=1.0, next_rate=0.0)
    values["read"].backward()
    first = method.module["dit"].blocks[0].audio_attn.o.weight.grad
    assert float(first.abs().max()) > 0
    assert method.module["dit"].head.head.weight.grad is None
