"""A rendered corpus into what the transformer trains on, once: ``python -m training.data.latents --corpus DIR``.

Writes webdataset shards into ``CORPUS/latents`` (training/data/shards.py). A run that was broken off goes on where it
stopped; clips that other weights have encoded are refused. About 130 kB a clip of ``tiny``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avatar_rt.config import SAMPLE_RATE, AvatarConfig
from avatar_rt.errors import AvatarError, InputError
from avatar_rt.media.audio import normalise_loudness
from avatar_rt.models.speech import SpeechEncoder
from avatar_rt.models.vae import VideoVAE
from avatar_rt.models.weights import load_weights
from avatar_rt.pipeline.reference import to_video
from avatar_rt.scene.image import blank_head, latent_mask
from training.data.corpus import Corpus
from training.data.shards import (
    FOLDER,
    Index,
    Sample,
    Shard,
    check_weights,
    read_index,
    read_shard,
    shapes_of,
    weight_hashes,
    write_index,
    write_shard,
)  # fmt: skip
from training.recipe import configuration

SCENES_PER_CLIP = 3  # the empty place where it is known, and frames with the head blanked
SHARD_CLIPS = 50


class Encoder:
    """The frozen networks that turn a clip into a sample.

    Args:
        weights: Folder with vae.safetensors and speech.safetensors.
    """

    def __init__(self, cfg: AvatarConfig, weights: Path) -> None:
        self.vae, self.speech = VideoVAE(cfg.vae).eval(), SpeechEncoder(cfg.speech).eval()
        load_weights(self.vae, weights / "vae.safetensors", dtype=torch.float32)
        load_weights(self.speech, weights / "speech.safetensors", dtype=torch.float32)

    @torch.inference_mode()
    def video(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [F, H, W, 3] -> normalised latents fp16 [T, C, h, w]."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.vae.encode(to_video(frames))[0].float()
        return np.asarray(self.vae.normalize(z)[0].transpose(0, 1).half().numpy())

    @torch.inference_mode()
    def scenes(self, images: list[np.ndarray], boxes: list[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
        """Scene images uint8 [H, W, 3] -> latents fp16 [n, C, h, w] and kept masks bool [n, h, w]."""
        pictures, masks = zip(*(blank_head(i, b) for i, b in zip(images, boxes, strict=True)), strict=True)
        z = self.vae.normalize(self.vae.encode(torch.cat([to_video(p[None]) for p in pictures]))[0])[:, :, 0]
        return z.half().numpy(), np.stack([latent_mask(m, *z.shape[-2:]) for m in masks])

    @torch.inference_mode()
    def sound(self, wave: np.ndarray) -> np.ndarray:
        """fp32 [F * 640], as loud as it may be -> features fp16 [F, A]."""
        heard: Tensor = self.speech(torch.from_numpy(normalise_loudness(wave, SAMPLE_RATE))[None])[0]
        return np.asarray(heard.half().numpy())

    def sample(
        self,
        key: str,
        frames: np.ndarray,
        wave: np.ndarray,
        boxes: np.ndarray,
        motion: np.ndarray,
        mouth: np.ndarray,
        meta: dict[str, Any],
        *,
        background: np.ndarray | None = None,
        seed: int = 0,
    ) -> Sample:
        """One clip, encoded. ``seed`` chooses the frames that become scene images."""
        known = [] if background is None else [background]
        picks = np.random.default_rng(seed).choice(len(frames), SCENES_PER_CLIP - len(known), replace=False)
        images = [*known, *(frames[p] for p in picks)]
        scenes, masks = self.scenes(images, [*[None for _ in known], *(boxes[p] for p in picks)])
        return Sample(
            key, self.video(frames), scenes, masks, self.sound(wave), np.asarray(motion, np.float32),
            np.asarray(mouth, np.float32), np.asarray(boxes, np.float32), meta,
        )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One shard: its number and its clips in the corpus; ``old`` has everything but the speech features already."""

    number: int
    clips: tuple[int, ...]
    identities: tuple[int, ...]
    corpus: Path
    weights: Path
    out: Path
    num_frames: int
    old: Path | None = None

    @property
    def path(self) -> Path:
        return self.out / f"clips-{self.number:05d}.tar"


def plan(corpus: Corpus, shard_clips: int) -> list[dict[str, tuple[int, ...]]]:
    """``clips`` and ``identities`` of each shard: about ``shard_clips`` clips of whole identities."""
    of: dict[int, list[int]] = {}
    for i, who in enumerate(corpus.identity.tolist()):
        of.setdefault(who, []).append(i)
    parts, clips = [], []
    for n, members in enumerate(of.values(), 1):
        clips += members
        if len(clips) >= shard_clips or n == len(of):
            parts.append({"clips": tuple(clips), "identities": tuple(corpus.identity[clips].tolist())})
            clips = []
    return parts


def key_of(meta: dict[str, Any]) -> str:
    return f"{meta['identity']:08d}-{meta['take']:03d}"


def clip_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """What a sample keeps of a rendered clip's description; the take is the scene."""
    kept = {k: meta[k] for k in ("identity", "caption", "voice", "sentence", "style") if k in meta}
    return {**kept, "scene": meta["take"], "source": "rendered"}


