"""Training of the speech and motion encoders on the corpus, whose labels are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from avatar_rt.config import MotionConfig, SpeechConfig
from avatar_rt.models.motion import ARKIT_NAMES, MOTION_NAMES, MotionEncoder, motion_index
from avatar_rt.models.speech import MOUTH_COEFFICIENTS, SpeechEncoder
from training.methods import augment


def save_part(module: nn.Module, path: Path) -> None:
    """Write parameters in bf16 and buffers as they are."""
    names = {name for name, _ in module.named_parameters()}
    state = {k: v.bfloat16() if k in names else v for k, v in module.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, str(path))


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's r of two sequences; 0 where one is constant."""
    a, b = a.double().flatten() - a.double().mean(), b.double().flatten() - b.double().mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12))


def to_wave(samples: np.ndarray) -> Tensor:
    """int16 samples -> fp32 in -1..1."""
    return torch.from_numpy(samples.astype(np.float32) / 32768)


def to_pictures(frames: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] -> fp32 [N, 3, H, W] in -1..1."""
    return torch.from_numpy(frames.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def mouth_targets(corpus: Any, clip: int, start: int, count: int) -> Tensor:
    """[count, 11]: lip opening, then MOUTH_COEFFICIENTS."""
    channels = [ARKIT_NAMES.index(name) for name in MOUTH_COEFFICIENTS]
    motion = np.asarray(corpus.motion(clip, start, count))[:, channels]
    opening = np.asarray(corpus.mouth(clip, start, count))[:, None]
    return torch.from_numpy(np.concatenate((opening, motion), axis=1).astype(np.float32))


class SpeechMethod:
    """Phonemes and mouth from damaged speech: cross-entropy, and Huber on standardised mouth channels.

    Args:
        train, val: Corpus objects (other identities, voices and sentences in ``val``).
        frames: Frames per clip in a batch of ``batch`` clips.
        recorded: Optional recordings [(wave fp32 [S], phonemes int64 [S // 640])]; ``recorded_share`` of a batch is
            drawn from them and trains the phonemes only.
    """

    def __init__(
        self, cfg: SpeechConfig, train: Any, val: Any, *, frames: int = 72, batch: int = 16,
        recorded: list[tuple[Tensor, Tensor]] | None = None, recorded_share: float = 0.5,
    ) -> None:  # fmt: skip
        self.module = SpeechEncoder(cfg)
        self.train, self.val = train, val
        self.frames, self.batch = frames, batch
        self.recorded = recorded or []
        self.num_recorded = round(recorded_share * batch) if self.recorded else 0
        sample = range(0, len(train), max(1, len(train) // 200))
        targets = torch.cat([mouth_targets(train, i, 0, frames) for i in sample])
        self.module.mouth_mean.copy_(targets.mean(0))
        self.module.mouth_std.copy_(targets.std(0).clamp(min=0.02))

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """wave [B, S], phonemes [B, F] (-100: unknown), mouth [B, F, 11], whether a row knows its mouth [B]."""
        waves, phonemes, mouths = [], [], []
        for row in range(self.batch):
            pool = self.recorded if row < self.num_recorded else self.train
            clip = int(torch.randint(len(pool), (), generator=generator))
            if row < self.num_recorded:
                wave, labels = self.recorded[clip]
                start = int(torch.randint(max(len(labels) - self.frames, 0) + 1, (), generator=generator))
                wave = wave[start * 640 : (start + self.frames) * 640]
                labels, mouth = (
                    labels[start : start + self.frames],
                    torch.zeros(self.frames, 1 + len(MOUTH_COEFFICIENTS)),
                )
                wave = F.pad(wave, (0, self.frames * 640 - len(wave)))
                labels = F.pad(labels, (0, self.frames - len(labels)), value=-100)
            else:
                wave = to_wave(np.asarray(self.train.audio(clip, 0, self.frames)))
                labels = torch.from_numpy(np.asarray(self.train.phonemes(clip, 0, self.frames)).astype(np.int64))
                mouth = mouth_targets(self.train, clip, 0, self.frames)
            waves.append(wave)
            phonemes.append(labels)
            mouths.append(mouth)
        known = torch.arange(self.batch) >= self.num_recorded
        return torch.stack(waves), torch.stack(phonemes), torch.stack(mouths), known

    def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        wave, phonemes, mouth, known = self._draw(generator)
        factors = augment.uniform((self.batch,), 0.85, 1.18, generator)
        wave, at = augment.change_speed(augment.level_speech(wave), factors)
        index = at.round().long()
        inside = index < self.frames
        index = index.clamp(0, self.frames - 1)
        phonemes = phonemes.gather(1, index).masked_fill(~inside, -100)
        mouth = mouth.gather(1, index[..., None].expand(-1, -1, mouth.shape[-1]))
        with torch.autocast("cpu", enabled=False):
            wave = augment.damage_speech(wave, generator)
        read = self.module.heads(self.module(wave))
        loss_phonemes = F.cross_entropy(read["phonemes"].transpose(1, 2), phonemes, label_smoothing=0.05)
        error = (read["mouth"] - mouth) / self.module.mouth_std
        rows = inside & known[:, None]
        loss_mouth = F.smooth_l1_loss(error[rows], torch.zeros_like(error[rows]), beta=0.5)
        accuracy = (read["phonemes"].argmax(-1) == phonemes)[phonemes >= 0].float().mean()
        return {
            "loss": loss_phonemes + loss_mouth, "phonemes": loss_phonemes, "mouth": loss_mouth, "accuracy": accuracy,
        }  # fmt: skip

    def validate(self, step: int, out: Path) -> dict[str, float]:
        """Phoneme accuracy (all frames; sounding frames) and r of the mouth, on clean and on damaged sound."""
        clips = range(0, len(self.val), max(1, len(self.val) // 60))
        metrics = {}
        for name in ("", "_damaged"):
            hits, mouths, truths = [], [], []
            generator = torch.Generator().manual_seed(1)
            for first in range(0, len(clips), 8):
                some = clips[first : first + 8]
                wave = torch.stack([to_wave(np.asarray(self.val.audio(i, 0, self.frames))) for i in some])
                wave = augment.level_speech(wave)
                wave = augment.damage_speech(wave, generator) if name else wave
                read = self.module.heads(self.module(wave))
                truth = np.stack([np.asarray(self.val.phonemes(i, 0, self.frames)) for i in some]).astype(np.int64)
                hits.append(torch.stack((read["phonemes"].argmax(-1) == torch.from_numpy(truth),
                                         torch.from_numpy(truth) > 0)).flatten(1))  # fmt: skip
                mouths.append(read["mouth"].flatten(0, 1))
                truths.append(torch.cat([mouth_targets(self.val, i, 0, self.frames) for i in some]))
            hit, sounding = torch.cat(hits, 1)
            mouth, target = torch.cat(mouths), torch.cat(truths)
            metrics[f"accuracy{name}"] = float(hit.float().mean())
            metrics[f"accuracy_sounding{name}"] = float(hit[sounding].float().mean())
            for i, channel in enumerate(("opening", *MOUTH_COEFFICIENTS)):
                if channel in ("opening", "jawOpen", "mouthPucker", "mouthFunnel", "mouthClose"):
                    metrics[f"r_{channel}{name}"] = correlation(mouth[:, i], target[:, i])
        return metrics

    def export(self, out: Path) -> None:
        save_part(self.module, out / "speech.safetensors")


_CHANNEL_WEIGHTS = {
    "jawOpen": 6.0, "eyeBlinkLeft": 4.0, "eyeBlinkRight": 4.0, "mouthPucker": 4.0, "mouthFunnel": 3.0,
    "mouthClose": 3.0, "mouthSmileLeft": 2.0, "mouthSmileRight": 2.0, "yaw": 3.0, "pitch": 3.0, "roll": 3.0,
}  # fmt: skip
_REPORTED = ("jawOpen", "eyeBlinkLeft", "mouthPucker", "mouthSmileLeft", "browInnerUp", "yaw", "pitch", "roll",
             "translateX", "logScale", "gazeLeftX")  # fmt: skip


class MotionMethod:
    """Motion from damaged crops: Huber on normalised channels, more weight on what the eye notices."""

    def __init__(self, cfg: MotionConfig, train: Any, val: Any, *, batch: int = 48) -> None:
        self.module = MotionEncoder(cfg)
        self.train, self.val, self.batch = train, val, batch
        sample = range(0, len(train), max(1, len(train) // 400))
        motion = torch.cat([torch.from_numpy(np.array(train.motion(i, 0, 77))) for i in sample])
        self.module.mean.copy_(motion.mean(0))
        # A coefficient that hardly ever moves must not be blown up to unit variance.
        self.module.std.copy_(motion.std(0).clamp(min=0.02))
        weights = torch.ones(cfg.channels)
        for name, weight in _CHANNEL_WEIGHTS.items():
            weights[motion_index(name)] = weight
        self.weights = weights / weights.mean()

    def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        frames, motion = [], []
        for clip in torch.randint(len(self.train), (self.batch,), generator=generator).tolist():
            at = int(torch.randint(77, (), generator=generator))
            frames.append(np.asarray(self.train.frames(clip, at, 1)))
            motion.append(np.asarray(self.train.motion(clip, at, 1)))
        pictures, truth = to_pictures(np.concatenate(frames)), torch.from_numpy(np.concatenate(motion)).float()
        with torch.autocast("cpu", enabled=False):
            pictures, shift, zoom = augment.move_pictures(pictures, generator)
            pictures = augment.damage_pictures(pictures, generator)
        truth[:, 55:57] = truth[:, 55:57] * zoom[:, None] + shift
        truth[:, 57] += zoom.log()
        error = self.module.read(pictures) - self.module.normalize(truth)
        loss = (F.smooth_l1_loss(error, torch.zeros_like(error), beta=0.3, reduction="none") * self.weights).mean()
        return {"loss": loss, "jawOpen": error[:, motion_index("jawOpen")].abs().mean()}

    def validate(self, step: int, out: Path) -> dict[str, float]:
        """r per reported channel over all held-out frames, as they are and damaged (``_damaged``: jawOpen, blink)."""
        clips = range(0, len(self.val), max(1, len(self.val) // 60))
        generator = torch.Generator().manual_seed(1)
        read, damaged, truth = [], [], []
        for clip in clips:
            pictures = to_pictures(np.asarray(self.val.frames(clip, 0, 77))[::2])
            read.append(self.module(pictures))
            damaged.append(self.module(augment.damage_pictures(pictures, generator)))
            truth.append(torch.from_numpy(np.array(self.val.motion(clip, 0, 77))[::2]))
        read, damaged, truth = torch.cat(read), torch.cat(damaged), torch.cat(truth)
        channel = {name: MOTION_NAMES.index(name) for name in _REPORTED}
        metrics = {f"r_{n}": correlation(read[:, i], truth[:, i]) for n, i in channel.items()}
        for name in ("jawOpen", "eyeBlinkLeft"):
            metrics[f"r_{name}_damaged"] = correlation(damaged[:, channel[name]], truth[:, channel[name]])
        return metrics

    def export(self, out: Path) -> None:
        save_part(self.module, out / "motion.safetensors")
