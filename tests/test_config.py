"""Configurations: presets, JSON both ways, and one clear sentence for each thing that can be wrong."""

from __future__ import annotations

import dataclasses
import json

import pytest

from avatar_rt.config import (
    PRESETS,
    AvatarConfig,
    ChunkConfig,
    DiTConfig,
    SamplingConfig,
    VAEConfig,
    frames_of_latents,
    latents_of_frames,
    preset,
)
from avatar_rt.errors import AvatarError, InputError


@pytest.mark.parametrize("name", list(PRESETS))
class TestPresets:
    def test_json_round_trip(self, name: str) -> None:
        config = preset(name)
        again = AvatarConfig.from_json(config.to_json())
        assert again == config
        assert hash(again) == hash(config)  # lists became tuples everywhere

    def test_name(self, name: str) -> None:
        assert preset(name).name == name

    def test_is_frozen(self, name: str) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            preset(name).dit.dim = 1  # type: ignore[misc]

    def test_parts_fit_each_other(self, name: str) -> None:
        c = preset(name)
        assert c.dit.latent_channels == c.vae.latent_channels
        assert (c.dit.text_dim, c.dit.text_len) == (c.text.dim, c.text.length)
        assert c.vae.temporal_stride == 4
        assert c.vae.spatial_stride == 8
        assert sum(c.dit.rope_dims) == c.dit.head_dim
        assert all(d % 2 == 0 for d in c.dit.rope_dims)
        h, w = c.latent_size
        assert (h * 8, w * 8) == (c.height, c.width)
        assert c.tokens_per_frame == h * w // 4
        if c.dit.motion_dim:
            assert c.dit.motion_dim == c.vae.temporal_stride * c.motion.channels


def test_tiny_trains_on_its_own_encoders() -> None:
    c = preset("tiny")
    assert c.dit.audio_dim == c.speech.dim == c.dit.reference_audio_dim
    assert c.text.buckets > 0
    assert (c.motion.size, c.height, c.width) == (64, 128, 128)


def test_wan_rope_split() -> None:
    assert preset("wan_1_3b").dit.head_dim == 128
    assert preset("wan_1_3b").dit.rope_dims == (44, 42, 42)


BASE = AvatarConfig(
    name="base",
    height=64,
    width=64,
    dit=DiTConfig(dim=256, ffn_dim=768, num_heads=4, num_layers=2, reference=True, audio_dim=8, reference_audio_dim=8),
    vae=VAEConfig(dim_mult=(1, 2, 4), temporal_downsample=(True, True), patch=2),
    chunk=ChunkConfig(latents=10, overlap=2),
    sampling=SamplingConfig(shift=3.0),
)