_encoder: Encoder | None = None  # of this process


def _start(weights: Path) -> None:
    global _encoder
    torch.set_num_threads(1)
    _encoder = Encoder(configuration(weights), weights)


def encode_shard(job: Job) -> tuple[Shard, dict[str, tuple[int, ...]]]:
    """Encodes and writes one shard; returns its entry for the index, and the shapes of its arrays."""
    assert _encoder is not None
    corpus = Corpus(job.corpus, split="all")
    samples = []
    if job.old is not None:
        entry = next(s for s in read_index(job.old).shards if s.name == job.path.name)
        for i, old in zip(job.clips, read_shard(job.old, entry), strict=True):
            samples.append(replace(old, speech=_encoder.sound(_wave(corpus, i, job.num_frames))))
    else:
        for i in job.clips:
            n = job.num_frames
            samples.append(
                _encoder.sample(
                    key_of(corpus.meta[i]), corpus.frames(i, 0, n), _wave(corpus, i, n), corpus.facebox(i, 0, n),
                    corpus.motion(i, 0, n), corpus.mouth(i, 0, n), clip_meta(corpus.meta[i]),
                    background=corpus.background(i), seed=i,
                )
            )  # fmt: skip
    return write_shard(job.path, samples), shapes_of(samples[0])


def _wave(corpus: Corpus, i: int, num_frames: int) -> np.ndarray:
    return corpus.audio(i, 0, num_frames).astype(np.float32) / 32768


def run(jobs: list[Job], index: Index, workers: int) -> Index:
    """Encodes what is missing, one line of progress per shard; the index grows with each."""
    planned = {job.path.name: job.identities for job in jobs}
    kept = {s.name: s for s in index.shards if planned.get(s.name) == s.identities and _is_whole(jobs[0].out, s)}
    todo = [job for job in jobs if job.path.name not in kept]
    total, began, done = sum(len(j.clips) for j in todo), time.monotonic(), 0
    print(f"{len(jobs)} shards, {len(todo)} to encode ({total} clips)", flush=True)
    if not todo:
        return index
    write_index(jobs[0].out, index := replace(index, shards=tuple(kept[n] for n in sorted(kept))))
    with multiprocessing.get_context("spawn").Pool(workers, _start, (jobs[0].weights,)) as pool:
        for shard, shapes in pool.imap_unordered(encode_shard, todo):
            kept[shard.name] = shard
            index = replace(index, shapes=shapes, shards=tuple(kept[n] for n in sorted(kept)))
            write_index(jobs[0].out, index)
            done += len(shard.identities)
            rate = done / (time.monotonic() - began)
            print(f"{done}/{total} clips, {rate:.2f} clips/s, {(total - done) / rate / 60:.1f} min left", flush=True)
    return index


def _is_whole(folder: Path, shard: Shard) -> bool:
    path = folder / shard.name
    return path.is_file() and path.stat().st_size == shard.bytes


def build(corpus_path: Path, weights: Path, num_frames: int = 77, *, workers: int = 1, shard_clips: int = SHARD_CLIPS,
          speech_only: bool = False) -> Index:  # fmt: skip
    """Encodes a rendered corpus into its shards.

    Args:
        num_frames: Frames of each clip to encode, 1 + 4k.
        speech_only: Renew the speech features of shards that the same VAE has made.

    Raises: ArtifactError where the shards that are there were made by other weights; InputError on a number of frames.
    """
    if num_frames % 4 != 1:
        raise InputError(f"frames: expected 1 + 4k, got {num_frames}")
    corpus, hashes, out, old = Corpus(corpus_path, "all"), weight_hashes(weights), corpus_path / FOLDER, None
    stride = configuration(weights).vae.spatial_stride
    if speech_only:
        old, out = out, corpus_path / f"{FOLDER}.renewed"
        check_weights(old, read_index(old), {**hashes, "speech": read_index(old).weights["speech"]})
    out.mkdir(exist_ok=True)
    index = Index(hashes, stride)
    if (out / "index.json").exists():
        index = read_index(out, weights)
    common = {"out": out, "corpus": corpus_path, "weights": weights, "num_frames": num_frames, "old": old}
    jobs = [Job(number=k, **part, **common) for k, part in enumerate(plan(corpus, shard_clips))]
    index = run(jobs, index, workers)
    for extra in {p.name for p in out.glob("*.tar")} - {job.path.name for job in jobs}:  # the corpus has shrunk
        (out / extra).unlink()
    if old is not None:
        shutil.rmtree(old)
        out.rename(old)
    return index


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.data.latents", description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="folder with vae, speech .safetensors, config.json")
    parser.add_argument("--frames", type=int, default=77)
    parser.add_argument("--shard-clips", type=int, default=SHARD_CLIPS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--speech-only", action="store_true", help="renew the speech features of existing shards")
    a = parser.parse_args(arguments)
    try:
        build(a.corpus, a.weights, a.frames, workers=max(a.workers, 1), shard_clips=a.shard_clips,
              speech_only=a.speech_only)  # fmt: skip
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
