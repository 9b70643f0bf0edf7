"""Tests of the Debian summaries and of language identification, on a few real summaries; the slow one asks apt."""

from __future__ import annotations

import json
import subprocess
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path

import pytest

from recipes.data import cache, debian
from recipes.language import identify


SUMMARIES = [
    ("wdiff", "Compares two files word by word", "Compare deux fichiers mots par mots",
     "Vergleicht zwei Dateien Wort für Wort", "comparazione di due file parola per parola",
     "Sammenligner to filer ord for ord"),
    ("qiv", "Quick image viewer for X", "visualisateur rapide d'images pour X", "Schneller Bildbetrachter für X",
     "veloce visualizzatore di immagini per X", "Hurtig billedfremviser for X"),
    ("bogofilter-bdb", "fast Bayesian spam filter (Berkeley DB)", "filtre bayésien rapide pour pourriels (Berkeley DB)",
     "Schneller bayesscher Spamfilter (Berkeley DB)", "filtro bayesiano veloce per la posta indesiderata (Berkeley DB)",
     "hurtigt bayesiansk spamfilter (Berkeley DB)"),
    ("splitvt", "run two programs in a split screen", "Exécute deux programmes dans un écran morcelé",
     "zwei Programme laufen in je einer Bildschirmhälfte", "esegue due programmi in uno schermo diviso",
     "Kør to programmer på en opdelt skærm"),
    ("rusers", "Displays who is logged in to machines on local network",
     "Affiche qui est connecté sur les machines d'un réseau local", "Zeigt an, wer auf Rechnern im lokalen Netzwerk angemeldet ist",
     "visualizza chi è connesso in una macchina della rete locale", "Viser hvem som er logget ind på maskiner på det lokale netværk"),
]  # fmt: skip
LANGUAGES = ("en", "fr", "de", "it", "da")


def listed(rows: list[tuple[str, ...]]) -> dict[str, dict[str, tuple[str, str]]]:
    """The rows as apt's lists hold them, read back."""
    lists = {}
    for language, texts in zip(LANGUAGES, list(zip(*rows, strict=True))[1:], strict=True):
        paragraphs = [
            f"Package: {row[0]}\nDescription-md5: {number:032x}\nDescription-{language}: {text}\n more: of it\n .\n end\n"
            for number, (row, text) in enumerate(zip(rows, texts, strict=True))
        ]
        lists[language] = debian.parse_summaries("\n".join(paragraphs), language)
    return lists


def changed(row: int, **texts: str) -> list[tuple[str, ...]]:
    names = ("package", *LANGUAGES)
    new = dict(zip(names, SUMMARIES[row], strict=True)) | texts
    return [*SUMMARIES, tuple(new[name] for name in names)]


def many_contexts(count: int = 2_000) -> list[debian.Context]:
    names = [f"{i:012x}" for i in range(count)]
    targets = [{language: f"{language} {name}" for language in debian.TARGETS} for name in names]
    # Families of one and of three in turn, and one of 40.
    family = [names[i - i % 4 + (i % 4 > 0)] if i >= 40 else names[0] for i in range(count)]
    return [debian.Context(*row) for row in zip(names, names, family, names, targets, strict=True)]


# --- languages ---


def test_identify_tells_the_real_summaries_apart():
    for row in SUMMARIES:
        assert [language for language, _ in identify(row[1:], LANGUAGES)] == list(LANGUAGES)
    assert all(0 < confidence <= 1 for _, confidence in identify(SUMMARIES[0][1:], LANGUAGES))
    # Danish is not a candidate here, so something else has to be said.
    assert identify([SUMMARIES[0][5]], ["fr", "it"])[0][0] in ("fr", "it")


@pytest.mark.parametrize("candidates", [["fr"], "fr", ["fr", "xx"]])
def test_identify_refuses_candidates_it_cannot_choose_from(candidates):
    with pytest.raises(ValueError, match="`candidates`"):
        identify(["texte"], candidates)


# --- contexts and families ---


def test_contexts_are_those_with_all_languages():
    lists = listed(SUMMARIES)
    del lists["it"][f"{1:032x}"]
    contexts = debian.make_contexts(lists)
    assert {context.package for context in contexts} == {row[0] for row in SUMMARIES} - {"qiv"}
    wdiff = next(context for context in contexts if context.package == "wdiff")
    assert wdiff.source == SUMMARIES[0][1]
    assert wdiff.targets == dict(zip(LANGUAGES[1:], SUMMARIES[0][2:], strict=True))


@pytest.mark.parametrize(
    "texts",
    [
        {"da": "Compares 2 two files, word by word!"},
        {"da": SUMMARIES[0][3]},
        {"da": "123"},
        {"fr": "Vergleicht zwei Dateien miteinander und zeigt die Unterschiede für jedes Wort"},
        {"it": "This compares the words of two files with each other"},
    ],
    ids=["untranslated", "two the same", "no letters", "in German", "in English"],
)
def test_bad_translations_are_dropped(texts):
    row = changed(0, **texts)[-1]
    contexts = debian.make_contexts(listed([*SUMMARIES[1:], row]))
    assert {context.package for context in contexts} == {other[0] for other in SUMMARIES[1:]}


