"""Training of the lip-sync scorer of bench/quality on rendered people, whose mouth times are exact.

The corpus's mouths are ahead of the sound by the clip's ``style.lead``, 60 to 110 ms. Real lips close when the sound of
the closure begins: so the sound is moved by exactly that lead, and offset 0 means what it means for a real recording.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatar_rt.config import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from avatar_rt.media.face import SMOOTH_PLACE, SMOOTH_SIZE
from avatar_rt.media.mouth import cut_squares, mouth_squares
from avatar_rt.models.speech import MOUTH_COEFFICIENTS
from avatar_rt.models.sync import PIXELS, SyncNetwork
from training.checkpoint import commit
from training.methods import augment
from training.methods.augment import draw
from training.methods.encoders import mouth_targets, save_part, spread, to_wave

FRAMES = 77
MAX_OFFSET = 15  # of the LSE protocol
LENGTH = 61  # frames drawn of a clip, of its picture and of its sound, each from its own start: their offset
MAX_SHIFT = 14
CHUNKS = (8, 19, 57)  # windows that vote together
AREA, MARGIN = 72, 1.6  # pixels kept around a mouth, and their side in mouth sides
NOTE = (
    "Rendered people only, nobody filmed. Recorded voices: LibriSpeech (Panayotov et al. 2015, CC BY 4.0), phones "
    "placed by training.data.align. Identities that are multiples of 20 are held out, with their voices where recorded."
)
CHANNELS = 1 + len(MOUTH_COEFFICIENTS)


def smooth_boxes(boxes: np.ndarray) -> np.ndarray:
    """What a tracker would make of exact face boxes [F, 4]: places and, more so, sizes smoothed in time."""
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    out = []
    for values, sigma in ((middle, SMOOTH_PLACE * FPS), (half, SMOOTH_SIZE * FPS)):
        out.append(cv2.GaussianBlur(values.astype(np.float64), (1, 0), sigmaX=0.1, sigmaY=sigma,
                                    borderType=cv2.BORDER_REFLECT) if len(values) > 1 else values)  # fmt: skip
    return np.concatenate((out[0] - out[1], out[0] + out[1]), axis=1)


class Mouths:
    """What the method needs of a corpus, in memory: grey surroundings of the mouth, true sound, mouth channels."""

    def __init__(self, corpus: Any) -> None:
        self.area, self.sound, self.channels = [], [], []
        for clip in range(len(corpus)):
            x, y, side = mouth_squares(smooth_boxes(corpus.facebox(clip))).T
            to_frame = np.zeros((FRAMES, 2, 3))
            to_frame[:, 0, 0] = to_frame[:, 1, 1] = side * MARGIN
            to_frame[:, 0, 2], to_frame[:, 1, 2] = x - 0.5, y - 0.5
            self.area.append(cut_squares(corpus.frames(clip), to_frame, AREA).round().astype(np.uint8))
            self.sound.append((true_sound(corpus, clip) * 32768).astype(np.int16))
            self.channels.append(mouth_targets(corpus, clip, 0, FRAMES))

    def __len__(self) -> int:
        return len(self.area)

    def crops(self, clip: int, squares: np.ndarray, first: int = 0) -> Tensor:
        """fp32 [F, PIXELS, PIXELS] from frame ``first``; ``squares`` [F, 2, 3] in mouth sides, see ``draw_squares``."""
        to_area = squares * (AREA / MARGIN)
        to_area[:, :, 2] += (AREA - 1) / 2
        return torch.from_numpy(cut_squares(self.area[clip][first : first + len(squares)], to_area, PIXELS))


def true_sound(corpus: Any, clip: int) -> np.ndarray:
    """The clip's sound fp32 [S], as early as its mouth."""
    ahead = round(corpus.meta[clip]["style"]["lead"] * SAMPLE_RATE)
    wave = np.asarray(corpus.audio(clip)).astype(np.float32) / 32768
    return np.concatenate((wave[ahead:], np.zeros(ahead, np.float32)))


