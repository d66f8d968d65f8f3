"""Speech with exact phoneme times, from three synthesizers, cut to a clip's length.

hibari-tts 0.2.1 (Apache-2.0; its own English voice), flite (CMU, BSD-like; Debian's flite) and espeak-ng
(GPL-3.0-or-later, a separate process; see espeak.py). The two Debian programs are used by the corpus commands only.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from avatar_rt.errors import UnsupportedError
from training.data.espeak import Espeak
from training.data.languages import LANGUAGES, make_foreign_sentence
from training.data.phonemes import FLITE, ID, SILENCE, VOWELS, from_ipa
from training.data.sentences import make_sentence

RATE = 16000
FPS = 25
SAMPLES_PER_FRAME = RATE // FPS

ACCENTS = ("en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
FEMALE = (
    "f1", "f2", "f3", "f5", "Annie", "Alicia", "Andrea", "belinda", "steph", "steph3", "anika", "aunty", "shelby",
)  # fmt: skip
MALE = (
    "m1", "m2", "m4", "m5", "m7", "adam", "Alex", "Andy", "benjamin", "boris", "caleb", "david", "ed", "edward",
    "Gene", "Hugo", "john", "klatt", "klatt2", "Lee", "max", "Michael", "Mike", "paul", "quincy", "rob", "robert",
    "travis", "victor", "zac",
)  # fmt: skip
HELD_OUT = {"female": (("espeak", "f4"), ("espeak", "linda"), ("espeak", "steph2")),
            "male": (("flite", "rms"), ("espeak", "m3"), ("espeak", "klatt4"))}  # fmt: skip
"""Voices that the training corpus never uses; the held-out cases use no other."""

FOREIGN = 0.3  # of espeak's voices
# How far an engine's times lie behind its sound, seconds; measured where the energy of vowels and hisses fits best.
_BEHIND = {"hibari": 0.065, "flite": 0.0, "espeak": 0.015}
_HIBARI_DURATIONS = "/Clip_output_0"  # frames of 25 ms per symbol, inside hibari's graph


@dataclass(frozen=True)
class Voice:
    """Who speaks and how.

    Attributes:
        engine: "hibari", "flite" or "espeak"; name: the engine's voice, without the accent.
        accent: of English, or a language of languages.py, which is then spoken; espeak's only.
        rate: pace, 1 is the engine's own; pitch, spread: espeak's settings, 0..99.
        formant: factor on all frequencies, by resampling; the pace is kept.
    """

    engine: str
    name: str
    accent: str
    rate: float
    pitch: int
    spread: int
    formant: float

    @property
    def title(self) -> str:
        return f"{self.engine}:{self.name}:{self.accent}" if self.accent else f"{self.engine}:{self.name}"


@dataclass(frozen=True)
class Utterance:
    """float32 samples at 16 kHz and the sounds in them: (phoneme id, start, end) in seconds, silences included."""

    wave: np.ndarray
    phones: tuple[tuple[int, float, float], ...]
    text: str


def draw_voice(rng: np.random.Generator, sex: str, held_out: bool = False) -> Voice:
    """A voice for a face of ``sex``; one of HELD_OUT, or never one of them."""
    accent = str(rng.choice(ACCENTS))
    if held_out:
        engine, name = HELD_OUT[sex][int(rng.integers(len(HELD_OUT[sex])))]
    else:
        odds = (0.35, 0.2, 0.45) if sex == "female" else (0.2, 0.3, 0.5)
        engine = str(rng.choice(["hibari", "flite", "espeak"], p=odds))
        flite = ("slt",) if sex == "female" else ("awb", "kal", "kal16", "slt")
        names = {"hibari": ("heart",), "flite": flite, "espeak": FEMALE if sex == "female" else MALE}[engine]
        name = str(rng.choice(names))
    formant = float(np.exp(rng.normal(0, 0.06)))
    if sex == "male" and (engine == "hibari" or name == "slt"):
        formant = float(rng.uniform(0.72, 0.84))
    rate, pitch = float(rng.uniform(0.88, 1.18)), int(rng.integers(30, 70))
    spread = int(rng.integers(30, 80))
    if engine == "espeak" and not held_out and rng.random() < FOREIGN:  # the held-out cases speak English
        accent = str(rng.choice(LANGUAGES))
    return Voice(engine, name, accent if engine == "espeak" else "", rate, pitch, spread, formant)


def _end_with_sound(phones: list[tuple[int, float, float]], wave: np.ndarray) -> list[tuple[int, float, float]]:
    """Cuts the last sound where the voice has died away; engines let it run on into the silence."""
    loud = np.flatnonzero(np.abs(wave) > 0.03 * np.abs(wave).max())
    end = (loud[-1] / RATE if len(loud) else 0.0) + 0.02
    return [(p, a, min(b, end)) for p, a, b in phones if a < end]


class Speaker:
    """The synthesizers. Each is started when it is first needed."""

    def __init__(self) -> None:
        self._espeak = Espeak()
        self._hibari: Any = None
        self._durations: Any = None

    def say(self, voice: Voice, text: str) -> Utterance:
        """One utterance, the engine's lead-in and tail cut to 30 ms. Raises UnsupportedError without the engine."""
        pace = voice.rate / voice.formant  # resampling by ``formant`` speeds up by as much
        engines = {"hibari": self._say_hibari, "flite": self._say_flite, "espeak": self._say_espeak}
        wave, rate, phones = engines[voice.engine](
            voice, text, pace)  # fmt: skip
        wave = soxr.resample(wave.astype(np.float32), rate * voice.formant, RATE).astype(np.float32)
        behind, scale, whole = _BEHIND[voice.engine], voice.formant, len(wave) / RATE
        phones = [
            (p, max(a - behind, 0.0) / scale, min(max(b - behind, 0.0) / scale, whole)) for p, a, b in phones if b > a
        ]
        phones = _end_with_sound(phones, wave)
        sounding = [x for x in phones if x[0] != SILENCE]
        if not sounding:
            raise UnsupportedError(f"{voice.title} said nothing for {text!r}")
        start, end = max(sounding[0][1] - 0.03, 0.0), sounding[-1][2] + 0.03
        first = int(start * RATE)
        wave = wave[first : int(end * RATE)]
        level = np.sqrt(np.mean(wave**2)) + 1e-6
        moved = tuple((p, max(a - start, 0.0), min(b, end) - start) for p, a, b in phones if b > start and a < end)
        return Utterance(np.clip(wave * (0.08 / level), -0.99, 0.99), moved, text)

    def _say_espeak(
        self, voice: Voice, text: str, pace: float
    ) -> tuple[np.ndarray, int, list[tuple[int, float, float]]]:
        name = f"{voice.accent}+{voice.name}"
        samples, rate, events = self._espeak.say(text, name, round(165 * pace), voice.pitch, voice.spread)
        times = [t / 1000 for t, _ in events] + [len(samples) / rate]
        sounds = [from_ipa(symbol) for _, symbol in events]
        phones = [(SILENCE if s is None else s, times[i], times[i + 1]) for i, s in enumerate(sounds)]
        return samples / np.float32(32768), rate, phones

    def _say_flite(
        self, voice: Voice, text: str, pace: float
    ) -> tuple[np.ndarray, int, list[tuple[int, float, float]]]:
        if shutil.which("flite") is None:
            raise UnsupportedError("flite is not installed: install Debian's flite")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "said.wav"
            stretch = f"duration_stretch={1 / pace:.3f}"
            command = ["flite", "-voice", voice.name, "-psdur", "--setf", stretch, "-t", text, "-o", str(path)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            samples, rate = soundfile.read(io.BytesIO(path.read_bytes()), dtype="float32")
        phones, before = [], 0.0
        for word in said.split():
            name, _, end = word.rpartition(":")
            phones.append((FLITE.get(name, SILENCE), before, float(end)))
            before = float(end)
        return samples, rate, phones

    def _say_hibari(
        self, voice: Voice, text: str, pace: float
    ) -> tuple[np.ndarray, int, list[tuple[int, float, float]]]:
        if self._hibari is None:
            self._start_hibari()
        symbols = " ".join(self._hibari.phonemize(text))
        kept = [c for c in symbols if c in self._hibari.vocab]
        ids = np.array([self._hibari.ids(symbols)], np.int64)
        from hibari import dsp

        *parts, durations = self._durations.run(None, {"ids": ids, "speed": np.array([pace], np.float32)})
        samples = dsp.synth(*(p[0] for p in parts), np.random.default_rng(0))
        lengths = np.asarray(durations, np.float64).reshape(-1)[: len(kept) + 2]
        step = len(samples) / dsp.SR / lengths.sum()
        ends = np.cumsum(lengths) * step
        phones = [(SILENCE, 0.0, float(ends[0]))]
        for symbol, start, end in zip(["^", *kept, "$"], [0.0, *ends[:-1]], ends, strict=True):
            sound = from_ipa(symbol)
            if symbol in "ˈˌː^":  # a mark lasts as part of the sound beside it
                last = phones[-1]
                phones[-1] = (last[0], last[1], float(end))
            elif symbol == " ":  # between words the last sound dies away
                phones[-1] = (phones[-1][0], phones[-1][1], float(end)) if end - start < 0.08 else phones[-1]
                if end - start >= 0.08:
                    phones.append((SILENCE, float(start), float(end)))
            else:
                phones.append((SILENCE if sound is None else sound, float(start), float(end)))
        return samples, dsp.SR, phones

    def _start_hibari(self) -> None:
        """Opens the model once more with its durations as an output."""
        try:
            import hibari
            import onnx
            import onnxruntime
        except ImportError as e:
            raise UnsupportedError(
                f"hibari's voice needs hibari-tts, onnx and onnxruntime: no module {e.name}"
            ) from None
        self._hibari = hibari.Hibari()
        graph = onnx.load(self._hibari.model_path)
        graph.graph.output.append(onnx.helper.make_tensor_value_info(_HIBARI_DURATIONS, onnx.TensorProto.FLOAT, None))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._durations = onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def close(self) -> None:
        self._espeak.close()


def make_track(
    speaker: Speaker,
    voice: Voice,
    rng: np.random.Generator,
    frames: int,
    lead: float | None = None,
    held_out: bool = False,
) -> Utterance:
    """Sentences with pauses between them, cut to ``frames`` video frames; ``lead`` seconds of silence at first.

    The beginning may lie inside a sentence when ``lead`` is None. ``held_out`` chooses sentences that training
    never hears.
    """
    length = frames * SAMPLES_PER_FRAME
    wave = np.zeros(0, np.float32)
    phones: list[tuple[int, float, float]] = []
    texts: list[str] = []
    pause, skip = (rng.uniform(0.0, 0.4), rng.choice([0.0, rng.uniform(0.2, 1.2)])) if lead is None else (lead, 0.0)
    while len(wave) < length + int(skip * RATE):
        now = len(wave) / RATE
        wave = np.concatenate([wave, np.zeros(int(pause * RATE), np.float32)])
        phones.append((SILENCE, now, len(wave) / RATE))
        foreign = voice.accent in LANGUAGES
        sentence = make_foreign_sentence(voice.accent, rng) if foreign else make_sentence(rng, held_out)
        said = speaker.say(voice, sentence)
        now = len(wave) / RATE
        phones += [(p, a + now, b + now) for p, a, b in said.phones]
        wave = np.concatenate([wave, said.wave])
        texts.append(said.text)
        pause = rng.uniform(0.12, 0.55)
    first = int(skip * RATE)
    end = length / RATE
    moved = tuple((p, max(a - skip, 0.0), min(b - skip, end)) for p, a, b in phones if b > skip and a - skip < end)
    gain = float(np.exp(rng.normal(0, 0.35)))
    cut = wave[first : first + length] * gain
    cut = cut + rng.standard_normal(length).astype(np.float32) * np.float32(10 ** rng.uniform(-4.5, -3.2))
    return Utterance(np.clip(cut, -0.99, 0.99).astype(np.float32), moved, " ".join(texts))


def phonemes_of_frames(track: Utterance, frames: int) -> np.ndarray:
    """Id of the sound at the middle of each frame, int16 [frames]."""
    out = np.zeros(frames, np.int16)
    middles = (np.arange(frames) + 0.5) / FPS
    for phone, start, end in track.phones:
        out[(middles >= start) & (middles < end)] = phone
    return out


def loudness(track: Utterance, rate: int = 100) -> np.ndarray:
    """RMS over 30 ms, ``rate`` times a second, float64."""
    step = RATE // rate
    power = np.convolve(track.wave.astype(np.float64) ** 2, np.ones(480) / 480, mode="same")
    return np.sqrt(np.maximum(power[step // 2 :: step], 0))


def is_vowel(phone: int) -> bool:
    return phone in VOWELS


__all__ = ["FPS", "ID", "RATE", "Speaker", "Utterance", "Voice", "draw_voice", "is_vowel", "loudness", "make_track",
           "phonemes_of_frames"]  # fmt: skip
