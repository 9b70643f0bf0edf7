"""Texts as words, for the figures that are counted here and for those of libraries whose own words are English only."""

from __future__ import annotations

import unicodedata
from collections import Counter

import regex


# Scripts that are written without spaces: each letter counts as a word, as is usual for BLEU on Chinese and Japanese.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# Marks belong to the letter before them, or words of Hindi and of decomposed accents would break in the middle.
_WORD = regex.compile(rf"(?V1)[{_UNSPACED}]\p{{M}}*|[[\w\p{{M}}]--[{_UNSPACED}]]+")


def words(text: str) -> list[str]:
    """The words of a text: runs of letters and digits in lower case, composed (NFC); punctuation and symbols are dropped.

    An apostrophe parts words ("l'eau" is two). Scripts without spaces give one word for each letter.
    """
    return _WORD.findall(unicodedata.normalize("NFC", text.lower()))


def ngrams(tokens: list[str], order: int) -> Counter[tuple[str, ...]]:
    """How often each run of `order` words occurs."""
    return Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))
