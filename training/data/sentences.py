"""Everyday English by the thousand, put together from lists."""

from __future__ import annotations

import zlib

import numpy as np

_WHO = (
    "I", "we", "they", "you", "my brother", "my sister", "our neighbour", "the teacher", "a friend of mine",
    "the baker", "the driver", "Maria", "George", "Peter", "the whole family", "the old captain", "her mother",
    "the new boss", "Sophie", "the doctor", "everyone", "nobody", "the boys", "my cousin", "the mayor", "the farmer",
)  # fmt: skip
_PAST = (
    "bought", "found", "forgot", "painted", "washed", "borrowed", "fixed", "lost", "brought", "moved", "cooked",
    "opened", "watched", "sold", "chose", "measured", "described", "wrapped", "ordered", "needed", "pushed",
    "showed me", "put away", "dropped", "picked up", "threw out", "would love", "never liked", "always wanted",
    "could not see",
)  # fmt: skip
_HOW = (
    "a small", "the big", "an old", "a shiny", "the broken", "a beautiful", "the yellow", "a heavy", "my favourite",
    "the cheapest", "a very good", "that purple", "the other", "a warm", "the smooth", "one more", "a wooden",
    "five new", "their own", "a bowl of", "two pairs of", "the first", "a funny", "a whole box of", "the very last",
)  # fmt: skip
_WHAT = (
    "boat", "apple pie", "bicycle", "photograph", "umbrella", "piano", "window", "map of the village",
    "wool blanket", "bottle", "garden chair", "telephone", "mushroom soup", "book about bees", "pair of shoes",
    "jumper", "coffee pot", "puzzle", "paper bag", "loaf of bread", "vase", "fishing rod", "mirror", "phone number",
    "movie", "bag of plums", "watch", "toy elephant", "blue van", "lamp", "oven", "poem", "vegetable soup",
    "house by the river",
)  # fmt: skip
_WHERE = (
    "in the kitchen", "at the market", "near the old bridge", "by the sea", "on the way home", "before breakfast",
    "after work", "in the middle of the night", "under the table", "for my birthday", "at half past four",
    "without asking", "on the roof", "in a hurry", "during the summer", "with both hands", "for almost nothing",
    "in the back of the shop", "every weekend", "just in time", "from the office", "over there", "with a smile",
    "twice this week", "if I remember rightly",
)  # fmt: skip
_OPEN = (
    "", "", "", "", "Well,", "Honestly,", "You know,", "By the way,", "Yes,", "No,", "Of course", "Maybe",
    "Last week", "Yesterday", "This morning", "To be fair,", "Believe me,", "Look,", "So", "In the end",
    "As far as I know,", "Oh,",
)  # fmt: skip
_ASK = (
    "Have you ever seen", "Do you remember", "Could you show me", "Would you mind moving", "Where did you put",
    "Who wants", "How much is", "What about", "Why not buy", "When will you bring back", "Can anybody find",
    "Should we fix",
)  # fmt: skip
_SAY = (
    "It will be {w} and {w} until {d}.", "The meeting is on {d} at {n} o'clock.", "We have {n} {p} and {n} {p}.",
    "My number is {n}, {n}, {n}, {n}.", "The train leaves at {n} {n}.", "It happened in {y}.",
    "On {d} it was {w} all day.", "Please call me back on {d}.", "That makes {n} pounds and {n} pence.",
    "She was born on the {o} of {m}, {y}.", "Turn left after {n} {p}, then keep going.",
    "I think {n} is more than enough.", "From {d} to {d} we are away.",
    "He counted {n}, {n}, {n}, and then stopped.", "The {o} of {m} is a {d}.",
    "Thank you very much, see you on {d}.",
)  # fmt: skip
_FILL = {
    "d": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "m": ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December"),
    "w": ("sunny", "cloudy", "warm", "foggy", "rainy", "windy", "mild", "bitterly cold", "muggy", "bright"),
    "p": ("houses", "sheep", "chairs", "plums", "pages", "miles", "bottles", "roads", "bubbles", "windows",
          "puppies"),
    "o": ("first", "second", "third", "fourth", "fifth", "tenth", "twelfth", "twentieth", "thirtieth"),
}  # fmt: skip
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def spell(number: int) -> str:
    """0..99 in words."""
    if number < 20:
        return _ONES[number]
    return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def is_held_out(sentence: str) -> bool:
    """Whether a sentence belongs to the tenth that training never hears."""
    return zlib.crc32(sentence.encode()) % 10 == 0


def make_sentence(rng: np.random.Generator, held_out: bool = False) -> str:
    """One sentence of about two to four seconds, of those for training or of those kept out of it.

    A held-out one has at least nine words: shorter ones are too few to be new in substance.
    """
    while True:
        sentence = _draw(rng)
        if is_held_out(sentence) == held_out and (not held_out or len(sentence.split()) >= 9):
            return sentence


def _draw(rng: np.random.Generator) -> str:
    kind = rng.random()
    if kind < 0.2:
        words = _pick(rng, _SAY)
        while "{" in words:
            key = words[words.index("{") + 1]
            if key == "n":
                value = spell(int(rng.integers(100)))
            elif key == "y":
                value = f"{_pick(rng, ('nineteen', 'twenty', 'eighteen'))} {spell(int(rng.integers(11, 100)))}"
            else:
                value = _pick(rng, _FILL[key])
            words = words.replace(f"{{{key}}}", value, 1)
        return words
    thing = f"{_pick(rng, _HOW)} {_pick(rng, _WHAT)}"
    if kind < 0.32:
        return f"{_pick(rng, _ASK)} {thing} {_pick(rng, _WHERE)}?"
    sentence = f"{_pick(rng, _OPEN)} {_pick(rng, _WHO)} {_pick(rng, _PAST)} {thing}".strip()
    if rng.random() < 0.75:
        sentence += f" {_pick(rng, _WHERE)}"
    if rng.random() < 0.25:
        sentence += (
            f", {_pick(rng, ('but', 'and', 'because', 'so', 'while'))} {_pick(rng, _WHO)} {_pick(rng, _PAST)} it"
        )
    return sentence[0].upper() + sentence[1:] + _pick(rng, (".", ".", ".", "!"))
