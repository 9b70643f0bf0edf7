"""One context, four correct answers: the summary of a Debian package, in one of four languages.

    python -m recipes.data.debian        # builds the folder if need be, prints its path on the last line
    python -m recipes.data.debian --weights .7 .1 .1 .1 --seed 1
    python -m recipes.data.debian --languages de      # no modes

The prompt is the English summary, the completion its translation by Debian's volunteers into French, German, Italian or
Danish. The column `language` says which; training must never see it: it is there to measure how purely each hypothesis
takes one language. Only summaries that have all four translations are used.

The texts are fetched by apt from the sources this machine is configured with, into a folder of their own: the system's
package lists are left alone, and no rights are needed. So the data depends on the release of Debian and on the day;
`SOURCE.md` in the folder says which. The split depends on the texts alone, never on the seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from recipes.data.cache import build_once, cache_root, sha256_of
from recipes.language import identify


SOURCE = "en"
TARGETS = ("fr", "de", "it", "da")
FOLDER = "debian-summaries"
TABLE_FOLDER, TABLE_FILE = "table", "table.jsonl"
BUILDER_VERSION = "2"
SPLITS = ("train", "validation", "test")
# Of the families; large ones are never held out, so this makes about 15 and 5 % of the contexts.
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.07
PROMPT = "Package summary: {}\nTranslation:\n"  # its last newline is a token of its own before any letter
HELPER = Path("/usr/lib/apt/apt-helper")
APT_LINES_SHOWN = 5
# The main archive gives about 8,000; far fewer means that most of a list is missing.
MIN_CONTEXTS = 1_000

# Most of what is above this is mostly English names; hardly any text above .5 is in the wrong language altogether.
CLEARLY = 0.7
SAME_WORDS = 0.7
MAX_HELD_OUT_FAMILY = 10
APPENDIX = re.compile(r"\s-+\s.*|\([^)]*\)")
# Parts of package names that say what kind of package it is, not whose.
GENERIC_PARTS = frozenset(
    {"aspell", "bioc", "cl", "cran", "debian", "driver", "education", "elpa", "fonts", "games", "gambas3", "gir"}
    | {"golang", "gstreamer", "haskell", "hunspell", "junior", "libapache2", "med", "mod", "myspell", "node", "perl"}
    | {"php", "printer", "python", "r", "ruby", "science", "task", "ttf", "wordlist", "xfonts"}
)

# #clear: what the machine's own configuration says about these would be added to.
APT_CONFIGURATION = """\
#clear Acquire::Languages;
Acquire::Languages {{ {languages} }};
Acquire::IndexTargets::deb::Packages::DefaultEnabled "false";
Acquire::Retries "3";
#clear APT::Update;
APT::Update::Error-Mode "any";
Dir::State::lists "{folder}/lists";
Dir::Cache "{folder}/cache";
"""


DATA_CARD = """# Summaries of Debian packages in five languages

`table.jsonl`: `source` is the English summary, `targets` its translations by the translators of the Debian Description
Translation Project, `family` tells near-duplicates. The texts are under the licences of their packages.

{origin}

