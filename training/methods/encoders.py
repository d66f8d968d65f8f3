"""Training of the speech and motion encoders on the corpus, whose labels are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from avatar_rt.config import FPS, SAMPLES_PER_FRAME, MotionConfig, SpeechConfig
from avatar_rt.models.motion import ARKIT_NAMES, MOTION_NAMES, MotionEncoder, mirror_motion, motion_index
from avatar_rt.models.speech import MOUTH_COEFFICIENTS, SpeechEncoder
from training.data.phonemes import ID
from training.data.visemes import mouth_curves
from training.methods import augment
from training.methods.augment import draw

Labelled = tuple[Tensor, Tensor, Tensor]  # wave [S], phonemes [F] (or UNKNOWN), mouth [F, 11] (or NaN); F = S // 640
UNKNOWN = -100
CLIP_FRAMES = 77
MOUTH_CHANNELS = [ARKIT_NAMES.index(name) for name in MOUTH_COEFFICIENTS]


def save_part(module: nn.Module, path: Path) -> None:
    """Write parameters in bf16 and buffers as they are."""
    names = {name for name, _ in module.named_parameters()}
    state = {k: v.bfloat16() if k in names else v for k, v in module.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, str(path))


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's r of two sequences; 0 where one is constant."""
    a, b = a.double().flatten() - a.double().mean(), b.double().flatten() - b.double().mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12))


def accuracies(logits: Tensor, phonemes: Tensor, suffix: str) -> dict[str, float]:
    """Share of frames with the right phoneme: of all labelled frames, and of those that are not silence."""
    hit = logits.argmax(-1) == phonemes
    return {
        f"accuracy{suffix}": float(hit[phonemes != UNKNOWN].float().mean()),
        f"sounding{suffix}": float(hit[phonemes > 0].float().mean()),
    }


