"""The reference's person in the solver's estimate: when, whose, how moving, in which place, and nothing else."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import small_bundle
import torch
import torch.nn.functional as F

from avatar_rt import AvatarEngine
from avatar_rt.config import SamplingConfig
from avatar_rt.errors import InputError
from avatar_rt.models.motion import FRAMES_PER_LATENT, MOTION_NAMES, motion_index, mouth_channels
from avatar_rt.pipeline.decode import decode_chunk, restore
from avatar_rt.pipeline.denoise import ChunkState, LatentChunk, settle, solve
from avatar_rt.pipeline.likeness import Guide, Likeness
from avatar_rt.pipeline.reference import to_video
from avatar_rt.prepared import Reference
from avatar_rt.scene.articulation import Articulation
from avatar_rt.scene.image import blank_head
from avatar_rt.scene.matte import person_mattes, place_person, take_out
from avatar_rt.scene.performance import LEAD, Performance, Pictures, Take

SIZE = len(MOTION_NAMES)
FRAMES = 17


def _encode(pictures: np.ndarray) -> torch.Tensor:
    """Latents that say which frames they are of: the first value of the last of each one's."""
    return torch.from_numpy(pictures[::4, :1, :1, 0].astype(np.float32)).view(1, 1, -1, 1, 1).expand(-1, 3, -1, 4, 4)


