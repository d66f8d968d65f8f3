"""Encoded clips: whole shards of known weights; table and stream give the same samples, a stream in a fixed order."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("webdataset", reason="the data extras are not installed: webdataset")

import webdataset
from test_corpus import fake_shard
from torch.utils.data import DataLoader

from avatar_rt.config import MOTION_CHANNELS, AvatarConfig, DiTConfig, MotionConfig, SpeechConfig, VAEConfig
from avatar_rt.errors import ArtifactError, InputError
from avatar_rt.models.motion import MotionEncoder
from avatar_rt.models.speech import SpeechEncoder
from avatar_rt.models.vae import VideoVAE
from avatar_rt.models.weights import save_weights
from training.data import latents
from training.data.corpus import Corpus
from training.data.shards import FOLDER, read_index, read_shard
from training.data.table import Stream, Table, collate, weight_maps

CFG = AvatarConfig(
    name="test", height=16, width=16, dit=DiTConfig(dim=16, ffn_dim=16, num_heads=2, num_layers=1),
    vae=VAEConfig(base_dim=4, dim_mult=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, True),
                  latent_channels=4, latent_mean=(0.5,) * 4, latent_std=(2.0,) * 4),
    speech=SpeechConfig(dim=6, num_mels=8, hidden_dim=8, num_layers=1), motion=MotionConfig(size=16, base_dim=8),
)  # fmt: skip
FRAMES = 5


def make_weights(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    folder.mkdir()
    parts = {"vae": VideoVAE(CFG.vae), "speech": SpeechEncoder(CFG.speech), "motion": MotionEncoder(CFG.motion)}
    for name, module in parts.items():
        save_weights(module, folder / f"{name}.safetensors", dtype=torch.float32)
    (folder / "config.json").write_text(CFG.to_json())
    return folder


def make_corpus(folder: Path, identities: int = 24) -> Path:
    """Two takes of each identity, in rendered shards of 16 clips."""
    clips = [(i, take) for i in range(identities) for take in range(2)]
    for k in range(0, len(clips), 16):
        fake_shard(folder / f"shard-{k // 16:05d}", clips[k : k + 16], frames=FRAMES, size=16, seed=k)
    return folder


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus with shards of at least ten clips, and the weights that encoded it."""
    weights = make_weights(tmp_path_factory.mktemp("w") / "weights")
    corpus = make_corpus(tmp_path_factory.mktemp("c"))
    encode(corpus, weights)
    return corpus, weights


class _Here:
    """In place of a process pool: the same calls, in this process."""

    def __init__(self, workers: int, start: Callable[..., None], args: tuple) -> None:
        start(*args)

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: object) -> None: ...

    def imap_unordered(self, call: Callable, items: list):
        return map(call, reversed(items))


def encode(corpus: Path, weights: Path, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents.multiprocessing, "get_context", lambda kind: type("Context", (), {"Pool": _Here}))
        return latents.build(corpus, weights, FRAMES, shard_clips=10, **options)


def table_of(corpus: Path, weights: Path | None = None) -> Table:
    return Table(corpus, MotionEncoder(CFG.motion), 8, weights=weights)


def test_shards_hold_whole_identities_and_plain_webdataset_reads_them(encoded: tuple[Path, Path]) -> None:
    corpus, weights = encoded
    index = read_index(corpus / FOLDER, weights)
    assert index.clips == 48 and [len(s.identities) for s in index.shards] == [10, 10, 10, 10, 8]
    assert all(all(s.paired) for s in index.shards) and index.shapes["latents"] == (2, 4, 4, 4)
    for shard in index.shards:
        others = {i for s in index.shards if s is not shard for i in s.identities}
        assert not others & set(shard.identities)
    url = str(corpus / FOLDER / index.shards[1].name)
    rows = list(webdataset.WebDataset(url, shardshuffle=False).decode())
    ours = list(read_shard(corpus / FOLDER, index.shards[1]))
    assert [r["__key__"] for r in rows] == [s.key for s in ours] and rows[0]["meta.json"] == ours[0].meta
    np.testing.assert_array_equal(rows[3]["latents.npy"], ours[3].latents)