def wander(count: int, rng: np.random.Generator, spread_: float, columns: int) -> np.ndarray:
    """Slow random drift, [count, columns], of about the given standard deviation."""
    knots = rng.normal(0, spread_, (count // 12 + 3, columns))
    at = np.arange(count) / 12 + rng.uniform(0, 1)
    return np.stack([np.interp(at, np.arange(len(knots)), k) for k in knots.T], axis=1)


def draw_squares(count: int, rng: np.random.Generator) -> np.ndarray:
    """Where a tracker that errs, and another camera, would cut the mouths, in mouth sides: float64 [count, 2, 3]."""
    place = rng.normal(0, 0.06, 2) + wander(count, rng, 0.015, 2) + rng.normal(0, 0.004, (count, 2))
    zoom = np.exp(rng.normal(0, 0.12) + wander(count, rng, 0.015, 1)[:, 0])
    angle = rng.normal(0, 0.09) + wander(count, rng, 0.02, 1)[:, 0]
    shape = np.array([[np.exp(rng.normal(0, 0.07)), rng.normal(0, 0.06)], [0, 1]])
    shape[:, 0] *= rng.choice([-1, 1])  # a mirror
    turn = np.stack((np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)), axis=1).reshape(-1, 2, 2)
    return np.concatenate((turn @ shape * zoom[:, None, None], place[:, :, None]), axis=2)


def upright(count: int) -> np.ndarray:
    """The squares of a tracker that does not err, [count, 2, 3]."""
    return np.tile(np.eye(2, 3), (count, 1, 1))


def damage_mouths(x: Tensor, generator: torch.Generator) -> Tensor:
    """Grey mouths [B, F, P, P] in 0..255 -> other light, resolution, exposure, blur, compression, noise."""
    b, f = x.shape[:2]
    x = x / 127.5 - 1
    for row in range(b):  # cameras and generators of lower resolution
        if augment.some(1, 0.5, generator):
            small = int(torch.randint(12, PIXELS, (), generator=generator))
            low = F.interpolate(x[row][:, None], size=small, mode="area")
            x[row] = F.interpolate(low, size=PIXELS, mode="bicubic", align_corners=False)[:, 0]
    longer = (x.roll(1, 1) + x) / 2  # exposure over two frames' time would lag; half of one's is usual
    x = torch.lerp(x, longer, augment.uniform((b, 1, 1, 1), 0, 0.3, generator))
    field = F.interpolate(augment.uniform((b, 2, 3, 3), -1, 1, generator), size=PIXELS, mode="bilinear")[:, :, None]
    strength = augment.uniform((b, 1, 1, 1), 0, 0.5, generator)
    x = x * (1 + strength * field[:, 0]) + 0.6 * strength * field[:, 1]
    gamma = torch.exp(augment.uniform((b, 1, 1, 1), -0.5, 0.5, generator))
    x = 2 * ((x.clamp(-1, 1) + 1) / 2) ** gamma - 1
    x = x * augment.uniform((b, 1, 1, 1), 0.3, 1.2, generator)
    x = x * (1 + 0.04 * torch.randn((b, f, 1, 1), generator=generator))
    flat = x.flatten(0, 1)[:, None]
    chosen = augment.some(b, 0.4, generator)
    if chosen.any():
        rows = chosen.repeat_interleave(f)
        flat[rows] = augment._quantise_blocks(flat[rows], generator)
    x = flat[:, 0].unflatten(0, (b, f))
    noise = augment.uniform((b, 1, 1, 1), 0, 0.06, generator) * augment.some(b, 0.6, generator).view(b, 1, 1, 1)
    return (x + noise * torch.randn(x.shape, generator=generator)) * 127.5 + 127.5


def mute_ends(wave: Tensor, generator: torch.Generator) -> Tensor:
    """[B, S] with up to half a second of silence in place of either end, in a third of the rows each."""
    b, s = wave.shape
    at = torch.arange(s)[None]
    for side in (at, at.flip(1)):
        length = augment.uniform((b, 1), 0, 0.5 * SAMPLE_RATE, generator) * augment.some(b, 0.33, generator)[:, None]
        wave = wave * (side >= length)
    return wave


def offset_distances(video: Tensor, sound: Tensor) -> Tensor:
    """Points [B, n, E] twice -> distance of every window to the sound at each offset, [B, n, 2 MAX_OFFSET + 1].

    The same arithmetic as bench.quality.lse, in batches and with a gradient.
    """
    padded = F.pad(sound, (0, 0, MAX_OFFSET, MAX_OFFSET))
    windows = padded.unfold(1, 2 * MAX_OFFSET + 1, 1)[:, : video.shape[1]]  # [B, n, E, offsets]
    return (video[..., None] - windows).square().sum(2).add(1e-6).sqrt()


class SyncModule(nn.Module):
    """The network, and what only training needs: mouth readings of both sides, and how sharply distances decide."""

    def __init__(self, dim: int = 96) -> None:
        super().__init__()
        self.network = SyncNetwork(dim)
        self.picture_mouth = nn.Linear(dim, CHANNELS)
        self.sound_mouth = nn.Linear(dim, CHANNELS)
        self.sharpness = nn.Parameter(torch.zeros(len(CHUNKS) + 1))
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("std", torch.ones(CHANNELS))


class SyncMethod:
    """Contrast over time offsets within the clip and over the batch's other clips.

    Args:
        train, val: Lists of corpora; a clip is drawn from each with the given odds.
        batch: Clips in a batch.
    """

    def __init__(self, train: list[Any], val: list[Any], *, odds: list[float], batch: int = 12) -> None:
        self.module = SyncModule()
        self.train, self.val, self.batch = [Mouths(c) for c in train], [Mouths(c) for c in val], batch
        self.data, self.steps, self.metrics = {"train": [told(c) for c in train], "val": [told(c) for c in val]}, 0, {}
        self.odds = torch.tensor(odds) / sum(odds)
        targets = torch.cat(self.train[0].channels)
        self.module.mean.copy_(targets.mean(0))
        self.module.std.copy_(targets.std(0).clamp(min=0.02))

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """mouths [L, P, P], sound [L * 640], its mouth channels and the picture's [L, 11], offset in frames.

        Nothing is made up to fill a gap: what tells the offset is the mouth alone.
        """
        corpus = self.train[int(torch.multinomial(self.odds, 1, generator=generator))]
        clip, last = draw(len(corpus), generator), FRAMES - LENGTH
        at = draw(last + 1, generator)
        late = min(max(draw(2 * MAX_SHIFT + 1, generator) - MAX_SHIFT, at - last), at)
        heard = at - late
        squares = draw_squares(LENGTH, np.random.default_rng(draw(2**62, generator)))
        wave = to_wave(corpus.sound[clip][heard * SAMPLES_PER_FRAME : (heard + LENGTH) * SAMPLES_PER_FRAME])
        channels = corpus.channels[clip]
        return (corpus.crops(clip, squares, at), wave, channels[heard : heard + LENGTH], channels[at : at + LENGTH],
                torch.tensor(late))  # fmt: skip

    def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = (self._draw(generator) for _ in range(self.batch))
        mouths, wave, heard, seen, late = (torch.stack(part) for part in zip(*rows, strict=True))
        with torch.autocast("cpu", enabled=False):
            mouths = damage_mouths(mouths, generator)
            wave = augment.damage_speech(mute_ends(augment.level_speech(wave), generator), generator)
        net = self.module.network
        picture, sound = net.picture_features(mouths), net.sound_features(wave)
        losses = self._contrast(net.picture_points(picture), net.sound_points(sound), late)
        right = losses.pop("right")
        losses["picture"] = self._mouth_loss(self.module.picture_mouth(picture), seen)
        losses["sound"] = self._mouth_loss(self.module.sound_mouth(sound), heard)
        return {"loss": sum(losses.values()), "right": right, "samples": self.batch, **losses}

    def _mouth_loss(self, read: Tensor, truth: Tensor) -> Tensor:
        error = read.float() - (truth - self.module.mean) / self.module.std
        return F.smooth_l1_loss(error, torch.zeros_like(error), beta=0.5)

    def _contrast(self, video: Tensor, sound: Tensor, late: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of the right offset, by chunks of windows; and of the right clip at the right offset."""
        distance = offset_distances(video, sound)  # [B, n, offsets]
        sharp = self.module.sharpness.exp() * 8
        losses = {}
        target = late + MAX_OFFSET
        for i, size in enumerate(CHUNKS):
            count = distance.shape[1] // size
            chunks = distance[:, : count * size].unflatten(1, (count, size)).mean(2)
            logits = (-sharp[i] * chunks).flatten(0, 1)
            middle = torch.arange(count)[None] * size + size // 2 + late[:, None]
            inside = ((middle >= 0) & (middle < distance.shape[1])).flatten()  # most of the chunk's sound is there
            losses[f"of{size}"] = F.cross_entropy(logits[inside], target.repeat_interleave(count)[inside])
        losses["right"] = (distance.mean(1).argmin(-1) - target).abs().le(1).float().mean()
        size, n = CHUNKS[1], distance.shape[1]
        at = (torch.arange(n)[None] + late[:, None]).clamp(0, n - 1)
        moved = sound.gather(1, at[..., None].expand(-1, -1, sound.shape[-1]))  # every clip's sound at its offset
        between = (video[:, None] - moved[None]).square().sum(-1).add(1e-6).sqrt()  # [B, B, n]
        count = n // size
        between = between[..., : count * size].unflatten(2, (count, size)).mean(3)
        right = torch.arange(len(video))[:, None].expand(-1, count)
        losses["who"] = 0.5 * F.cross_entropy(-sharp[-1] * between, right) if len(video) > 1 else sharp.sum() * 0
        return losses

    def validate(self, step: int, out: Path) -> dict[str, float]:
        """Share of (clip, shift) pairs found within a frame, per corpus, on clean held-out clips; r of the mouth."""
        metrics: dict[str, float] = {}
        for which, corpus in enumerate(self.val):
            hits, found, read = [], [], []
            for clip in spread(len(corpus), 60):
                mouths = corpus.crops(clip, upright(FRAMES))[None]
                net = self.module.network
                features = net.picture_features(mouths)
                read.append((self.module.picture_mouth(features)[0, :, 0], corpus.channels[clip][:, 0]))
                video, wave = net.picture_points(features), to_wave(corpus.sound[clip])[None]
                for k in (-8, 0, 8):
                    moved = F.pad(wave, (max(k, 0) * 640, max(-k, 0) * 640))
                    moved = moved[:, max(-k, 0) * 640 :][:, : wave.shape[1]]
                    sound = net.sound_points(net.sound_features(moved))
                    offset = int(offset_distances(video, sound).mean(1).argmin()) - MAX_OFFSET
                    hits.append(abs(offset - k) <= 1)
                    found.append(offset - k)
            metrics |= {f"right{which}": float(np.mean(hits)), f"median{which}": float(np.median(found))}
            pair = np.stack([torch.cat(x).numpy() for x in zip(*read)])
            metrics[f"r_opening{which}"] = float(np.corrcoef(pair)[0, 1])
        self.steps, self.metrics = step, {k: round(v, 4) for k, v in metrics.items()}
        return metrics

    def export(self, out: Path) -> None:
        """The network as ``sync.safetensors``, and its card, ``sync.json``."""
        save_part(self.module.network, out / "sync.safetensors")
        card = {
            "what": "lip-sync network of avatar_rt/models/sync.py", "licence": "Apache-2.0", "note": NOTE,
            "parameters": sum(p.numel() for p in self.module.network.parameters()),
            "data": self.data, "steps": self.steps, "commit": commit(), "validation": self.metrics,
        }  # fmt: skip
        (out / "sync.json").write_text(json.dumps(card, indent=1) + "\n")


def told(corpus: Any) -> dict[str, Any]:
    """What a corpus is, for the card."""
    voices = sorted({str(m["voice"]).split(":")[0] for m in corpus.meta})
    return {"rendered clips": len(corpus), "people": len(set(corpus.identity.tolist())), "voices": voices}