def test_an_english_summary_is_used_once():
    contexts = debian.make_contexts(listed(changed(0, package="awdiff", fr="Compare des fichiers mot à mot")))
    assert len(contexts) == len(SUMMARIES)
    assert {context.package for context in contexts} >= {"awdiff"}


@pytest.mark.parametrize(
    ("row", "texts", "together"),
    [
        (0, {"package": "python3-wdiff2-doc", "en": "manual of a program for comparing texts"}, True),
        (2, {"package": "other", "en": "fast Bayesian spam filter 2 -- SQLite"}, True),
        (
            3,
            {"package": "other", "en": "run both programs at the same time in a window"},
            True,
        ),  # the same translations
        (4, {"package": "other", "en": "Displays users logged in to remote machines"}, False),
        (4, {"package": "other", "en": "Displays who is logged in to machines on a network"}, True),
    ],
    ids=["package", "appendix", "translation", "half the words", "most words"],
)
def test_families_join_near_duplicates(row, texts, together):
    own = {} if row == 3 else {language: f"{language} completely different" for language in debian.TARGETS}
    _, *rows = zip(*changed(row, **own, **texts), strict=True)
    packages = [summary[0] for summary in changed(row, **own, **texts)]
    targets = [dict(zip(debian.TARGETS, texts, strict=True)) for texts in zip(*rows[1:], strict=True)]
    families = debian.find_families(rows[0], packages, targets)
    assert sorted(i for family in families for i in family) == list(range(len(SUMMARIES) + 1))
    joined = [sorted(family) for family in families if len(family) > 1]
    assert joined == ([[row, len(SUMMARIES)]] if together else [])


def test_similar_pairs_are_those_of_brute_force():
    texts = [
        " ".join(word for word, bit in zip("abcdefgh", f"{i:08b}", strict=True) if bit == "1") for i in range(1, 256)
    ]
    words = [set(text.split()) for text in texts]
    expected = {
        (i, j)
        for i in range(len(texts))
        for j in range(i)
        if len(words[i] & words[j]) >= debian.SAME_WORDS * len(words[i] | words[j])
    }
    assert expected
    assert sorted(debian.similar_pairs(texts)) == sorted(expected)


# --- splits ---


def test_splits_keep_families_together_and_contexts_complete():
    contexts = many_contexts()
    files = debian.make_splits(contexts, debian.shares_of(debian.TARGETS, None), seed=0)
    family = {context.group: context.family for context in contexts}
    groups = {split: [row["group"] for row in files[split]] for split in debian.SPLITS}
    assert sorted(chain.from_iterable(groups.values())) == sorted(family)
    families = [{family[group] for group in members} for members in groups.values()]
    assert len(set().union(*families)) == sum(map(len, families))
    assert contexts[0].family in families[0]  # the large one is for training
    assert 0.15 < len(groups["test"]) / len(contexts) < 0.25
    for split in debian.SPLITS:
        every = files[f"{split}_all"]
        assert [row["group"] for row in every[::4]] == groups[split]
        for i in range(0, len(every), 4):
            assert [row["language"] for row in every[i : i + 4]] == list(debian.TARGETS)
            assert (
                len({row["prompt"] for row in every[i : i + 4]}) == len({row["group"] for row in every[i : i + 4]}) == 1
            )
        drawn = {(row["group"], row["language"]): row for row in every}
        assert all(row == drawn[row["group"], row["language"]] for row in files[split])


def test_rows_hide_the_language():
    for row in debian.make_splits(many_contexts(40), {"fr": 1.0}, seed=0)["train"]:
        assert set(row) == {"prompt", "completion", "language", "group"}
        assert row["prompt"] == f"Package summary: {row['group']}\nTranslation:\n"
        assert row["completion"] == f"fr {row['group']}"


def test_weights_are_kept_and_the_draw_depends_on_the_seed_and_the_context_alone():
    contexts = many_contexts()
    weights = [0.7, 0.1, 0.1, 0.1]
    shares = debian.shares_of(debian.TARGETS, [7, 1, 1, 1])
    assert list(shares.values()) == pytest.approx(weights)
    drawn = {seed: [debian.drawn_language(c.group, shares, seed) for c in contexts] for seed in (0, 1)}
    counts = Counter(drawn[0])
    assert [counts[language] / len(contexts) for language in debian.TARGETS] == pytest.approx(weights, abs=0.03)
    assert drawn[0] != drawn[1]
    files = {seed: debian.make_splits(contexts, shares, seed) for seed in (0, 1)}
    assert files[0] == debian.make_splits(contexts[::-1], shares, 0)
    for split in debian.SPLITS:
        of_seed = {seed: [row["group"] for row in files[seed][split]] for seed in files}
        assert of_seed[0] != of_seed[1]
        assert sorted(of_seed[0]) == sorted(of_seed[1])
    few = {row["group"]: row["language"] for row in debian.make_splits(contexts[:400], shares, 0)["train"]}
    all_rows = {row["group"]: row["language"] for row in files[0]["train"]}
    assert few.items() <= all_rows.items()