def _performance() -> Performance:
    """Of 17 frames, each of its own grey; poses far apart, but each near the one before."""
    frames = np.arange(FRAMES, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    motion = torch.zeros(FRAMES, SIZE)
    motion[:, motion_index("yaw")] = torch.arange(FRAMES) / 4.0
    return Performance(Pictures(frames), motion, motion.numpy(), Articulation(0.0, 1.0))


def _likeness(times: tuple[float, ...] = (0.8,)) -> Likeness:
    return Likeness(times, _performance(), _encode)


def _tokens(*latents: int) -> torch.Tensor:
    """[1, T, 4 M] as the reference moves in these of its latents."""
    return _performance().motion[1:].unflatten(0, (-1, FRAMES_PER_LATENT))[list(latents)].flatten(1)[None]


def _take(*heads: int) -> Take:
    """These frames, with their own mouths."""
    return Take(list(heads), list(heads), [None] * len(heads), torch.empty(0))


def test_a_step_starts_from_the_guide_and_keeps_the_noise() -> None:
    g = torch.Generator().manual_seed(1)
    clean, noise, led = (torch.randn(1, 3, 2, 4, 4, generator=g) for _ in range(3))
    m, m_noise, m_led = (torch.randn(1, 2, 8, generator=g) for _ in range(3))
    z, motion = torch.lerp(clean, noise, 0.9), torch.lerp(m, m_noise, 0.9)
    guide = Guide(led, m_led, lambda: np.zeros((8, 8, 8, 3), np.uint8))
    after, moving = guide.step(z, noise - clean, motion, m_noise - m, 0.9, 0.4)
    assert torch.allclose(after, torch.lerp(led, noise, 0.4), atol=1e-5)
    assert torch.allclose(moving, torch.lerp(m_led, m_noise, 0.4), atol=1e-5)


def test_a_guide_is_made_once_a_time_and_leads_to_the_last_of_them() -> None:
    lent, times = _likeness((0.9, 0.75, 0.3)), (1.0, 0.9, 0.8, 0.7, 0.5, 0.25, 0.1, 0.0)
    assert [lent.begins(a, b) for a, b in pairwise(times)] == [True, False, True, False, True, False, False]
    assert [lent.leads(a) for a in times[:-1]] == [True] * 5 + [False] * 2


def test_what_moves_as_the_reference_is_led_by_its_own_frames() -> None:
    lent = _likeness()
    guide = lent.guide(_tokens(1, 2), _tokens(0))
    assert guide.latents[0, 0, :, 0, 0].tolist() == [8, 12]  # the last frames of the reference's latents 1 and 2
    assert guide.pictures()[:, 0, 0, 0].tolist() == list(range(5, 13))
    assert torch.equal(guide.motion, _tokens(1, 2))
    assert lent.guide(_tokens(0)).latents[0, 0, :, 0, 0].tolist() == [4]  # nothing lies before its first


def test_after_what_is_carried_the_head_goes_on() -> None:
    lent = _likeness()
    still = torch.zeros(1, 1, FRAMES_PER_LATENT * SIZE)
    assert lent.guide(still, _tokens(0, 2)).latents[0, 0, 0, 0, 0] == 16  # latent 3, as latent 2 goes on
    assert lent.guide(still, _tokens(0)[:, :0]).latents[0, 0, 0, 0, 0] == 4


def test_the_mouth_is_what_is_told_and_all_else_the_references() -> None:
    lent, told = _likeness(), torch.randn(1, 2, FRAMES_PER_LATENT * SIZE, generator=torch.Generator().manual_seed(3))
    moved, mouth = lent.guide(told).motion, mouth_channels(told.shape[-1])
    assert torch.equal(moved[..., mouth], told[..., mouth])
    assert any(torch.equal(moved[..., ~mouth], _tokens(i, i + 1)[..., ~mouth]) for i in range(3))


def test_mouths_are_taken_from_where_they_are_as_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """As open as is told, in the measure of who reads them."""
    taken: list[tuple[int, int]] = []

    def put(frame: np.ndarray, pose: np.ndarray, other: np.ndarray, move: np.ndarray) -> np.ndarray:
        taken.append((int(frame[0, 0, 0]), int(other[0, 0, 0])))
        return other

    monkeypatch.setattr("avatar_rt.scene.performance.put_mouth", put)
    lent, jaw = dataclasses.replace(_performance(), mouth=Articulation(1.0, 2.0)), motion_index("jawOpen")
    lent.motion[:, motion_index("yaw")] = 0
    lent.motion[:, jaw] = torch.tensor([0.0, 0, 0, 0, 0, 3, 3, 3, 3, -3, -3, -3, -3, 0, 0, 0, 0])
    told = torch.zeros(1, FRAMES_PER_LATENT, SIZE)
    told[..., jaw] = 1
    told[0, 2, jaw] = -1.5
    take = lent.take(told)
    pictures, moved = lent.pictures(take), take.motion
    assert [p in range(5, 9) for p in pictures[LEAD:, 0, 0, 0]] == [True, True, False, True]
    assert pictures[LEAD + 2, 0, 0, 0] in range(9, 13) and taken
    assert torch.equal(moved, lent.motion[5:9][None])


@pytest.mark.parametrize("n", [0, 1])
def test_carried_latents_stay_as_they_are_and_the_model_ends_alone(n: int) -> None:
    cfg = dataclasses.replace(small_bundle.CONFIG.dit, latent_channels=3)
    lent = _likeness()
    z, motion = torch.randn(1, 3, 2, 4, 4), torch.randn(1, 2, FRAMES_PER_LATENT * SIZE)
    drift = torch.ones_like(z)

    def moving(rows, t, m, resting):
        return drift, torch.zeros_like(motion)

    solved = solve(moving, cfg, z, motion, [1.0, 0.7, 0.0], n, likeness=lent)
    assert solved is not None and solved.guide is not None
    out = solved.latents
    assert torch.equal(out[:, :, :n], z[:, :, :n])
    guide = lent.guide(motion[:, n:], motion[:, :n])
    wanted = torch.lerp(guide.latents, z[:, :, n:], 0.7) - 0.7
    assert torch.allclose(out[:, :, n:], wanted, atol=1e-5)
    assert np.array_equal(solved.guide.pictures(), guide.pictures())


def test_what_a_codec_lost_of_the_guide_is_put_back_where_the_video_is_still_it() -> None:
    rng = np.random.default_rng(0)
    guide = torch.from_numpy(rng.integers(100, 140, (3, 32, 32, 3), np.uint8))
    sharp = guide.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    blurred = F.avg_pool3d(sharp, (1, 5, 5), 1, (0, 2, 2), count_include_pad=False)
    blurred[..., 16:] += 1.0  # the model made something else of this half
    out = restore(blurred, guide)
    before, after = ((x - sharp).abs()[..., :8].mean() for x in (blurred, out))
    assert after < 0.1 * before
    assert torch.allclose(out[..., 24:], blurred[..., 24:], atol=1e-4)
    assert torch.allclose(restore(sharp, guide), sharp, atol=1e-6)


def test_a_guide_that_is_finer_makes_the_video_as_fine() -> None:
    rng = np.random.default_rng(0)
    guide = torch.from_numpy(rng.integers(100, 140, (3, 64, 64, 3), np.uint8))
    fine = guide.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    small = F.avg_pool3d(fine, (1, 2, 2))
    small[..., 16:] += 1.0
    out = restore(small, guide)
    assert out.shape == fine.shape
    assert (out - fine).abs()[..., :20].mean() < 0.01
    enlarged = F.interpolate(small[0].transpose(0, 1), scale_factor=2, mode="bicubic").transpose(0, 1)[None]
    assert torch.allclose(out[..., 48:], enlarged[..., 48:], atol=1e-4)


def test_the_last_pictures_of_a_guide_are_the_chunks(engine: AvatarEngine, reference: Reference) -> None:
    """A first chunk shows fewer frames than its latents stand for: those that lie before the video are left out."""
    z = torch.zeros(1, engine.config.vae.latent_channels, 2, *engine.config.latent_size)
    lead = FRAMES_PER_LATENT - 1
    plain = decode_chunk(engine.vae, LatentChunk(z, None, 0, lead), None)[0].frames
    guide = np.concatenate([np.zeros((lead, *plain.shape[1:]), np.uint8), plain.numpy() + np.uint8(3)])
    shown = decode_chunk(engine.vae, LatentChunk(z, None, 0, lead, guide), None)[0].frames
    assert (shown.int() - plain.int() - 3).abs().max() <= 1


def test_a_led_chunk_is_not_eased_in() -> None:
    chunk = dataclasses.replace(small_bundle.CONFIG.chunk, ease=0.5, steady=0.0)
    z, kept = torch.randn(1, 3, 4, 4, 4), torch.ones(1, 1, 1, 4, 4)
    state = dataclasses.replace(ChunkState(), level=torch.zeros(1, 3, 1, 4, 4))
    assert torch.equal(settle(z, 1, state, chunk, kept, led=True)[0], z)
    assert not torch.equal(settle(z, 1, state, chunk, kept)[0], z)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> AvatarEngine:
    sampling = dataclasses.replace(small_bundle.CONFIG.sampling, likeness=(0.8,))
    folder = tmp_path_factory.mktemp("likeness") / "bundle"
    return AvatarEngine(small_bundle.write_bundle(folder, spread=0.1, height=64, width=64, sampling=sampling))


@pytest.fixture(scope="module")
def reference(engine: AvatarEngine) -> Reference:
    rng = np.random.default_rng(0)
    return engine.prepare(rng.integers(0, 256, (19, 64, 64, 3), np.uint8), cropped=True)


def test_without_a_scene_the_guide_is_of_the_reference(engine: AvatarEngine, reference: Reference) -> None:
    lent = engine.likeness(reference, None, (0.8,))
    assert lent is not None and lent.times == (0.8,)
    clip = lent.performance
    assert np.array_equal(clip.small.frames, reference.frames[:17]) and clip.fine is None
    assert len(clip.motion) == len(clip.poses) == 17
    assert np.array_equal(clip.pictures(_take(3, 4)), reference.frames[3:5])
    part = reference.context.latents.shape[2]
    assert torch.allclose(clip.motion[1 : 4 * part + 1].reshape(1, part, -1), reference.context.motion, atol=1e-4)
    wanted = engine.vae.normalize(engine.vae.encode(to_video(reference.frames[:5]))[0].float())
    assert torch.allclose(lent.encode(reference.frames[:5]), wanted, atol=1e-5)
    assert engine.likeness(reference, None, ()) is None


@pytest.mark.parametrize("somebody", [False, True])
def test_in_a_scene_the_guide_is_the_person_before_it(
    engine: AvatarEngine, reference: Reference, monkeypatch: pytest.MonkeyPatch, somebody: bool
) -> None:
    """An empty place gets all of the person, a picture of somebody the head alone."""
    mattes = np.zeros((17, 64, 64), np.float32)
    mattes[:, 16:, 24:40] = 1
    monkeypatch.setattr("avatar_rt.engine.person_mattes", lambda frames: mattes[: len(frames)])
    monkeypatch.setattr("avatar_rt.engine.detect_faces", lambda picture: np.zeros((int(somebody), 5), np.float32))
    scene = np.full((128, 128, 3), 90, np.uint8)
    lent = engine.likeness(reference, scene, (0.8,))
    assert lent is not None
    clip, shares = take_out(reference.frames[:17], mattes, reference.frames[:17])
    part = shares * ~blank_head(scene[:64, :64])[1] if somebody else shares
    wanted = place_person(clip[5:9], part[5:9], scene[:64, :64])
    assert np.array_equal(lent.performance.pictures(_take(5, 6, 7, 8)), wanted)


@pytest.mark.parametrize("scale", [1, 2])
def test_videos_are_as_fine_as_the_clip_was(
    tmp_path: Path, engine: AvatarEngine, monkeypatch: pytest.MonkeyPatch, scale: int
) -> None:
    """A crop as large as the videos are is kept so, and its scene too; what the model sees is the same."""
    bundle = small_bundle.write_bundle(tmp_path / "bundle", spread=0.1, height=64, width=64, output_scale=scale)
    larger = AvatarEngine(bundle)
    clip = np.random.default_rng(0).integers(0, 256, (9, 128, 128, 3), np.uint8)
    scene = np.random.default_rng(1).integers(0, 256, (150, 200, 3), np.uint8)
    person, plain = larger.prepare(clip, cropped=True), engine.prepare(clip, cropped=True)
    assert np.array_equal(person.frames, plain.frames) and plain.fine is None
    monkeypatch.setattr("avatar_rt.engine.detect_faces", lambda picture: np.zeros((0, 5), np.float32))
    lent = larger.likeness(person, scene, (0.8,))
    assert lent is not None
    shown = lent.performance.finer(_take(2, 3, 4), 2)
    if scale == 1:
        assert person.fine is None and shown is None
        return
    assert person.fine is not None and np.array_equal(person.fine, clip)
    fine = lent.performance.fine
    assert shown.shape == (2, 128, 128, 3) and fine is not None and fine.mattes is not None
    colours, shares = take_out(person.frames[:9], person_mattes(person.frames[:9]), clip[:9])
    assert np.array_equal(fine.frames, colours) and np.array_equal(fine.mattes, shares)
    assert np.array_equal(shown, place_person(colours[3:5], shares[3:5], scene_of(scene, 128)))
    assert larger.prepare(clip[:, :100, :100], cropped=True).fine is None  # as large as the model sees, not as videos
    person.save(tmp_path / "person.avref")
    loaded = larger.prepare(tmp_path / "person.avref")
    assert loaded.fine is not None and np.array_equal(loaded.fine, clip) and loaded.content == person.content
    other = AvatarEngine(small_bundle.write_bundle(tmp_path / "other", spread=0.1, height=64, width=64))
    lent = other.likeness(dataclasses.replace(loaded, weights_hash=other.bundle.weights_hash), None, (0.8,))
    assert lent is not None and lent.performance.fine is None  # its videos are not so large


def scene_of(scene: np.ndarray, size: int) -> np.ndarray:
    """The middle of a picture 150 high, resized."""
    return cv2.resize(scene[:, 25:175], (size, size), interpolation=cv2.INTER_AREA)


def test_a_model_without_the_motion_stream_has_no_guide(tmp_path, reference: Reference) -> None:
    dit = dataclasses.replace(small_bundle.CONFIG.dit, motion_dim=0)
    engine = AvatarEngine(small_bundle.write_bundle(tmp_path / "bundle", dit=dit, height=64, width=64))
    assert engine.likeness(engine.prepare(reference.frames, cropped=True), None, (0.8,)) is None


def test_a_request_may_turn_it_off_or_move_it(engine: AvatarEngine, reference: Reference) -> None:
    assert engine.config.sampling.likeness == (0.8,)

    def frames(**options) -> np.ndarray:
        session = engine.session(reference, **options)
        session.push_audio(np.full(8000, 0.1, np.float32))
        session.end_audio()
        return np.concatenate(list(session.frames()))

    usual, off = frames(), frames(likeness=())
    assert np.array_equal(usual, frames(likeness=[0.8])) and np.array_equal(usual, frames(likeness=(0.8,)))
    assert not np.array_equal(usual, off)


@pytest.mark.parametrize("times", [(1.0,), (0.5, 0.0), (-0.1,)])
def test_a_time_that_is_none_is_refused(times: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="likeness: expected flow times between 0 and 1"):
        SamplingConfig(likeness=times)
