"""Word-hash text encoder: stable ids, zero rows where there is no word, refusal where none is shipped."""

import pytest
import torch

from avatar_rt.config import TextConfig
from avatar_rt.errors import InputError, UnsupportedError
from avatar_rt.models.text import TextEncoder


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(TextConfig(dim=8, length=6, buckets=2048)).requires_grad_(False)


def test_ids_are_the_same_everywhere(encoder):
    assert encoder.tokenize("A woman, smiling").tolist() == [1604, 606, 1719, 0, 0, 0]


def test_case_and_punctuation_do_not_matter(encoder):
    assert torch.equal(encoder.tokenize("Red-haired MAN!"), encoder.tokenize("  red haired\tman "))


def test_long_captions_are_cut(encoder):
    ids = encoder.tokenize("one two three four five six seven eight")
    assert ids.shape == (6,) and (ids > 0).all() and (ids <= 2048).all()


def test_no_words_give_zeros(encoder):
    assert (encoder.encode(["", " ... "]) == 0).all()


def test_rows(encoder):
    rows = encoder.encode(["an old man"])
    assert rows.shape == (1, 6, 8)
    assert (rows[:, :3].abs().sum(-1) > 0).all() and (rows[:, 3:] == 0).all()
    swapped = encoder.encode(["old an man"])
    assert not torch.equal(rows[:, 0], swapped[:, 1]) and torch.equal(rows[:, 2], swapped[:, 2])


def test_refuses_where_embeddings_are_brought():
    with pytest.raises(UnsupportedError, match=r"pass UMT5 embeddings \[S <= 512, 4096\]"):
        TextEncoder(TextConfig())


def test_bad_ids(encoder):
    with pytest.raises(InputError, match=r"expected \[B, 6\], got \[1, 5\]"):
        encoder(torch.zeros(1, 5, dtype=torch.int64))