def test_the_table_holds_what_the_encoders_make_of_the_corpus(encoded: tuple[Path, Path]) -> None:
    corpus, weights = encoded
    table, rendered = table_of(corpus, weights), Corpus(corpus, "all")
    assert table.latents.dtype == torch.float16 and table.motion.shape == (48, 2, 4 * MOTION_CHANNELS)
    assert set(table.val.tolist()) == {i for i, m in enumerate(table.meta) if m["identity"] % 20 == 0}
    assert len(table.train) + len(table.val) == 48
    for i in (0, 17, 47):
        assert [table.meta[j]["identity"] for j in table.siblings[i]] == [table.meta[i]["identity"]]
        row = int(np.flatnonzero(rendered.identity == table.meta[i]["identity"])[table.meta[i]["scene"]])
        encoder = latents.Encoder(CFG, weights)
        np.testing.assert_array_equal(table.latents[i].numpy(), encoder.video(rendered.frames(row)))
        wave = rendered.audio(row).astype(np.float32) / 32768
        np.testing.assert_array_equal(table.speech[i].numpy(), encoder.sound(wave))
        first = MotionEncoder(CFG.motion).normalize(torch.from_numpy(rendered.motion(row)[0])).clamp(-5, 5)
        torch.testing.assert_close(table.motion[i, 0], first.repeat(4))


def test_masks_cover_face_and_mouth() -> None:
    box = torch.tensor([[[16.0, 8.0, 48.0, 56.0]]])  # 4 x 6 latents of 8 pixels, in a picture of 8 x 10 latents
    face, mouth = weight_maps(box, 10, 8, 8)[0]
    assert face.shape == (10, 8) and face[4, 4] == 1 and face[0, 0] == 0 and face[9, 4] == 0
    assert mouth.sum() > 0 and (mouth <= face).all() and mouth[2].sum() == 0 and mouth[5].sum() > 0


