"""One set of phonemes for every voice: silence and the 39 sounds of American English, and who spells them how.

Ids are positions in PHONEMES; 0 is silence. British vowels without a counterpart go to their nearest neighbour, sounds
of other languages to the one that looks most alike on the lips; a diphthong or an affricate that an engine writes as
one symbol stays one.
"""

from __future__ import annotations

PHONEMES: tuple[str, ...] = (
    "SIL",
    "AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW",
    "B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N", "NG", "P", "R", "S", "SH", "T", "TH", "V", "W", "Y",
    "Z", "ZH",
)  # fmt: skip

ID = {name: i for i, name in enumerate(PHONEMES)}
SILENCE = 0
VOWELS = frozenset(range(1, 16))

FLITE = {name.lower(): i for i, name in enumerate(PHONEMES)} | {
    "pau": 0,
    "ax": ID["AH"],
    "axr": ID["ER"],
    "h#": 0,
    "brth": 0,
}
"""flite's segment names."""

# Symbols of the international alphabet, longest first where one begins another.
_IPA = {
    "AA": ("ɑː", "ɑ", "ɒ", "aː"), "AE": ("æ", "a"), "AH": ("ʌ", "ə", "ɐ", "ᵊ", "ɤ"), "AO": ("ɔː", "ɔ", "oː"),
    "AW": ("aʊ", "W"), "AY": ("aɪ", "I"), "EH": ("ɛ", "e", "ɛə", "eə"),
    "ER": ("ɜː", "ɜ", "ɚ", "ɝ", "əɹ", "øː", "ø", "œ"), "EY": ("eɪ", "A", "eː"), "IH": ("ɪ", "ɨ", "ᵻ"),
    "IY": ("iː", "i", "iə"), "OW": ("oʊ", "əʊ", "O", "Q", "o"), "OY": ("ɔɪ", "Y"), "UH": ("ʊ", "ʊə", "ɵ"),
    "UW": ("uː", "u", "ʉː", "ʉ", "yː", "y", "ʏ"), "B": ("b",), "CH": ("tʃ", "ʧ"), "D": ("d", "ɾ"), "DH": ("ð",),
    "F": ("f",), "G": ("ɡ", "g", "ɣ", "ʁ", "ʀ"), "HH": ("h", "ɦ"), "JH": ("dʒ", "ʤ"), "K": ("k", "x", "χ"),
    "L": ("l", "ɫ", "ʎ"), "M": ("m",), "N": ("n", "ɲ"), "NG": ("ŋ",), "P": ("p",), "R": ("ɹ", "r", "ɻ"), "S": ("s",),
    "SH": ("ʃ",), "T": ("t", "ʔ"), "TH": ("θ",), "V": ("v", "ʋ", "β"), "W": ("w", "ʍ", "ɥ"), "Y": ("j", "ç", "ʝ"),
    "Z": ("z",), "ZH": ("ʒ",),
}  # fmt: skip
IPA = {symbol: ID[name] for name, symbols in _IPA.items() for symbol in symbols}
_LONGEST = max(map(len, IPA))
_MARKS = "ˈˌːˑ̩̯̃ʰʲ"


def from_ipa(text: str) -> int | None:
    """Id of the first sound in an IPA string, stress and length marks aside; None when it holds no sound."""
    clean = text.strip(_MARKS)
    for start in range(len(clean)):
        for length in range(min(_LONGEST, len(clean) - start), 0, -1):
            if clean[start : start + length] in IPA:
                return IPA[clean[start : start + length]]
    return None
