"""Speech encoder: alignment, the promised field of view, pieces equal to the whole, errors."""

import numpy as np
import pytest
import torch

from avatar_rt.config import SpeechConfig
from avatar_rt.errors import InputError
from avatar_rt.models.motion import ARKIT_NAMES
from avatar_rt.models.speech import MOUTH_COEFFICIENTS, SpeechEncoder, mel_filters


@pytest.fixture(scope="module")
def encoder() -> SpeechEncoder:
    torch.manual_seed(0)
    return SpeechEncoder(SpeechConfig(hidden_dim=32, dim=16)).eval().requires_grad_(False)


def _sound(samples: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, samples, generator=torch.Generator().manual_seed(3)) * 0.1


@pytest.mark.parametrize("samples, frames", [(640, 1), (1279, 1), (1280, 2), (20 * 640 + 17, 20)])
def test_shape_and_scale(encoder, samples, frames):
    features = encoder(_sound(samples, 2))
    assert features.shape == (2, frames, 16) and features.dtype == torch.float32
    assert torch.allclose(features.square().mean(-1), torch.ones(2, frames), atol=0.01)


def test_sees_exactly_its_context(encoder):
    wave, i = _sound(40 * 640), 20
    left, right = encoder.context
    feature = encoder(wave)[:, i]
    far = wave.clone()
    far[:, : i * 640 - left] = float("nan")
    far[:, (i + 1) * 640 + right :] = float("nan")
    assert torch.equal(encoder(far)[:, i], feature)
    for edge in (i * 640 - left + 40, (i + 1) * 640 + right - 40):
        near = wave.clone()
        near[:, edge] += 5.0
        assert not torch.equal(encoder(near)[:, i], feature)


def test_context_stays_within_nine_frames_back_and_five_ahead():
    left, right = SpeechEncoder(SpeechConfig()).context
    assert left <= 9 * 640 and right <= 5 * 640


def test_pieces_with_context_equal_the_whole(encoder):
    wave = _sound(50 * 640)
    left, right = encoder.context
    whole = encoder(wave)
    padded = torch.nn.functional.pad(wave, encoder.context)
    pieces = [
        encoder(padded[:, a * 640 : b * 640 + left + right], has_context=True)
        for a, b in ((0, 7), (7, 8), (8, 31), (31, 50))
    ]
    assert (torch.cat(pieces, 1) - whole).abs().max() <= 1e-5


def test_one_frame_later_in_sound_is_one_frame_later_in_features(encoder):
    wave = _sound(40 * 640)
    late = torch.nn.functional.pad(wave, (640, 0))
    assert (encoder(late)[:, 1:] - encoder(wave)).abs().max() <= 1e-5


def test_silence_is_finite(encoder):
    assert encoder(torch.zeros(1, 6400)).isfinite().all()


def test_heads(encoder):
    read = encoder.heads(encoder(_sound(6400, 2)))
    assert read["phonemes"].shape == (2, 10, 40)
    assert read["mouth"].shape == (2, 10, 1 + len(MOUTH_COEFFICIENTS))
    assert set(MOUTH_COEFFICIENTS) <= set(ARKIT_NAMES)


def test_mel_filters_cover_the_band():
    filters = mel_filters(80)
    assert filters.shape == (257, 80)
    assert torch.allclose(filters.sum(0), torch.ones(80))
    assert (filters[1:256].sum(1) > 0).all()


def test_size_of_the_shipped_encoder():
    parameters = sum(p.numel() for p in SpeechEncoder(SpeechConfig()).parameters())
    assert parameters * 2 <= 2_000_000


@pytest.mark.parametrize(
    "wave, has_context, sentence",
    [
        (torch.zeros(6400), False, r"expected \[B, at least 640 samples\], got \[6400\]"),
        (torch.zeros(1, 639), False, r"at least 640 samples\], got \[1, 639\]"),
        (torch.zeros(1, 8000), True, r"at least 8560 samples\], got \[1, 8000\]"),
    ],
)
def test_bad_input(encoder, wave, has_context, sentence):
    with pytest.raises(InputError, match=sentence):
        encoder(wave, has_context=has_context)


def test_speed_change_moves_the_labels_with_the_sound():
    from training.methods.augment import change_speed

    wave = torch.zeros(2, 20 * 640)
    wave[:, 10 * 640 + 320] = 1.0
    out, position = change_speed(wave, torch.tensor([0.8, 1.25]))
    for row in range(2):
        click = int(out[row].argmax())
        assert abs(float(position[row, click // 640]) - 10.0) <= 0.7


class _Clips:
    """Two clips of noise with labels, as a corpus gives them."""

    def __len__(self) -> int:
        return 2

    def audio(self, clip: int, start: int, count: int) -> np.ndarray:
        return np.random.default_rng(clip).integers(-3000, 3000, count * 640).astype(np.int16)

    def phonemes(self, clip: int, start: int, count: int) -> np.ndarray:
        return np.full(count, clip, np.int16)

    def motion(self, clip: int, start: int, count: int) -> np.ndarray:
        return np.full((count, 62), 0.25 * clip, np.float32)

    def mouth(self, clip: int, start: int, count: int) -> np.ndarray:
        return np.full(count, 0.1 * clip, np.float32)


def test_training_step_and_export(tmp_path):
    from safetensors.torch import load_file

    from training.methods.encoders import SpeechMethod, mouth_of_phonemes

    phonemes = np.array([0] * 5 + [1] * 10 + [-100] * 3, np.int64)
    recording = (torch.randn(18 * 640) * 0.1, torch.from_numpy(phonemes), mouth_of_phonemes(phonemes))
    method = SpeechMethod(
        SpeechConfig(hidden_dim=16, dim=8), _Clips(), _Clips(), [recording], [recording], frames=24, batch=4
    )
    losses = [method.step(0, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert losses[0]["loss"].isfinite() and torch.equal(losses[0]["loss"], losses[1]["loss"])
    losses[0]["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.module.parameters())
    with torch.no_grad():
        assert 0 <= method.validate(0, tmp_path)["accuracy_recorded"] <= 1
    method.export(tmp_path)
    state = load_file(tmp_path / "speech.safetensors")
    assert state["out.weight"].dtype == torch.bfloat16 and state["mel.filters"].dtype == torch.float32
    SpeechEncoder(method.module.cfg).load_state_dict(state)


def test_mouth_of_recorded_phonemes_opens_on_vowels_and_is_unknown_beside_gaps():
    from training.data.phonemes import ID
    from training.methods.encoders import mouth_of_phonemes

    phonemes = np.array([0] * 10 + [ID["AA"]] * 10 + [0] * 10 + [-100] * 5, np.int64)
    jaw = mouth_of_phonemes(phonemes)[:, 1 + MOUTH_COEFFICIENTS.index("jawOpen")]
    assert jaw[11:14].min() > 0.4 and jaw[:4].max() < 0.05
    assert jaw[30:].isnan().all() and jaw[:25].isfinite().all()