def _changed(path: str, value: object) -> str:
    raw = json.loads(BASE.to_json())
    *parents, last = path.split(".")
    part = raw
    for key in parents:
        part = part[key]
    part[last] = value
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("colour", 1, "config: unknown key 'colour'"),
        ("dit.heads", 4, "config.dit: unknown key 'heads'"),
        ("vae.stride", 8, "config.vae: unknown key 'stride'"),
        ("dit", [1, 2], "config.dit: expected an object, got list"),
        ("vae", "small", "config.vae: expected an object, got str"),
        ("dit.dim", 255, "dim: expected a multiple of num_heads=4, got 255"),
        ("dit.dim", 252, "dim: expected an even head size, got 63"),
        ("dit.num_heads", 0, "num_heads: expected more than 0, got 0"),
        ("dit.dim", -256, "dim: expected more than 0, got -256"),
        ("height", 0, "height: expected a multiple of 16, got 0"),
        ("dit.patch", [2, 2, 2], r"patch: expected 1 in time, got \(2, 2, 2\)"),
        ("dit.reference_pattern", "all", "reference_pattern: expected one of full, frame, window, got 'all'"),
        ("dit.reference_audio_dim", 0, "reference_audio_dim: expected both sides' audio on, or both off"),
        ("vae.temporal_downsample", [True], "temporal_downsample: expected 2 entries, got 1"),
        ("vae.latent_mean", [0.0, 1.0], "latent_mean: expected 0 or 16 values, got 2"),
        ("vae.latent_std", [1.0], "latent_std: expected 0 or 16 values, got 1"),
        ("height", 60, "height: expected a multiple of 16, got 60"),
        ("width", 65, "width: expected a multiple of 16, got 65"),
        ("chunk.overlap", 10, "chunk.overlap: expected less than chunk.latents=10, got 10"),
        ("chunk.overlap", -1, "chunk.overlap: expected less than chunk.latents=10, got -1"),
    ],
)
def test_wrong_values(path: str, value: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        AvatarConfig.from_json(_changed(path, value))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "config: expected JSON"),
        ("{", "config: expected JSON"),
        ("[]", "config: expected an object, got list"),
        ("null", "config: expected an object, got NoneType"),
        ("3", "config: expected an object, got int"),
        ("{}", "config: .*missing"),
        ('{"name": "x"}', "config: .*missing"),
    ],
)
def test_text_that_is_no_configuration(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        AvatarConfig.from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("dit.ffn_dim", "wide", r"config.dit.ffn_dim: expected int, got 'wide'"),
        ("dit.ffn_dim", 2.5, r"config.dit.ffn_dim: expected int, got 2.5"),
        ("dit.num_heads", True, r"config.dit.num_heads: expected int, got True"),
        ("dit.reference", 1, r"config.dit.reference: expected bool, got 1"),
        ("dit.patch", None, r"config.dit.patch: expected tuple\[int, int, int\], got None"),
        ("dit.patch", {"a": 1}, r"config.dit.patch: expected tuple\[int, int, int\], got {'a': 1}"),
        ("dit.patch", [1, 2], r"config.dit.patch: expected tuple\[int, int, int\], got \[1, 2\]"),
        ("vae.dim_mult", [1, "2", 4], r"config.vae.dim_mult: expected tuple\[int, ...\], got \[1, '2', 4\]"),
        ("sampling.shift", "3", r"config.sampling.shift: expected float, got '3'"),
        ("name", 3, r"config.name: expected str, got 3"),
    ],
)
def test_a_value_of_the_wrong_type_is_one_sentence(path: str, value: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        AvatarConfig.from_json(_changed(path, value))


def test_a_whole_number_is_a_float() -> None:
    assert AvatarConfig.from_json(_changed("sampling.shift", 3)) == BASE


def test_unknown_preset() -> None:
    with pytest.raises(InputError, match="preset: expected one of tiny, wan_1_3b, tavr_14b, got 'huge'"):
        preset("huge")


def test_errors_share_a_base() -> None:
    assert issubclass(InputError, AvatarError)
    assert issubclass(InputError, ValueError)


def test_defaults_are_wan() -> None:
    dit = DiTConfig(dim=64, ffn_dim=128, num_heads=2, num_layers=1)
    assert dit.in_channels == dit.latent_channels == 16
    assert not (dit.reference or dit.anchor or dit.audio_dim or dit.motion_dim)
    assert VAEConfig().spatial_stride == 8
    assert VAEConfig().temporal_stride == 4
    assert 0 <= ChunkConfig().overlap < ChunkConfig().latents


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (2, 2), (5, 2), (6, 3), (9, 3), (77, 20), (81, 21), (82, 22)])
def test_latents_hold_frames(frames: int, latents: int) -> None:
    assert latents_of_frames(frames) == latents
    assert frames_of_latents(latents) >= frames
    assert frames_of_latents(latents - 1) < frames or latents == 1


def test_latents_and_frames_are_inverse() -> None:
    assert [latents_of_frames(frames_of_latents(n)) for n in range(1, 40)] == list(range(1, 40))
