"""Frozen configurations. Every derived size is computed and checked here, once; presets are plain values."""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from typing import Any

from avatar_rt.errors import InputError

FPS = 25
SAMPLE_RATE = 16_000
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS
MOTION_CHANNELS = 62  # 52 ARKit coefficients, 3 rotation, 3 translation, 4 gaze


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise InputError(message)


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of VideoRefDiT. The defaults of the additions are "off": the class is then Wan 2.1's transformer.

    Attributes:
        dim, ffn_dim, num_heads, num_layers: Width, feed-forward width, heads, blocks.
        latent_channels: Channels of the VAE latent; also the output channels.
        mask_channels: Extra input channels (0, or 2: scene/anchor mask and carried-over mask).
        patch: Patch size in (time, height, width).
        text_dim, text_len: Width and padded length of the text context.
        freq_dim: Width of the sinusoidal timestep embedding.
        rope_spatial_stride: Height and width indices are multiplied by this (TAVR: 1.5).
        reference: Whether reference rows exist (type embedding, time offset).
        reference_pattern: What a reference row sees: ``full``, its own ``frame``, or a ``window`` of frames.
        reference_window: Radius in latent frames for ``window``.
        reference_rope_offset: Time index of the first reference frame.
        anchor: Whether scene/anchor rows exist (type embedding).
        anchor_concat: Whether the anchor is also concatenated, in channels, to every generated frame (as in Wan's I2V).
        audio_dim, reference_audio_dim: Widths of the speech features of the two sides; 0 is off.
        audio_per_latent: Speech features per latent frame (25 Hz over a 4x VAE: 4).
        audio_adapter_dim: Bottleneck of the reference-audio adapters on q, k and v; 0 is off.
        motion_dim: Width of one motion token (frames per latent x 62); 0 is off.
        prediction: What the heads' outputs are: the flow ``velocity`` (Wan), or ``preconditioned``, from which
            ``models.dit.velocity_of`` makes it; the model returns velocities either way.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    text_dim: int = 4096
    text_len: int = 512
    latent_channels: int = 16
    mask_channels: int = 0
    patch: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_spatial_stride: float = 1.0
    reference: bool = False
    reference_pattern: str = "full"
    reference_window: int = 1
    reference_rope_offset: int = 256
    anchor: bool = False
    anchor_concat: bool = False
    audio_dim: int = 0
    reference_audio_dim: int = 0
    audio_per_latent: int = 4
    audio_adapter_dim: int = 0
    motion_dim: int = 0
    prediction: str = "velocity"

    def __post_init__(self) -> None:
        for name in ("dim", "ffn_dim", "num_heads", "num_layers"):
            _check(getattr(self, name) > 0, f"{name}: expected more than 0, got {getattr(self, name)}")
        _check(
            self.dim % self.num_heads == 0, f"dim: expected a multiple of num_heads={self.num_heads}, got {self.dim}"
        )
        _check(self.head_dim % 2 == 0, f"dim: expected an even head size, got {self.head_dim}")
        _check(self.patch[0] == 1, f"patch: expected 1 in time, got {self.patch}")
        _check(
            self.prediction in ("velocity", "preconditioned"),
            f"prediction: expected velocity or preconditioned, got {self.prediction!r}",
        )
        _check(self.anchor or not self.anchor_concat, "anchor_concat: expected an anchor (anchor=True), there is none")
        patterns = ("full", "frame", "window")
        _check(
            self.reference_pattern in patterns,
            f"reference_pattern: expected one of {', '.join(patterns)}, got {self.reference_pattern!r}",
        )
        _check(
            bool(self.audio_dim) == bool(self.reference_audio_dim) or not self.reference,
            "reference_audio_dim: expected both sides' audio on, or both off",
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def in_channels(self) -> int:
        return self.latent_channels + self.mask_channels

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Head channels given to time, height and width (Wan 2.1: what is left, a third, a third)."""
        third = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * third, third, third


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the causal video VAE (Wan 2.1 lineage; stride (4, 8, 8); 1 + 4k frames).

    Attributes:
        base_dim, dim_mult, num_res_blocks: Widths per level and residual blocks per level.
        encoder_base_dim: Base width of the encoder where it differs from the decoder's (0: ``base_dim``).
        temporal_downsample: Per spatial downsampling, whether it also halves time.
        time_kernel: Kernel size in time per level (empty: 3 everywhere, as published).
        patch: Pixels folded into channels on each side before the first convolution (1 is off).
        latent_mean, latent_std: Per-channel statistics; normalised latents are (z - mean) / std.
    """

    base_dim: int = 96
    encoder_base_dim: int = 0
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latent_channels: int = 16
    patch: int = 1
    time_kernel: tuple[int, ...] = ()
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check(
            len(self.temporal_downsample) == len(self.dim_mult) - 1,
            f"temporal_downsample: expected {len(self.dim_mult) - 1} entries, got {len(self.temporal_downsample)}",
        )
        n = len(self.time_kernel)
        _check(n in (0, len(self.dim_mult)), f"time_kernel: expected 0 or {len(self.dim_mult)} entries, got {n}")
        for name in ("latent_mean", "latent_std"):
            n = len(getattr(self, name))
            _check(n in (0, self.latent_channels), f"{name}: expected 0 or {self.latent_channels} values, got {n}")

    @property
    def time_kernels(self) -> tuple[int, ...]:
        return self.time_kernel or (3,) * len(self.dim_mult)

    @property
    def spatial_stride(self) -> int:
        return self.patch * 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_stride(self) -> int:
        return 2 ** sum(self.temporal_downsample)


@dataclass(frozen=True)
class SpeechConfig:
    """Speech encoder: 16 kHz mono in, ``dim`` features at 25 Hz out."""

    dim: int = 128
    num_mels: int = 80
    hidden_dim: int = 128
    num_layers: int = 4
    num_phonemes: int = 40


@dataclass(frozen=True)
class MotionConfig:
    """Motion encoder: face crops [3, size, size] in, 62 motion channels per frame out."""

    size: int = 64
    base_dim: int = 32
    channels: int = MOTION_CHANNELS


@dataclass(frozen=True)
class TextConfig:
    """Text conditioning. ``buckets`` > 0: the shipped word-hash encoder; 0: the caller brings embeddings (UMT5)."""

    dim: int = 4096
    length: int = 512
    buckets: int = 0


@dataclass(frozen=True)
class ChunkConfig:
    """Chunking, in latent frames. A chunk is ``overlap`` clean latents of the one before, then new ones.

    ``steady`` is the share of what has crept into a chunk's level (``pipeline.schedule.level``) since the first chunk
    that is taken back; 0 is off. ``ease`` is the share of the step from the last carried latent to the first new one
    that is taken back there, its square at the next latent, and so on; 0 is off.

    ``lead_in``: a video begins with a latent like all others, whose first three frames lie before the sound and are not
    shown. Without it, it begins with the VAE's latent of one frame, as published models do; that one looks unlike every
    latent of the reference.
    """

    latents: int = 21
    overlap: int = 2
    steady: float = 1.0
    ease: float = 0.0
    lead_in: bool = False


@dataclass(frozen=True)
class SamplingConfig:
    """Defaults of a request: solver steps, flow shift, guidance scales (1 is off; inner guidance of the motion stream:
    0 is off), and the factor on the reference's attention weights (1 as trained, 0 as without a reference).

    ``carried_scale`` is the most that ``reference_scale`` may be in a chunk that continues another: its carried latents
    show the person already, and guidance towards the reference drives their colours further away chunk by chunk.
    ``motion_scale`` leads the picture away from the same person silent (``pipeline.schedule.guidance_passes``).
    ``motion_audio_scale`` is the motion stream's own guidance towards the speech, and then its only one; None: it is
    guided as the picture is. Its first noise is multiplied with ``motion_temperature``: less than 1 draws likelier
    motion. ``likeness`` are the flow times at which the estimate takes the reference's person (``pipeline.likeness``).
    """

    steps: int = 24
    shift: float = 5.0
    reference_scale: float = 1.0
    carried_scale: float = 1.0
    audio_scale: float = 1.0
    text_scale: float = 1.0
    motion_scale: float = 0.0
    motion_audio_scale: float | None = None
    motion_temperature: float = 1.0
    reference_strength: float = 1.0
    likeness: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check(
            all(0 < t < 1 for t in self.likeness), f"likeness: expected flow times between 0 and 1, got {self.likeness}"
        )
        _check(
            0 <= self.motion_temperature <= 1,
            f"motion_temperature: expected a number from 0 to 1, got {self.motion_temperature}",
        )


@dataclass(frozen=True)
class AvatarConfig:
    """All of a bundle: what ``config.json`` holds."""

    name: str
    height: int
    width: int
    dit: DiTConfig
    vae: VAEConfig
    speech: SpeechConfig = field(default_factory=SpeechConfig)
    motion: MotionConfig = field(default_factory=MotionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reference_latents: int = 5
    output_scale: int = 1

    def __post_init__(self) -> None:
        step = self.vae.spatial_stride * self.dit.patch[1]
        for axis in ("height", "width"):
            size = getattr(self, axis)
            _check(size > 0 and size % step == 0, f"{axis}: expected a multiple of {step}, got {size}")
        _check(
            0 <= self.chunk.overlap < self.chunk.latents,
            f"chunk.overlap: expected less than chunk.latents={self.chunk.latents}, got {self.chunk.overlap}",
        )
        _check(0 <= self.chunk.steady <= 1, f"chunk.steady: expected 0 to 1, got {self.chunk.steady}")

    @property
    def latent_size(self) -> tuple[int, int]:
        s = self.vae.spatial_stride
        return self.height // s, self.width // s

    @property
    def tokens_per_frame(self) -> int:
        h, w = self.latent_size
        return (h // self.dit.patch[1]) * (w // self.dit.patch[2])

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> AvatarConfig:
        """Raises InputError on text that is not a configuration."""
        try:
            raw = json.loads(text)
        except ValueError as e:
            raise InputError(f"config: expected JSON, got {e}") from None
        return _build(AvatarConfig, raw, "config")


_NESTED = {
    "dit": DiTConfig,
    "vae": VAEConfig,
    "speech": SpeechConfig,
    "motion": MotionConfig,
    "text": TextConfig,
    "chunk": ChunkConfig,
    "sampling": SamplingConfig,
}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON is of a field's type: int, float, bool, str, or a tuple of one of them."""
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        right_length = kinds[-1] is ... or (isinstance(value, tuple) and len(value) == len(kinds))
        return isinstance(value, tuple) and right_length and all(_fits(v, kinds[0]) for v in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _kind(kind: Any) -> str:
    return str(kind) if typing.get_origin(kind) else kind.__name__


def _build(cls: type, raw: Any, where: str) -> Any:
    _check(isinstance(raw, dict), f"{where}: expected an object, got {type(raw).__name__}")
    names = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(raw) - names)
    _check(not unknown, f"{where}: unknown key {', '.join(unknown)!r}, expected one of {', '.join(sorted(names))}")
    values, hints = {}, typing.get_type_hints(cls)
    for key, value in raw.items():
        if cls is AvatarConfig and key in _NESTED:
            values[key] = _build(_NESTED[key], value, f"{where}.{key}")
        else:
            values[key] = tuple(value) if isinstance(value, list) else value
            _check(_fits(values[key], hints[key]), f"{where}.{key}: expected {_kind(hints[key])}, got {value!r}")
    try:
        return cls(**values)
    except TypeError as e:
        raise InputError(f"{where}: {e}") from None


def latents_of_frames(num_frames: int) -> int:
    """Latent frames that hold ``num_frames`` video frames: 1 for the first frame, then one per four."""
    return 1 + -(-max(num_frames - 1, 0) // 4)


def frames_of_latents(num_latents: int) -> int:
    """Video frames that ``num_latents`` latent frames decode to: 1 + 4 (n - 1)."""
    return 1 + 4 * (num_latents - 1)


# fmt: off
_WAN_VAE = VAEConfig(
    latent_mean=(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                 0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    latent_std=(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)  # published with Wan 2.1's VAE

PRESETS: dict[str, AvatarConfig] = {
    "tiny": AvatarConfig(
        name="tiny", height=128, width=128, output_scale=2, reference_latents=16,
        dit=DiTConfig(dim=256, ffn_dim=448, num_heads=4, num_layers=5, text_dim=64, text_len=16, mask_channels=2,
                      rope_spatial_stride=2.0, reference=True, anchor=True, anchor_concat=True, audio_dim=128,
                      reference_audio_dim=128, audio_adapter_dim=8, motion_dim=4 * MOTION_CHANNELS,
                      prediction="preconditioned"),
        vae=VAEConfig(base_dim=32, encoder_base_dim=24, dim_mult=(1, 2, 4), num_res_blocks=1,
                      temporal_downsample=(True, True), patch=2, time_kernel=(1, 1, 1)),
        text=TextConfig(dim=64, length=16, buckets=512),
        chunk=ChunkConfig(latents=8, overlap=2, ease=0.55, lead_in=True),
        sampling=SamplingConfig(steps=12, shift=2.0, motion_temperature=0.4, likeness=(0.8, 0.5, 0.2)),
    ),
    "wan_1_3b": AvatarConfig(
        name="wan_1_3b", height=480, width=832, vae=_WAN_VAE,
        dit=DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, mask_channels=2, reference=True, anchor=True,
                      audio_dim=8192, reference_audio_dim=2048, audio_adapter_dim=256, motion_dim=4 * MOTION_CHANNELS),
    ),
    "tavr_14b": AvatarConfig(
        name="tavr_14b", height=480, width=896, vae=_WAN_VAE,
        dit=DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, mask_channels=2, rope_spatial_stride=1.5,
                      reference=True, anchor=True, audio_dim=8192, reference_audio_dim=2048, audio_adapter_dim=256),
        sampling=SamplingConfig(steps=24, shift=5.0, audio_scale=1.8, text_scale=5.0),
    ),
}
# fmt: on


def preset(name: str) -> AvatarConfig:
    """A preset by name. Raises InputError on an unknown one."""
    _check(name in PRESETS, f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