Made by `python -m recipes.data.debian` of peft-mcl.
"""


@dataclass(frozen=True)
class Context:
    """One package summary and its translations.

    Args:
        group: Identifies the context: the first 12 hex digits of the SHA-256 of `source`.
        package: A package with this summary.
        family: The smallest `group` among its near-duplicates; a family is never in two splits.
        source: The English summary.
        targets: The translation by language.
    """

    group: str
    package: str
    family: str
    source: str
    targets: dict[str, str]


def prepare_dataset(
    languages: Sequence[str] = TARGETS,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> Path:
    """Return the folder with one setting of the data set, building it on the first call.

    It holds `train.jsonl`, `validation.jsonl` and `test.jsonl`, in which each context appears once, in a language drawn
    for it, and `train_all.jsonl`, `validation_all.jsonl` and `test_all.jsonl`, in which it appears once per language, in
    rows that follow each other. Each row has `prompt`, `completion`, `language` (the hidden mode) and `group` (the
    context). The contexts of a split are the same in every setting.

    Args:
        languages: Which of `fr`, `de`, `it`, `da`. A single one is a data set without modes.
        weights: How probable each of them is, in any unit. `None`: all the same.
        seed: Of the draw of languages and of the order of the rows.
        cache_dir: Cache folder; see `recipes.data.cache.cache_root`.

    Returns:
        The folder.

    Raises:
        ValueError: If `languages` or `weights` make no sense.
        RuntimeError: If this machine has no apt, apt cannot fetch the lists, they hold too few translations, or the
            package `py3langid` is missing.
    """
    shares = shares_of(languages, weights)
    table = prepare_table(cache_dir) / TABLE_FILE
    name = "-".join(f"{language}{share:.4g}" for language, share in shares.items()) + f"-seed{seed}"

    def build(folder: Path) -> None:
        for file, rows in make_splits(read_table(table), shares, seed).items():
            _write_lines(folder / f"{file}.jsonl", rows)

    # The table's content is part of the version, and so are shares that the folder's name rounds.
    version = f"{BUILDER_VERSION} {sha256_of(table)} {json.dumps(shares)}"
    return build_once(table.parents[1] / name, version, build)


def shares_of(languages: Sequence[str], weights: Sequence[float] | None) -> dict[str, float]:
    """Check the languages and weights of a setting.

    Args:
        languages: As `prepare_dataset` takes them.
        weights: As `prepare_dataset` takes them.

    Returns:
        The share of each language; they add up to 1.

    Raises:
        ValueError: If a language is unknown or repeated, or the weights are not one positive number for each.
    """
    if isinstance(languages, str) or not languages or not set(languages) <= set(TARGETS):
        raise ValueError(f"`languages` has to be a list of some of {', '.join(TARGETS)}, got {languages!r}.")
    if len(set(languages)) < len(languages):
        raise ValueError(f"`languages` names one more than once: {list(languages)}.")
    weights = [1.0] * len(languages) if weights is None else list(weights)
    if len(weights) != len(languages) or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(
            f"`weights` has to be one positive number for each of {', '.join(languages)}, got {weights}. To leave a "
            "language out, leave it out of `languages`."
        )
    return {language: weight / sum(weights) for language, weight in zip(languages, weights, strict=True)}


def prepare_table(cache_dir: str | Path | None = None) -> Path:
    """Return the folder with `table.jsonl`, all contexts with all translations, fetching them on the first call.

    Args:
        cache_dir: Cache folder; see `recipes.data.cache.cache_root`.

    Returns:
        The folder.

    Raises:
        RuntimeError: As `prepare_dataset` does.
    """
    return build_once(cache_root(cache_dir) / FOLDER / TABLE_FOLDER, BUILDER_VERSION, _build_table)


def _build_table(folder: Path) -> None:
    with fetched_lists((SOURCE, *TARGETS)) as (lists, origin):
        contexts = make_contexts({language: parse_summaries(text, language) for language, text in lists.items()})
    if len(contexts) < MIN_CONTEXTS:
        raise RuntimeError(
            f"The package lists hold only {len(contexts)} summaries with all of {', '.join(TARGETS)}, of about 8,000 in "
            f"Debian's main archive. They came from:\n{origin}\nAdd a source of Debian's component main to "
            "/etc/apt/sources.list."
        )
    _write_lines(folder / TABLE_FILE, map(vars, contexts))
    (folder / "SOURCE.md").write_text(DATA_CARD.format(origin=origin), encoding="utf-8", newline="\n")


def _write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8", newline="\n")


def read_table(path: Path) -> list[Context]:
    """Read the table that `prepare_table` has written.

    Args:
        path: The file `table.jsonl`.

    Returns:
        Its contexts.
    """
    return [Context(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


# --- fetching ---


@contextmanager
def fetched_lists(languages: Sequence[str]) -> Iterator[tuple[dict[str, str], str]]:
    """Fetch apt's lists of package descriptions into a temporary folder, and remove them afterwards.

    Args:
        languages: The languages to fetch, `en` among them.

    Yields:
        The text of all lists of each language, and a table of where they came from.

    Raises:
        RuntimeError: If this machine has no apt, or apt cannot fetch the lists.
    """
    if shutil.which("apt-get") is None or not HELPER.is_file():
        raise RuntimeError(
            f"The Debian summaries are fetched by apt, and this machine has no apt-get or no {HELPER}. Build the folder "
            f"on a Debian machine or in a container (debian:stable), and copy {cache_root() / FOLDER} from there."
        )
    with tempfile.TemporaryDirectory(prefix="peft-mcl-") as temporary:
        root = Path(temporary)
        root.chmod(0o755)  # as root, apt downloads as its own user, who has to get in
        for folder in ("lists/partial", "cache/archives/partial"):
            (root / folder).mkdir(parents=True)
        configuration = root / "apt.conf"
        names = " ".join(f'"{language}";' for language in languages)
        configuration.write_text(APT_CONFIGURATION.format(languages=names, folder=root))
        _apt(["apt-get", "update", "--quiet", "-c", str(configuration)])
        fields = ["$(LANGUAGE)", "$(FILENAME)", "$(SITE)", "$(RELEASE)", "$(COMPONENT)"]
        command = ["apt-get", "indextargets", "-c", str(configuration), "--format", "\t".join(fields)]
        targets = [line.split("\t") for line in _apt([*command, "Created-By: Translations"]).splitlines()]
        files = {language: [file for tag, file, *_ in targets if tag == language] for language in languages}
        lists = {
            language: _apt([str(HELPER), "cat-file", *paths]) if paths else "" for language, paths in files.items()
        }
        origin = "\n".join(f"- {site} {release}/{part}: {tag}" for tag, _, site, release, part in targets)
        yield lists, f"{origin}\n\nfetched on {date.today().isoformat()}"


def _apt(command: list[str]) -> str:
    environment = os.environ | {"LC_ALL": "C"}
    result = subprocess.run(command, capture_output=True, env=environment, check=False)
    if result.returncode == 0:
        return result.stdout.decode("utf-8")
    said = result.stderr.decode("utf-8", errors="replace").strip().splitlines()[-APT_LINES_SHOWN:]
    raise RuntimeError(
        f"`{' '.join(command[:2])}` failed while fetching Debian's package descriptions. It said:\n"
        + "\n".join(f"  {line}" for line in said or ["(nothing)"])
        + "\nCheck the network and the sources in /etc/apt (`apt-get update` has to work), and run this again."
    )


# --- reading ---


def parse_summaries(text: str, language: str) -> dict[str, tuple[str, str]]:
    """Read the summaries out of a list of package descriptions.

    Args:
        text: Paragraphs of `Package`, `Description-md5` and `Description-xx` fields, a blank line between them.
        language: The `xx`.

    Returns:
        The name of a package and its summary by the MD5 of the English description. The first one counts.
    """
    summaries: dict[str, tuple[str, str]] = {}
    for paragraph in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.split("\n") if line[:1] != " " and ": " in line)
        summary = " ".join(fields.get(f"Description-{language}", "").split())
        if summary and "Description-md5" in fields and "Package" in fields:
            summaries.setdefault(fields["Description-md5"], (fields["Package"], summary))
    return summaries


# --- choosing contexts ---


def make_contexts(summaries: Mapping[str, Mapping[str, tuple[str, str]]]) -> list[Context]:
    """Choose the contexts and find their families.

    Args:
        summaries: What `parse_summaries` returns, by language.

    Returns:
        The contexts, one for each English text, sorted by it.
    """
    complete = set(summaries[SOURCE]).intersection(*(summaries[language] for language in TARGETS))
    found: dict[str, tuple[str, dict[str, str]]] = {}
    # Of several packages with one English summary, the first by name that is usable.
    for _, key in sorted((summaries[SOURCE][key], key) for key in complete):
        package, source = summaries[SOURCE][key]
        targets = {language: summaries[language][key][1] for language in TARGETS}
        if source not in found and is_usable(source, targets):
            found[source] = (package, targets)
    for source in clearly_wrong({source: targets for source, (_, targets) in found.items()}):
        del found[source]
    sources = sorted(found)
    packages = [found[source][0] for source in sources]
    names = [hashlib.sha256(source.encode()).hexdigest()[:12] for source in sources]
    families: dict[int, str] = {}
    for members in find_families(sources, packages, [found[source][1] for source in sources]):
        families |= dict.fromkeys(members, min(names[i] for i in members))
    return [Context(names[i], packages[i], families[i], source, found[source][1]) for i, source in enumerate(sources)]


def is_usable(source: str, targets: Mapping[str, str]) -> bool:
    """Tell whether a summary is fit for the data set.

    Args:
        source: The English summary.
        targets: Its translations by language.

    Returns:
        True if all are translated, and the translations differ from each other.
    """
    texts = [_letters(text) for text in (source, *targets.values())]
    return all(texts) and len(set(texts)) == len(texts)


def clearly_wrong(targets: Mapping[str, Mapping[str, str]]) -> set[str]:
    """Find contexts with a translation that is in another language, English among them.

    Args:
        targets: Translations of each context, by language.

    Returns:
        The contexts with one that is identified as another language with a confidence above `CLEARLY`.
    """
    texts = [(key, language, text) for key, translations in targets.items() for language, text in translations.items()]
    found = identify((text for _, _, text in texts), (SOURCE, *TARGETS))
    return {
        key
        for (key, language, _), (other, confidence) in zip(texts, found, strict=True)
        if other != language and confidence > CLEARLY
    }


def _letters(text: str) -> str:
    return re.sub(r"[\W\d_]", "", text.casefold())


def find_families(
    sources: Sequence[str], packages: Sequence[str], targets: Sequence[Mapping[str, str]]
) -> list[list[int]]:
    """Group near-duplicates, which must not be in two splits.

    Two contexts are of one family if their packages are (`libfoo2-dev` and `foo-doc`), if their English summaries are
    the same but for numbers, marks and what follows a dash or stands in brackets, if those share most of their words, if
    a translation is the same but for numbers and marks, or if a chain of such pairs joins them.

    Args:
        sources: The English summaries.
        packages: A package with each of them.
        targets: Their translations.

    Returns:
        The positions of the members of each family.
    """
    parents = list(range(len(sources)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, (source, package, translations) in enumerate(zip(sources, packages, targets, strict=True)):
        keys = [("package", package_stem(package)), (SOURCE, _letters(APPENDIX.sub("", source)))]
        keys += [(language, _letters(text)) for language, text in translations.items()]
        for key in keys:
            if key[1]:
                parents[root(i)] = root(first.setdefault(key, i))
    for i, j in similar_pairs(sources):
        parents[root(i)] = root(j)
    families = defaultdict(list)
    for i in range(len(sources)):
        families[root(i)].append(i)
    return list(families.values())


def package_stem(package: str) -> str:
    """Name what a package belongs to.

    Args:
        package: Name of a binary package.

    Returns:
        The first part of the name that is not generic, without `lib` and the version: `foo` for `python3-foo2-doc`.
        The name itself if there is no such part.
    """
    parts = (re.sub(r"^lib|[\d.+]+$", "", part) for part in package.split("-"))
    return next((part for part in parts if part and part not in GENERIC_PARTS), package)


def similar_pairs(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Find the texts that share most of their words.

    Args:
        texts: The texts.

    Yields:
        Positions `i > j` of each pair whose sets of words have a Jaccard similarity of `SAME_WORDS` or more.
    """
    words = [frozenset(re.findall(r"[^\W\d_]+", text.casefold())) for text in texts]
    count = Counter(word for text in words for word in text)
    having = defaultdict(list)
    for i, text in enumerate(words):
        rarest = sorted(text, key=lambda word: (count[word], word))
        # Two texts that share so many words have one of these few in common.
        few = rarest[: len(rarest) - math.ceil(SAME_WORDS * len(rarest)) + 1]
        for j in sorted({j for word in few for j in having[word]}):
            if len(text & words[j]) >= SAME_WORDS * len(text | words[j]):
                yield i, j
        for word in few:
            having[word].append(i)