def test_stream_and_table_give_the_same_samples(encoded: tuple[Path, Path]) -> None:
    corpus, weights = encoded
    table = table_of(corpus, weights)
    for split, rows in (("train", table.train.tolist()), ("val", table.val.tolist())):
        pairs = [p for batch in islice(Stream(corpus, 2, split=split, seed=3), len(rows) // 2) for p in batch]
        assert sorted(p.clip.key for p in pairs) == sorted(table.keys[i] for i in rows)  # one epoch, each clip once
        for pair in pairs:
            i, j = table.keys.index(pair.clip.key), table.keys.index(pair.reference.key)
            assert j in table.siblings[i]
            for name in ("latents", "speech", "scenes", "scene_masks"):
                np.testing.assert_array_equal(getattr(pair.clip, name), getattr(table, name)[i].numpy())
                np.testing.assert_array_equal(getattr(pair.reference, name), getattr(table, name)[j].numpy())
    batch = collate(pairs)
    assert batch["latents"].shape == (4, 2, 4, 4, 4) and len(batch["captions"]) == 4 and "ref_speech" in batch


def _keys(batches) -> list[list[tuple[str, str]]]:
    return [[(p.clip.key, p.reference.key) for p in batch] for batch in batches]


def test_a_stream_goes_on_where_it_stopped(encoded: tuple[Path, Path]) -> None:
    corpus, _ = encoded
    whole = _keys(islice(Stream(corpus, 4, seed=1, mix=2), 30))  # two epochs and more
    for position in (0, 1, 7, 10, 23):
        assert _keys(islice(Stream(corpus, 4, seed=1, mix=2, position=position), 30 - position)) == whole[position:]
    assert whole[:11] != whole[11:22] and whole != _keys(islice(Stream(corpus, 4, seed=2, mix=2), 30))


def test_ranks_and_workers_share_an_epoch_without_overlap(encoded: tuple[Path, Path]) -> None:
    corpus, _ = encoded
    read, together = {}, []
    for rank in range(2):
        stream = Stream(corpus, 1, seed=5, rank=rank, world=2)
        mine = np.random.default_rng([5, 0]).permutation(5)[rank::2]
        count = sum(len(stream._rows(stream.shards[k])) for k in mine)
        read[rank] = {p.clip.key for batch in islice(stream, count) for p in batch}
        together += read[rank]
    assert len(together) == len(set(together)) == 44 and not read[0] & read[1]

    def loaded(position: int) -> list[list[tuple[str, str]]]:
        stream = Stream(corpus, 2, seed=5, workers=2, position=position)
        return _keys(islice(DataLoader(stream, batch_size=None, num_workers=2), 9 - position))

    assert loaded(4) == loaded(0)[4:]
    with pytest.raises(InputError, match="at least 6 shards with train pairs, one per rank and worker, got 5"):
        Stream(corpus, 1, world=3, workers=2)
    with pytest.raises(InputError, match="expected 2 as the stream was told, got a DataLoader of 1"):
        next(iter(Stream(corpus, 1, workers=2)))


def test_encoding_goes_on_where_it_stopped_and_refuses_other_weights(tmp_path: Path) -> None:
    weights, corpus = make_weights(tmp_path / "weights"), make_corpus(tmp_path / "corpus", 12)
    encode(corpus, weights)
    folder = corpus / FOLDER
    files = {p.name: p.read_bytes() for p in folder.glob("*.tar")}
    raw = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**raw, "shards": raw["shards"][:1]}))  # broken off after a shard
    (folder / "clips-00001.tar").unlink()
    before = (folder / "clips-00000.tar").stat().st_mtime_ns
    index = encode(corpus, weights)
    assert {p.name: p.read_bytes() for p in folder.glob("*.tar")} == files and len(index.shards) == 3
    assert (folder / "clips-00000.tar").stat().st_mtime_ns == before  # not made twice

    other = make_weights(tmp_path / "other", seed=1)
    for call in (lambda: encode(corpus, other), lambda: table_of(corpus, other),
                 lambda: Stream(corpus, 1, weights=other)):  # fmt: skip
        with pytest.raises(ArtifactError, match=r"clips were encoded by other weights .*: encode the corpus again"):
            call()

    fresh = make_weights(tmp_path / "fresh", seed=1)  # the same VAE, another speech encoder
    (fresh / "vae.safetensors").write_bytes((weights / "vae.safetensors").read_bytes())
    old = table_of(corpus, weights)
    encode(corpus, fresh, speech_only=True)
    new = table_of(corpus, fresh)
    assert torch.equal(old.latents, new.latents) and not torch.equal(old.speech, new.speech)
    assert sorted(p.name for p in corpus.iterdir() if p.is_dir() and "shard" not in p.name) == [FOLDER]


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    weights, corpus = make_weights(tmp_path / "weights"), make_corpus(tmp_path / "corpus", 3)
    with pytest.raises(ArtifactError, match="holds no encoded clips"):
        table_of(corpus, weights)
    encode(corpus, weights)
    path = corpus / FOLDER / "clips-00000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-512])
    with pytest.raises(ArtifactError, match=rf"expected {len(whole)} bytes as in the index, got {len(whole) - 512}"):
        table_of(corpus, weights)
    path.write_bytes(b"\0" * len(whole))
    with pytest.raises(ArtifactError, match=r"clips-00000\.tar"):
        table_of(corpus, weights)
    (corpus / FOLDER / "index.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"index\.json: cannot be read"):
        table_of(corpus, weights)
    with pytest.raises(InputError, match=r"frames: expected 1 \+ 4k, got 6"):
        latents.build(corpus, weights, 6)
