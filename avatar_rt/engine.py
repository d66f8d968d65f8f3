"""``AvatarEngine`` holds weights and compiled callables and is shared; it prepares people and opens sessions."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from avatar_rt.config import FPS, SAMPLE_RATE, ChunkConfig, SamplingConfig, frames_of_latents
from avatar_rt.errors import InputError, UnsupportedError
from avatar_rt.job import write_video
from avatar_rt.media.audio import normalise_loudness
from avatar_rt.media.face import crop_face, detect_faces, read_face, track_face
from avatar_rt.media.reader import read_image
from avatar_rt.media.stream import SpeechFile
from avatar_rt.media.writer import EXTENSIONS, check_output
from avatar_rt.models.dit import VideoRefDiT
from avatar_rt.models.guided import GuidedDiT, refuses_guided
from avatar_rt.models.motion import FRAMES_PER_LATENT, MOTION_NAMES, MotionEncoder, motion_index, ungroup_motion
from avatar_rt.models.speech import MOUTH_COEFFICIENTS, SpeechEncoder
from avatar_rt.models.streamed import StreamedVAE, refuses_streamed
from avatar_rt.models.text import TextEncoder
from avatar_rt.models.vae import VideoVAE
from avatar_rt.models.weights import load_weights
from avatar_rt.ops.schedule import set_cpu_schedule, set_gpu_tiles
from avatar_rt.pipeline.denoise import Scene
from avatar_rt.pipeline.likeness import Likeness
from avatar_rt.pipeline.reference import encode_reference, offload_cache, read_motion, read_reference, to_video
from avatar_rt.prepared import SUFFIX, Reference
from avatar_rt.runtime.graph import Graphed
from avatar_rt.runtime.manifest import file_hash, open_bundle, shipped_bundle
from avatar_rt.runtime.trace import stage
from avatar_rt.runtime.tuning import Settings, tuning_for
from avatar_rt.runtime.turns import Turns
from avatar_rt.scene.articulation import Articulation, articulation
from avatar_rt.scene.image import blank_head, latent_mask
from avatar_rt.scene.matte import person_mattes, take_out
from avatar_rt.scene.performance import Performance, Pictures
from avatar_rt.session import Session

Path_ = str | os.PathLike[str]
M = TypeVar("M", bound=nn.Module)
MAX_REFERENCE_SECONDS = 10.0  # a longer clip is read no further
FRAGMENTED = (".mp4", ".mov")


def _bf16_is_native(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # The private query is the only one torch has for a CPU; without it fp32 is right everywhere.
    query = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(query and query())


def _load(module: M, path: Path, dtype: torch.dtype, device: torch.device) -> M:
    load_weights(module, path, dtype=dtype)
    return module.eval().requires_grad_(False).to(device)


def _compiled(dit: VideoRefDiT, how: str) -> Callable[..., Any]:
    if how == "graph":
        return Graphed(dit, fixed=("packed", "ref_k", "ref_v"))
    if how == "inductor":
        return torch.compile(dit)
    raise InputError(f"compile: expected graph, inductor or None, got {how!r}")


class AvatarEngine:
    """Weights and compiled callables of one bundle on one device. Thread-safe: sessions share it and own their state.

    Args:
        bundle: Bundle directory; None is the shipped ``tiny``.
        device: ``cpu`` or ``cuda[:n]``.
        dtype: Of the transformer; None is bf16 where the machine computes it natively, else fp32.
        compile: None runs recorded kernels on a CPU that has them, else the modules; ``graph`` replays the transformer
            as a CUDA graph; ``inductor`` puts torch.compile on it.
        tuning: File from ``python -m bench.tune`` on this very machine; None takes the bundle's ``tuning.json``.

    Raises: ArtifactError on a damaged bundle or another machine's tuning; UnsupportedError on a device that is not
        there.
    """

    def __init__(
        self,
        bundle: Path_ | None = None,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        tuning: Path_ | None = None,
        compile: str | None = None,
    ) -> None:
        try:
            self.device = torch.device(device)
        except RuntimeError:
            raise InputError(f"device: expected cpu or cuda[:n], got {device!r}") from None
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UnsupportedError(f"device {device}: torch {torch.__version__} sees no CUDA GPU here; use cpu")
        if self.device.type not in ("cpu", "cuda"):
            raise InputError(f"device: expected cpu or cuda[:n], got {device!r}")
        self.bundle = open_bundle(Path(bundle) if bundle is not None else shipped_bundle())
        self.settings = tuning_for(Path(tuning) if tuning is not None else None, self.bundle.path, self.device)
        self._apply(self.settings)
        cfg, parts = self.bundle.config, self.bundle.parts
        self.config = cfg
        self.turns = Turns()
        self.dtype = dtype or (torch.bfloat16 if _bf16_is_native(self.device) else torch.float32)
        fp32 = torch.float32
        with torch.device("meta"):
            dit, vae = VideoRefDiT(cfg.dit), VideoVAE(cfg.vae)
        self.dit = _load(dit, parts["dit"], self.dtype, self.device)
        self.vae = _load(vae, parts["vae"], fp32, self.device)
        # The recorded forms answer to everything that the modules do, so whoever is given one need not know.
        if compile is not None:
            self.dit = cast(VideoRefDiT, _compiled(self.dit, compile))
        elif refuses_guided(self.dit) is None:
            if self.settings.recorded_decoder and refuses_streamed(self.vae) is None:
                self.vae = cast(VideoVAE, StreamedVAE(self.vae))
            if self.settings.batched:
                self.dit = cast(VideoRefDiT, GuidedDiT(self.dit))
        self.speech = _load(SpeechEncoder(cfg.speech), parts["speech"], fp32, self.device)
        self.motion = _load(MotionEncoder(cfg.motion), parts["motion"], fp32, self.device)
        self.text = _load(TextEncoder(cfg.text), parts["text"], fp32, self.device) if "text" in parts else None

    @staticmethod
    def _apply(settings: Settings) -> None:
        """What a tuning file sets for the whole process."""
        if settings.threads:
            torch.set_num_threads(settings.threads)
        set_cpu_schedule(settings.linear_rows, settings.norm_rows, settings.spins)
        set_gpu_tiles(settings.attention_tiles)

    # ---- conditions ------------------------------------------------------------------------------------------------

    def embed_text(self, prompt: str = "") -> Tensor:
        """[1, S, D] context of a prompt. A bundle without a text encoder knows only the empty caption (zero rows)."""
        if self.text is not None:
            return self.text.encode([prompt])
        if prompt:
            raise UnsupportedError(f"text: bundle {self.config.name!r} has no text encoder, expected an empty prompt")
        return torch.zeros(1, self.config.text.length, self.config.text.dim, device=self.device)

    def encode_scene(self, image: np.ndarray, *, blank: bool = True) -> Scene:
        """A scene image uint8 [H, W, 3], cut to the model's shape, its head region blanked, as a latent."""
        cfg = self.config
        image = _fit(image, cfg.height, cfg.width)
        kept = np.ones(image.shape[:2], bool)
        if blank:
            image, kept = blank_head(image)
        latent = self._encode(image[None])
        mask = torch.from_numpy(latent_mask(kept, *cfg.latent_size)).to(self.device, torch.float32)
        return Scene(latent, mask[None, None, None])

    def _encode(self, pictures: np.ndarray) -> Tensor:
        """Pictures uint8 [1 + 4 k, height, width, 3] -> normalised latents [1, C, 1 + k, h, w], fp32."""
        return self.vae.normalize(self.vae.encode(to_video(pictures).to(self.device))[0].float())

    @torch.inference_mode()
    @stage("reference")
    def prepare(
        self,
        video: Path_ | np.ndarray,
        *,
        sound: np.ndarray | None = None,
        cropped: bool = False,
        consent: str | None = None,
        exact: bool = False,
        offload: bool = False,
    ) -> Reference:
        """Everything of a person that does not depend on a request: read, crop, encode, K/V. Done once.

        Args:
            video: A file, frames uint8 [F, H, W, 3] at 25 fps, or an .avref that ``Reference.save`` wrote.
            sound: fp32 [S] 16 kHz mono of given frames; a file brings its own.
            cropped: The frames are face-centred crops already.
            consent: Identifier of a consent record, kept with the reference.
            exact: Compute the K/V of an .avref again where it keeps them with loss.
            offload: Keep the K/V on the host; each block is copied to the device while the one before it is at work.

        Raises: InputError when there is no readable video or no face in it; ArtifactError on an .avref of another model
            or version, or one that is damaged.
        """
        cfg = self.config
        if not isinstance(video, np.ndarray) and Path(video).suffix.lower() == SUFFIX:
            return self._offloaded(self._load_reference(Path(video), exact), offload)
        clip_facts: dict[str, Any] = {}
        size = (cfg.height * cfg.output_scale, cfg.width * cfg.output_scale)
        if not isinstance(video, np.ndarray):
            clip = read_face(video, size[0], max_seconds=MAX_REFERENCE_SECONDS)
            crops, sound = clip.frames, clip.audio
            clip_facts = {"name": Path(video).name, "sha256": file_hash(Path(video))}
        else:
            crops = video if cropped else crop_face(video, track_face(video, name="the given frames"), size[0])
        frames = np.stack([_fit(f, cfg.height, cfg.width) for f in crops])
        fine = None
        if cfg.output_scale > 1 and min(crops.shape[1] / size[0], crops.shape[2] / size[1]) >= 1:
            fine = np.stack([_fit(f, *size) for f in crops])
        wave = normalise_loudness(sound, SAMPLE_RATE) if sound is not None and len(sound) else None
        context = read_reference(frames, wave, self.embed_text(), cfg, self.vae, self.speech, self.motion)
        cache = encode_reference(self.dit, context)
        scene = self.encode_scene(frames[0])
        clip_facts |= {"frames": len(frames), "seconds": len(frames) / FPS, "sound": wave is not None}
        made = Reference(
            context, cache, scene, frames, self.bundle.weights_hash, self.config_hash, consent, clip_facts, fine=fine
        )
        return self._offloaded(made, offload)

    @property
    def config_hash(self) -> str:
        """Of all of the configuration that a prepared reference depends on: chunks and sampling are left out."""
        plain = dataclasses.replace(
            self.config, name="", chunk=ChunkConfig(), sampling=SamplingConfig(), output_scale=1
        )
        return hashlib.sha256(plain.to_json().encode()).hexdigest()

    def _load_reference(self, path: Path, exact: bool) -> Reference:
        loaded = Reference.load(path, weights_hash=self.bundle.weights_hash, config_hash=self.config_hash)
        loaded = loaded.to(self.device)
        if loaded.cache.k.dtype == self.dtype and (loaded.exact or not exact):
            return loaded
        # Computed in another dtype, or kept with loss: level 1 is there to the bit.
        return dataclasses.replace(
            loaded, cache=encode_reference(self.dit, loaded.context), storage="", errors=(0.0, 0.0)
        )

    def _offloaded(self, reference: Reference, offload: bool) -> Reference:
        return dataclasses.replace(reference, cache=offload_cache(reference.cache)) if offload else reference

    @torch.inference_mode()
    @stage("reference.likeness")
    def likeness(self, reference: Reference, scene: np.ndarray | None, times: Sequence[float]) -> Likeness | None:
        """The reference's person as a guide for the solver at ``times``; None where there are none.

        In a scene uint8 [H, W, 3] that shows somebody, the guide is that picture with the reference's head; in an empty
        one, it is the person with all that is seen of them; without a scene, it is the reference as it is. None also of
        a model without this engine's motion stream, for by that a guide moves.
        """
        if not times or self.config.dit.motion_dim != FRAMES_PER_LATENT * len(MOTION_NAMES):
            return None
        cfg = self.config
        count = frames_of_latents((len(reference.frames) - 1) // FRAMES_PER_LATENT + 1)
        frames = reference.frames[:count]
        fine = reference.fine
        if fine is not None and fine.shape[1] != cfg.height * cfg.output_scale:  # of a bundle of another scale
            fine = None
        sizes = [Pictures(clip[:count]) for clip in (reference.frames, fine) if clip is not None]
        if scene is not None:
            sizes = _placed(sizes, scene)
        motion = ungroup_motion(read_motion(to_video(frames).to(self.device), self.motion))[0]
        poses = self.motion.denormalize(motion).cpu().numpy()
        performance = Performance(sizes[0], motion.float().cpu(), poses, self.articulation(reference), *sizes[1:])
        return Likeness(tuple(times), performance, self._encode)

    @torch.inference_mode()
    def articulation(self, reference: Reference) -> Articulation:
        """How the person's mouth answers their sound, see ``scene.articulation``; of a model without this engine's
        motion stream, as it is told."""
        context, jaw = reference.context, motion_index("jawOpen")
        if context.motion is None or self.config.dit.motion_dim != FRAMES_PER_LATENT * len(MOTION_NAMES):
            return Articulation(0.0, 1.0)
        read, heard = context.motion[0].float().unflatten(1, (FRAMES_PER_LATENT, -1))[..., jaw].flatten().cpu(), None
        if context.audio is not None:
            mouth = self.speech.heads(context.audio)["mouth"][0, :, 1 + MOUTH_COEFFICIENTS.index("jawOpen")]
            mean, std = (cast(Tensor, v)[jaw] for v in (self.motion.mean, self.motion.std))
            heard = ((mouth - mean) / std).float().cpu()
        return articulation(read, heard)

    # ---- generation ------------------------------------------------------------------------------------------------

    def session(
        self,
        reference: Reference,
        *,
        scene: Path_ | np.ndarray | None = None,
        prompt: str = "",
        seed: int = 0,
        steps: int | None = None,
        reference_scale: float | None = None,
        audio_scale: float | None = None,
        motion_scale: float | None = None,
        motion_audio_scale: float | None = None,
        reference_strength: float | None = None,
        likeness: Sequence[float] | None = None,
        use_cache: bool = True,
        queue_seconds: float | None = None,
        overlap: bool = True,
    ) -> Session:
        """A new stream. ``scene`` None: the reference's own; ``use_cache=False``: recompute the reference each pass.

        ``queue_seconds`` and ``overlap`` as of ``Session``.
        """
        if reference.weights_hash != self.bundle.weights_hash or reference.config_hash not in ("", self.config_hash):
            raise InputError("reference: it was prepared with other weights; prepare it again with this engine")
        given: dict[str, Any] = {
            "steps": steps, "reference_scale": reference_scale, "audio_scale": audio_scale,
            "motion_scale": motion_scale, "motion_audio_scale": motion_audio_scale,
            "reference_strength": reference_strength,
            "likeness": None if likeness is None else tuple(likeness),
        }  # fmt: skip
        sampling = dataclasses.replace(self.config.sampling, **{k: v for k, v in given.items() if v is not None})
        picture = read_image(scene) if isinstance(scene, str | os.PathLike) else scene
        place = reference.scene
        if picture is not None:
            with torch.inference_mode():
                place = self.encode_scene(picture)
        guide = self.likeness(reference, picture, sampling.likeness)
        late = self.articulation(reference).late
        return Session(self, reference, place, prompt, seed, sampling, use_cache, queue_seconds, overlap, guide, late)

    def generate(
        self,
        reference: Path_ | Reference,
        speech: Path_,
        output: Path_,
        *,
        seconds: float | None = None,
        resume: bool = False,
        fragmented: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
        **options: Any,
    ) -> Path:
        """Reference video (or .avref) and speech file in, talking video out, of any length in the same memory.

        The video grows in OUTPUT.part while it is made. What ``job.write_video`` says holds for what an unfinished run
        leaves; nothing is left when the input or the options turn out to be wrong.

        Args:
            seconds: Use only the first seconds of the speech.
            resume: Go on with an unfinished run of the same reference, speech and options.
            fragmented: Leave the file fragmented, as it grew; .mp4 and .mov only.
            progress: Called with (frames written, frames in all).
            options: As of ``session``.
        """
        output = check_output(output, FRAGMENTED if fragmented else EXTENSIONS)
        sound = SpeechFile(speech, seconds=seconds)
        if not isinstance(reference, Reference):
            reference = self.prepare(reference)
        session = self.session(reference, **options)
        size = (self.config.height * self.config.output_scale, self.config.width * self.config.output_scale)
        facts = self._facts(reference, options) | {"speech": file_hash(Path(speech)), "seconds": seconds}
        write_video(session, sound, output, size, facts, resume=resume, fragmented=fragmented, progress=progress)
        return output

    def _facts(self, reference: Reference, options: Mapping[str, Any]) -> dict[str, Any]:
        """All that the frames of a request follow from, besides its speech."""
        usual = {"seed": 0, "prompt": ""}
        plain = {k: v for k, v in options.items() if k not in ("scene", "use_cache", "queue_seconds", "overlap")}
        facts: dict[str, Any] = {k: v for k, v in plain.items() if v is not None and v != usual.get(k)}
        scene = options.get("scene")
        if isinstance(scene, np.ndarray):
            facts["scene"] = hashlib.sha256(scene.tobytes()).hexdigest()
        elif scene is not None:
            facts["scene"] = file_hash(Path(scene))
        config = hashlib.sha256(self.config.to_json().encode()).hexdigest()
        return facts | {
            "reference": reference.content, "weights": self.bundle.weights_hash, "config": config,
            "dtype": str(self.dtype), "device": self.device.type, "torch": torch.__version__, "way": self._way(),
        }  # fmt: skip

    def _way(self) -> str:
        """How the networks are run: ways differ by rounding, so a run goes on only the way it began."""
        mesh = getattr(getattr(self.dit, "spread", None), "mesh", None)
        ranks = f", {mesh.ulysses} x {mesh.ring} ranks" if mesh is not None else ""
        return f"{type(self.dit).__name__}, {type(self.vae).__name__}, {self.settings}{ranks}"


def _placed(sizes: list[Pictures], scene: np.ndarray) -> list[Pictures]:
    """A clip's pictures, the smallest first, with the person cut out and a scene uint8 [H, W, 3] to put them before:
    all of the person, or only the head where the scene shows somebody."""
    frames = sizes[0].frames
    mattes, somebody = person_mattes(frames), len(detect_faces(_fit(scene, *frames.shape[1:3]))) > 0
    out = []
    for of in sizes:
        picture = _fit(scene, *of.frames.shape[1:3])
        clip, shares = take_out(frames, mattes, of.frames)
        if somebody:
            shares = shares * ~blank_head(picture)[1]
        out.append(Pictures(clip, picture, shares))
    return out


def _fit(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cuts the middle of a picture uint8 [H, W, 3] to the shape and resizes it."""
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return image
    scale = min(h / height, w / width)
    ch, cw = max(round(height * scale), 1), max(round(width * scale), 1)
    top, left = (h - ch) // 2, (w - cw) // 2
    cut = np.ascontiguousarray(image[top : top + ch, left : left + cw])
    return cv2.resize(cut, (width, height), interpolation=cv2.INTER_AREA if scale > 1 else cv2.INTER_CUBIC)