def spread(count: int, most: int) -> range:
    """At most about ``most`` indices, evenly over ``count``."""
    return range(0, count, max(1, count // most))


def to_wave(samples: np.ndarray) -> Tensor:
    """int16 samples -> fp32 in -1..1."""
    return torch.from_numpy(samples.astype(np.float32) / 32768)


def to_pictures(frames: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] -> fp32 [N, 3, H, W] in -1..1."""
    return torch.from_numpy(frames.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def mouth_targets(corpus: Any, clip: int, start: int, count: int) -> Tensor:
    """[count, 11]: lip opening, then MOUTH_COEFFICIENTS."""
    motion = np.asarray(corpus.motion(clip, start, count))[:, MOUTH_CHANNELS]
    opening = np.asarray(corpus.mouth(clip, start, count))[:, None]
    return torch.from_numpy(np.concatenate((opening, motion), axis=1).astype(np.float32))


def mouth_of_phonemes(phonemes: np.ndarray) -> Tensor:
    """The mouth that the corpus's average style makes of a sequence of phonemes [F]: [F, 11], lip opening NaN."""
    starts = np.flatnonzero(np.diff(phonemes, prepend=phonemes[0] - 1))
    ends = np.append(starts[1:], len(phonemes))
    phones = tuple(
        (max(int(phonemes[a]), 0), a / FPS, b / FPS) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)
    )
    curves = mouth_curves(phones, len(phonemes) / FPS, lead=0.085, slack=1.05)[2::4]  # 100 Hz -> the frames' middles
    mouth = np.full((len(phonemes), 1 + len(MOUTH_COEFFICIENTS)), np.nan, np.float32)
    mouth[:, 1:] = curves[: len(phonemes), MOUTH_CHANNELS]
    unknown = np.convolve(phonemes < 0, np.ones(9), mode="same") > 0
    mouth[unknown] = np.nan
    return torch.from_numpy(mouth)


def load_recorded(folder: Path) -> tuple[list[Labelled], list[Labelled]]:
    """What training.data.align wrote -> (train, val), every eighth speaker held out; both empty without the folder.

    Files are named as LibriSpeech names them, SPEAKER-CHAPTER-NUMBER, after any prefix that ends in ``__``.
    """
    files = sorted(folder.glob("*.npz"))
    speakers = [f.stem.rpartition("__")[2].split("-")[0] for f in files]
    held_out = set(sorted(set(speakers))[::8])
    parts: tuple[list[Labelled], list[Labelled]] = ([], [])
    for file, speaker in zip(files, speakers, strict=True):
        with np.load(file) as saved:
            phonemes = np.array([ID.get(name, UNKNOWN) for name in saved["phones"].tolist()], np.int64)
            wave = to_wave(saved["wave"])[: len(phonemes) * SAMPLES_PER_FRAME]
        if (phonemes >= 0).mean() > 0.5:
            parts[speaker in held_out].append((wave, torch.from_numpy(phonemes), mouth_of_phonemes(phonemes)))
    return parts


class SpeechMethod:
    """Phonemes and mouth from damaged speech: cross-entropy, and Huber on standardised mouth channels.

    Args:
        train, val: Corpus objects (other identities, voices and sentences in ``val``).
        recorded, recorded_val: Recordings of real voices, of which ``recorded_share`` of a batch is drawn. Nobody
            filmed them: their mouth is what the corpus makes of the phonemes.
        frames, batch: Frames per clip, clips per batch.
    """

    def __init__(
        self, cfg: SpeechConfig, train: Any, val: Any, recorded: list[Labelled], recorded_val: list[Labelled],
        *, recorded_share: float = 0.5, frames: int = 72, batch: int = 16,
    ) -> None:  # fmt: skip
        self.module = SpeechEncoder(cfg)
        self.train, self.val, self.recorded, self.recorded_val = train, val, recorded, recorded_val
        self.frames, self.batch = frames, batch
        self.num_recorded = round(recorded_share * batch) if recorded else 0
        targets = torch.cat([mouth_targets(train, i, 0, frames) for i in spread(len(train), 200)])
        self.module.mouth_mean.copy_(targets.mean(0))
        self.module.mouth_std.copy_(targets.std(0).clamp(min=0.02))

    def _clip(self, corpus: Any, clip: int) -> Labelled:
        """wave [S], phonemes [F], mouth [F, 11] of a corpus clip."""
        phonemes = np.asarray(corpus.phonemes(clip, 0, self.frames)).astype(np.int64)
        wave = to_wave(np.asarray(corpus.audio(clip, 0, self.frames)))
        return wave, torch.from_numpy(phonemes), mouth_targets(corpus, clip, 0, self.frames)

    def _recording(self, generator: torch.Generator) -> Labelled:
        """A piece of a recording, padded where that is shorter."""
        wave, phonemes, mouth = self.recorded[draw(len(self.recorded), generator)]
        start = draw(max(len(phonemes) - self.frames, 0) + 1, generator)
        wave = wave[start * SAMPLES_PER_FRAME :][: self.frames * SAMPLES_PER_FRAME]
        phonemes, mouth = phonemes[start:][: self.frames], mouth[start:][: self.frames]
        missing = self.frames - len(phonemes)
        wave = F.pad(wave, (0, self.frames * SAMPLES_PER_FRAME - len(wave)))
        return wave, F.pad(phonemes, (0, missing), value=UNKNOWN), F.pad(mouth, (0, 0, 0, missing), value=torch.nan)

    def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = [self._recording(generator) for _ in range(self.num_recorded)]
        rows += [self._clip(self.train, draw(len(self.train), generator)) for _ in range(self.batch - len(rows))]
        wave, phonemes, mouth = (torch.stack(part) for part in zip(*rows, strict=True))
        wave, at = augment.change_speed(
            augment.level_speech(wave), augment.uniform((self.batch,), 0.85, 1.18, generator)
        )
        at = at.round().long()
        ended = at >= self.frames
        at = at.clamp(max=self.frames - 1)
        phonemes = phonemes.gather(1, at).masked_fill(ended, UNKNOWN)
        mouth = mouth.gather(1, at[..., None].expand_as(mouth)).masked_fill(ended[..., None], torch.nan)
        with torch.autocast("cpu", enabled=False):
            wave = augment.damage_speech(wave, generator)
        read = self.module.heads(self.module(wave))
        loss_phonemes = F.cross_entropy(read["phonemes"].transpose(1, 2), phonemes, label_smoothing=0.05)
        error = ((read["mouth"] - mouth) / self.module.mouth_std)[mouth.isfinite()]
        loss_mouth = F.smooth_l1_loss(error, torch.zeros_like(error), beta=0.5)
        hit = (read["phonemes"].argmax(-1) == phonemes)[phonemes != UNKNOWN]
        return {
            "loss": loss_phonemes + loss_mouth, "phonemes": loss_phonemes, "mouth": loss_mouth,
            "accuracy": hit.float().mean(), "samples": self.batch,
        }  # fmt: skip

    def _read(self, wave: Tensor) -> dict[str, Tensor]:
        return self.module.heads(self.module(wave))

    def validate(self, step: int, out: Path) -> dict[str, float]:
        """Phoneme accuracy (all, and sounding frames) and r of the mouth, clean and damaged; then recorded voices."""
        clips = [self._clip(self.val, i) for i in spread(len(self.val), 64)]
        wave, phonemes, mouth = (torch.stack(part) for part in zip(*clips, strict=True))
        wave = augment.level_speech(wave)
        metrics = {}
        for name, sound in (("", wave), ("_damaged", augment.damage_speech(wave, torch.Generator().manual_seed(1)))):
            read = self._read(sound)
            metrics |= accuracies(read["phonemes"], phonemes, name)
            for i, channel in enumerate(("opening", *MOUTH_COEFFICIENTS)):
                if channel in ("opening", "jawOpen", "mouthPucker", "mouthFunnel", "mouthClose"):
                    metrics[f"r_{channel}{name}"] = correlation(read["mouth"][..., i], mouth[..., i])
        if self.recorded_val:
            read = [self._read(augment.level_speech(wave[None])) for wave, _, _ in self.recorded_val]
            truth = torch.cat([phonemes for _, phonemes, _ in self.recorded_val])
            metrics |= accuracies(torch.cat([r["phonemes"][0] for r in read]), truth, "_recorded")
            jaw, jaw_truth = (
                torch.cat([r["mouth"][0, :, 1] for r in read]),
                torch.cat([m for _, _, m in self.recorded_val])[:, 1],
            )
            known = jaw_truth.isfinite()
            metrics["r_jawOpen_recorded"] = correlation(jaw[known], jaw_truth[known])
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
        motion = torch.cat(
            [torch.from_numpy(np.array(train.motion(i, 0, CLIP_FRAMES))) for i in spread(len(train), 400)]
        )
        self.module.mean.copy_(motion.mean(0))
        # A coefficient that hardly ever moves must not be blown up to unit variance.
        self.module.std.copy_(motion.std(0).clamp(min=0.02))
        weights = torch.ones(cfg.channels)
        for name, weight in _CHANNEL_WEIGHTS.items():
            weights[motion_index(name)] = weight
        self.weights = weights / weights.mean()

    def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        frames, motion = [], []
        for _ in range(self.batch):
            clip, at = draw(len(self.train), generator), draw(CLIP_FRAMES, generator)
            frames.append(np.asarray(self.train.frames(clip, at, 1)))
            motion.append(np.asarray(self.train.motion(clip, at, 1)))
        pictures, truth = to_pictures(np.concatenate(frames)), torch.from_numpy(np.concatenate(motion)).float()
        mirrored = augment.some(self.batch, 0.5, generator)
        pictures = torch.where(mirrored.view(-1, 1, 1, 1), pictures.flip(-1), pictures)
        truth = torch.where(mirrored[:, None], mirror_motion(truth), truth)
        with torch.autocast("cpu", enabled=False):
            pictures, shift, zoom = augment.move_pictures(pictures, generator)
            pictures = augment.damage_pictures(pictures, generator)
        truth[:, 55:57] = truth[:, 55:57] * zoom[:, None] + shift
        truth[:, 57] += zoom.log()
        error = self.module.read(pictures) - self.module.normalize(truth)
        loss = (F.smooth_l1_loss(error, torch.zeros_like(error), beta=0.3, reduction="none") * self.weights).mean()
        return {"loss": loss, "jawOpen": error[:, motion_index("jawOpen")].abs().mean(), "samples": self.batch}

    def validate(self, step: int, out: Path) -> dict[str, float]:
        """r per reported channel over all held-out frames, as they are and damaged (``_damaged``: jawOpen, blink)."""
        clips = spread(len(self.val), 60)
        generator = torch.Generator().manual_seed(1)
        read, damaged, truth = [], [], []
        for clip in clips:
            pictures = to_pictures(np.asarray(self.val.frames(clip, 0, CLIP_FRAMES))[::2])
            read.append(self.module(pictures))
            damaged.append(self.module(augment.damage_pictures(pictures, generator)))
            truth.append(torch.from_numpy(np.array(self.val.motion(clip, 0, CLIP_FRAMES))[::2]))
        read, damaged, truth = torch.cat(read), torch.cat(damaged), torch.cat(truth)
        channel = {name: MOTION_NAMES.index(name) for name in _REPORTED}
        metrics = {f"r_{n}": correlation(read[:, i], truth[:, i]) for n, i in channel.items()}
        for name in ("jawOpen", "eyeBlinkLeft"):
            metrics[f"r_{name}_damaged"] = correlation(damaged[:, channel[name]], truth[:, channel[name]])
        return metrics

    def export(self, out: Path) -> None:
        save_part(self.module, out / "motion.safetensors")