@pytest.mark.parametrize(
    ("languages", "weights", "message"),
    [
        ("fr", None, "`languages` has to be a list"),
        ([], None, "`languages` has to be a list"),
        (["fr", "es"], None, "`languages` has to be a list of some of fr, de, it, da"),
        (["fr", "fr"], None, "more than once"),
        (["fr", "de"], [1.0], "`weights` has to be one positive number for each of fr, de"),
        (["fr", "de"], [1.0, 0.0], "leave it out of `languages`"),
        (["fr", "de"], [1.0, float("nan")], "`weights`"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, languages, weights, message):
    with pytest.raises(ValueError, match=message):
        debian.prepare_dataset(languages, weights, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


# --- the folder, and apt ---


def test_settings_have_folders_of_their_own_and_share_the_table(monkeypatch, tmp_path):
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        debian._write_lines(folder / debian.TABLE_FILE, map(vars, many_contexts(100)))

    monkeypatch.setattr(debian, "_build_table", build)
    uniform = debian.prepare_dataset(cache_dir=tmp_path)
    unequal = debian.prepare_dataset(weights=[0.7, 0.1, 0.1, 0.1], seed=3, cache_dir=tmp_path)
    single = debian.prepare_dataset(["it"], cache_dir=tmp_path)
    assert len(built) == 1
    assert [folder.name for folder in (uniform, unequal, single)] == [
        "fr0.25-de0.25-it0.25-da0.25-seed0",
        "fr0.7-de0.1-it0.1-da0.1-seed3",
        "it1-seed0",
    ]
    names = {f"{split}{suffix}.jsonl" for split in debian.SPLITS for suffix in ("", "_all")}
    assert {path.name for path in uniform.iterdir()} == names | {cache.MANIFEST}
    test, test_all = ((single / name).read_text() for name in ("test.jsonl", "test_all.jsonl"))
    assert test == test_all
    assert {json.loads(line)["language"] for line in test.splitlines()} == {"it"}
    # Weights that the folder's name cannot tell apart are not taken for each other.
    again = debian.prepare_dataset(weights=[0.700001, 0.1, 0.1, 0.1], seed=3, cache_dir=tmp_path)
    assert again == unequal
    assert "0.70000" in json.loads((again / cache.MANIFEST).read_text())["version"]


def test_a_machine_without_apt_is_told_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(debian.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match=r"this machine has no apt-get.*on a Debian machine"):
        debian.prepare_table(tmp_path)
    assert not (tmp_path / debian.FOLDER / debian.TABLE_FOLDER).exists()


def test_apts_last_words_are_shown(monkeypatch, tmp_path):
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, 100, b"", b"W: first\nE: Could not resolve 'deb.example'\n")

    monkeypatch.setattr(debian.shutil, "which", lambda _: "/usr/bin/apt-get")
    monkeypatch.setattr(debian, "HELPER", tmp_path)
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    monkeypatch.setattr(debian.subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"(?s)apt-get update.*Could not resolve 'deb\.example'.*Check the network"):
        debian.prepare_table(tmp_path)


def test_lists_that_hold_too_little_are_refused(monkeypatch, tmp_path):
    class Lists:
        def __enter__(self):
            return dict.fromkeys(LANGUAGES, ""), "- http://deb.example"

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(debian, "fetched_lists", lambda _: Lists())
    with pytest.raises(RuntimeError, match=r"only 0 summaries with all of fr, de, it, da(?s:.*)http://deb\.example"):
        debian.prepare_table(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not debian.HELPER.is_file(), reason="needs a Debian machine")
def test_real_summaries(tmp_path):
    folder = debian.prepare_dataset(cache_dir=tmp_path)
    rows = {
        path.stem: [json.loads(line) for line in path.read_text().split("\n") if line]
        for path in folder.glob("*.jsonl")
    }
    assert len(rows["test"]) >= 600
    assert len(rows["train"]) >= 4_000
    assert 0.12 < len(rows["test"]) / sum(len(rows[split]) for split in debian.SPLITS) < 0.18
    answers = defaultdict(set)
    for row in rows["test_all"]:
        answers[row["group"]].add(row["completion"])
        assert row["completion"] == row["completion"].strip()
        assert "\n" not in row["completion"]
    assert {len(texts) for texts in answers.values()} == {len(debian.TARGETS)}
    told = identify([row["completion"] for row in rows["test_all"]], debian.TARGETS)
    right = [language == row["language"] for (language, _), row in zip(told, rows["test_all"], strict=True)]
    assert sum(right) / len(right) > 0.97
    # No split's English summary shares most of its words with another's.
    texts = [(row["prompt"], split) for split in debian.SPLITS for row in rows[split]]
    plain = [text.removeprefix("Package summary: ").removesuffix("\nTranslation:\n") for text, _ in texts]
    assert all(texts[i][1] == texts[j][1] for i, j in debian.similar_pairs(plain))
