"""A corpus into what the transformer trains on, once: ``python -m training.data.latents --corpus DIR --weights DIR``.

Writes ``latents.safetensors`` and ``captions.json`` into the corpus folder. About 100 kB a clip: it fits in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from avatar_rt.config import AvatarConfig
from avatar_rt.media.audio import normalise_loudness
from avatar_rt.models.speech import SpeechEncoder
from avatar_rt.models.vae import VideoVAE
from avatar_rt.models.weights import load_weights
from avatar_rt.pipeline.reference import to_video
from avatar_rt.scene.image import blank_head, latent_mask
from training.data.corpus import Corpus
from training.recipe import configuration

SCENES_PER_CLIP = 3  # the empty place, and two frames with the head blanked


def scene_latents(vae: VideoVAE, images: list[np.ndarray], boxes: list[np.ndarray | None]) -> tuple[Tensor, Tensor]:
    """Latents [n, 16, h, w] and kept masks bool [n, h, w] of scene images."""
    blanked, masks = [], []
    for image, box in zip(images, boxes, strict=True):
        picture, kept = blank_head(image, box)
        blanked.append(to_video(picture[None]))
        masks.append(kept)
    z = vae.normalize(vae.encode(torch.cat(blanked))[0])[:, :, 0]
    h, w = z.shape[-2:]
    return z, torch.from_numpy(np.stack([latent_mask(m, h, w) for m in masks]))


@torch.inference_mode()
def encode_clip(corpus: Corpus, i: int, vae: VideoVAE, num_frames: int) -> dict[str, Tensor]:
    frames = corpus.frames(i, 0, num_frames)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = vae.encode(to_video(frames))[0].float()
    rng = np.random.default_rng(i)
    picks = rng.choice(num_frames, SCENES_PER_CLIP - 1, replace=False)
    boxes = corpus.facebox(i, 0, num_frames)
    scenes, masks = scene_latents(
        vae, [corpus.background(i), *(frames[p] for p in picks)], [None, *(boxes[p] for p in picks)]
    )
    return {
        "latents": vae.normalize(z)[0].transpose(0, 1).half(),
        "scenes": scenes.half(),
        "scene_masks": masks,
        "motion": torch.from_numpy(np.array(corpus.motion(i, 0, num_frames), np.float32)),
        "mouth": torch.from_numpy(np.array(corpus.mouth(i, 0, num_frames), np.float32)),
        "facebox": torch.from_numpy(np.array(boxes, np.float32)),
    }


@torch.inference_mode()
def encode_speech(corpus: Corpus, i: int, speech: SpeechEncoder, num_frames: int) -> Tensor:
    """Features [F, A] fp16 of a clip's sound at -16 LUFS."""
    wave = normalise_loudness(corpus.audio(i, 0, num_frames).astype(np.float32) / 32768, 16_000)
    return speech(torch.from_numpy(wave)[None].float())[0].half()


def build(corpus_path: Path, weights: Path, cfg: AvatarConfig, num_frames: int, *, speech_only: bool = False) -> None:
    """Writes the table; with ``speech_only``, only the speech features of the table that is there."""
    corpus, path = Corpus(corpus_path, split="all"), corpus_path / "latents.safetensors"
    speech = SpeechEncoder(cfg.speech)
    load_weights(speech, weights / "speech.safetensors", dtype=torch.float32)
    if speech_only:
        table = load_file(path)
        clips = range(len(table["identity"]))
    else:
        vae = VideoVAE(cfg.vae).eval()
        load_weights(vae, weights / "vae.safetensors", dtype=torch.float32)
        clips, rows, started = range(len(corpus)), [], time.monotonic()
        for i in clips:
            rows.append(encode_clip(corpus, i, vae, num_frames))
            if (i + 1) % 100 == 0:
                rate = (i + 1) / (time.monotonic() - started)
                left = (len(corpus) - i) / rate / 60
                print(f"clip {i + 1}/{len(corpus)} | {rate:.1f} clip/s, {left:.1f} min left", flush=True)
        table = {key: torch.stack([r[key] for r in rows]).contiguous() for key in rows[0]}
        table["identity"] = torch.from_numpy(corpus.identity)
        captions = [corpus.meta[i].get("caption", "") for i in clips]
        (corpus_path / "captions.json").write_text(json.dumps(captions))
    table["speech"] = torch.stack([encode_speech(corpus, i, speech.eval(), num_frames) for i in clips])
    temporary = corpus_path / "latents.tmp"
    save_file(table, temporary)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.data.latents", description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument(
        "--weights", type=Path, required=True, help="folder with vae, speech .safetensors and config.json"
    )
    parser.add_argument("--frames", type=int, default=77)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--speech-only", action="store_true", help="renew the speech features of an existing table")
    args = parser.parse_args()
    cfg = configuration(args.weights)
    torch.set_num_threads(args.threads)
    build(args.corpus, args.weights, cfg, args.frames, speech_only=args.speech_only)


if __name__ == "__main__":
    main()