# --- splits ---


def make_splits(contexts: Sequence[Context], shares: Mapping[str, float], seed: int) -> dict[str, list[dict[str, str]]]:
    """Split the contexts by family and write them out as rows.

    Args:
        contexts: All contexts.
        shares: Share of each language, from `shares_of`.
        seed: Of the draw of languages and of the order of the rows.

    Returns:
        The rows of each file, by its name without `.jsonl`.
    """
    sizes = Counter(context.family for context in contexts)
    files: dict[str, list[dict[str, str]]] = {}
    for split in SPLITS:
        members = [context for context in contexts if split_of(context.family, sizes[context.family]) == split]
        members.sort(key=lambda context: _unit(f"order {seed} {context.group}"))
        files[split] = [_row(context, drawn_language(context.group, shares, seed)) for context in members]
        files[f"{split}_all"] = [_row(context, language) for context in members for language in shares]
    return files


def split_of(family: str, size: int) -> str:
    """Tell which split a family is in; it depends on the name alone, so that more data moves few families.

    Args:
        family: Name of the family.
        size: Number of its contexts.

    Returns:
        One of `SPLITS`. Large families are for training: held out, a few of them would decide the figures.
    """
    place = _unit(f"split {family}")
    if size > MAX_HELD_OUT_FAMILY or place >= TEST_SHARE + VALIDATION_SHARE:
        return "train"
    return "test" if place < TEST_SHARE else "validation"


def drawn_language(group: str, shares: Mapping[str, float], seed: int) -> str:
    """Draw a language for a context; the draw does not depend on the other contexts.

    Args:
        group: The context.
        shares: Share of each language.
        seed: Another seed, another draw.

    Returns:
        One of the languages.
    """
    place = _unit(f"language {seed} {group}")
    for language, share in shares.items():
        place -= share
        if place < 0:
            return language
    return next(reversed(shares))  # the shares add up to a little less than 1


def _unit(key: str) -> float:
    # By hash: the same on every Python version, and for a context whatever else is in the data.
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def _row(context: Context, language: str) -> dict[str, str]:
    return {
        "prompt": PROMPT.format(context.source),
        "completion": context.targets[language],
        "language": language,
        "group": context.group,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the folder with one setting of the data set.")
    parser.add_argument("--languages", nargs="+", default=list(TARGETS), help="Some of fr, de, it, da.")
    parser.add_argument(
        "--weights", nargs="+", type=float, help="How probable each language is; default: all the same."
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the draw of languages and of the order of the rows.")
    arguments = parser.parse_args()
    print(prepare_dataset(arguments.languages, arguments.weights, arguments.seed))


if __name__ == "__main__":
    main()
