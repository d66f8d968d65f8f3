"""What sequence parallelism sends, on paper: the formulas that the scaling model uses and a test holds to the byte."""

from __future__ import annotations

from avatar_rt.config import DiTConfig
from avatar_rt.runtime.parallel import Mesh, split_rows


def pass_bytes(
    cfg: DiTConfig, mesh: Mesh, *, frames: int, patches: int, anchor: int, itemsize: int, batch: int = 1
) -> dict[str, int]:
    """Bytes that one rank sends to others in one pass, by kind of operation. The reference does not appear.

    Args:
        frames, patches: Latent frames and patches of each; a motion token is added where the model has motion.
        anchor: Rows of the anchor.
        itemsize: Bytes of a number in the transformer's dtype; velocities are gathered in fp32.
    """
    size = patches + bool(cfg.motion_dim)
    counts = split_rows(frames * size + anchor, mesh.world)
    sent = dict.fromkeys(("all_to_all", "exchange", "all_gather"), 0)
    if mesh.ulysses > 1:
        sent["all_to_all"] = cfg.num_layers * batch * _all_to_all(counts, mesh) * cfg.dim * itemsize // mesh.ulysses
    if mesh.ring > 1:
        sent["exchange"] = cfg.num_layers * batch * _ring(counts, mesh) * cfg.dim * itemsize // mesh.ulysses
    for rows, width in _gathered(cfg, counts, frames, patches):
        sent["all_gather"] += (mesh.world - 1) * max(rows) * width * 4 * batch
    return {kind: n for kind, n in sent.items() if n}


def reference_bytes(cfg: DiTConfig, mesh: Mesh, *, rows: int, itemsize: int) -> dict[str, int]:
    """Bytes that one rank sends to others while a reference of ``rows`` is encoded: once, never again."""
    counts = split_rows(rows, mesh.world)
    sent = {}
    if mesh.ulysses > 1:
        back = cfg.num_layers - 1  # nobody sees what the last block would make of the rows
        there, home = _to_heads(counts, mesh), _to_rows(counts, mesh)
        sent["all_to_all"] = (3 * cfg.num_layers * there + back * home) * cfg.dim * itemsize // mesh.ulysses
    if mesh.ring > 1:
        gathered = 2 + (cfg.reference_pattern != "full")
        longest = max(_parts(counts, mesh))
        sent["all_gather"] = gathered * cfg.num_layers * (mesh.ring - 1) * longest * cfg.dim * itemsize // mesh.ulysses
    return sent


def _parts(counts: list[int], mesh: Mesh) -> list[int]:
    return [sum(counts[r] for r in ranks) for ranks in mesh.ulysses_groups]


def _to_heads(counts: list[int], mesh: Mesh) -> int:
    """Rows, each a rank's share of the heads wide, that one tensor's way to the heads sends."""
    return counts[mesh.rank] * (mesh.ulysses - 1)


def _to_rows(counts: list[int], mesh: Mesh) -> int:
    return _parts(counts, mesh)[mesh.ring_rank] - counts[mesh.rank]


def _all_to_all(counts: list[int], mesh: Mesh) -> int:
    return 3 * _to_heads(counts, mesh) + _to_rows(counts, mesh)


def _ring(counts: list[int], mesh: Mesh) -> int:
    """Keys and values of every part but the one that a rank would get back."""
    parts = _parts(counts, mesh)
    return 2 * sum(parts[(mesh.ring_rank - turn) % mesh.ring] for turn in range(mesh.ring - 1))


def _gathered(cfg: DiTConfig, counts: list[int], frames: int, patches: int) -> list[tuple[list[int], int]]:
    """(rows of every rank, width) of the velocities."""
    size = patches + bool(cfg.motion_dim)
    ends = [min(sum(counts[: i + 1]), frames * size) for i in range(len(counts))]
    before = [end // size * patches + min(end % size, patches) for end in ends]
    own = [b - a for a, b in zip([0, *before], before, strict=False)]
    found = [(own, cfg.latent_channels * cfg.patch[1] * cfg.patch[2])]
    if cfg.motion_dim:
        tokens = [end // size for end in ends]
        found.append(([b - a for a, b in zip([0, *tokens], tokens, strict=False)], cfg.motion_dim))
    return found
