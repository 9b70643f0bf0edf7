"""The measuring recipes, run by path on a tiny model: they finish, and their files hold what they promise."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from recipes import benchmark, benchmark_layer
from tests.recipes.test_recipes import run, workplace  # noqa: F401  (a fixture)


@pytest.mark.slow
def test_benchmark_of_a_model_of_ones_own(workplace, tmp_path):  # noqa: F811
    output = tmp_path / "deep" / "benchmark.json"
    result = run(
        *(sys.executable, "recipes/benchmark.py", "--model", str(workplace / "model"), "--hypotheses", "2"),
        *(
            "--variants",
            "wta",
            "relaxed",
            "joint",
            "loop",
            "--length",
            "8",
            "--batch_size",
            "2",
            "--repeats",
            "1",
            "--threads",
            "1",
            "--prompts",
            "1",
        ),
        *("--prompt_length", "4", "--new_tokens", "3", "--dataset", str(workplace / "data.jsonl")),
        *("--output", str(output)),
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(output.read_text())
    rows = {(row["hypotheses"], row["variant"]): row for row in found["training"]}
    assert set(rows) == {(2, name) for name in ("lora", "wta", "relaxed", "joint", "loop")}
    assert set(benchmark.VARIANTS) > {name for _, name in rows}
    assert all(row["seconds"] > 0 and row["saved_mb"] > 0 for row in rows.values())
    assert rows[2, "lora"]["ratios"]["seconds"] == 1.0
    # What is kept for backward does not depend on the clock: two graphs, or one.
    for name, copies in {"loop": 2, "joint": 2, "relaxed": 2, "wta": 1}.items():
        assert rows[2, name]["ratios"]["saved_mb"] == pytest.approx(copies, rel=0.15), name
    assert found["generation"][0]["equal_sequences"] == 2
    assert output.with_suffix(".png").stat().st_size > 0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("--repeats", "0"), "repeats"),
        (("--hypotheses", "0"), "hypotheses"),
        (("--variants", "fast"), "variants"),
        (("--model", "no/such/folder"), "model"),
    ],
    ids=str,
)
def test_bad_input_of_the_benchmark_is_named(tmp_path, options, name):
    result = run(sys.executable, "recipes/benchmark.py", *options, "--output", str(tmp_path / "out.json"))
    assert result.returncode != 0
    assert name in result.stderr
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("situation", benchmark_layer.SITUATIONS)
def test_all_ways_of_the_layer_compute_the_same(situation):
    generator = torch.Generator().manual_seed(0)
    count, width, rank = 3, 16, 8
    index = torch.tensor([0, 0, 1, 1, 2, 2])
    lengths = [3, 1, 4, 2, 5, 2] if situation == "packed" else [4] * 6
    x = torch.randn(sum(lengths), width, generator=generator)
    a, b = (torch.randn(count, *shape, generator=generator) for shape in ((rank, width), (width, rank)))
    of_token = index.repeat_interleave(torch.tensor(lengths))
    expected = torch.stack([b[k] @ (a[k] @ token) for k, token in zip(of_token, x, strict=True)])
    for name in benchmark_layer.SITUATIONS[situation]:
        torch.testing.assert_close(
            benchmark_layer.WAYS[name](x, a, b, index, lengths), expected, rtol=1e-4, atol=1e-4, msg=name
        )


def test_benchmark_of_the_layer(tmp_path):
    output = tmp_path / "layer.json"
    result = run(
        *(sys.executable, "recipes/benchmark_layer.py", "--widths", "16", "--ranks", "8", "--hypotheses", "2"),
        *("--rows", "3", "--tokens", "4", "--dtypes", "float32", "--repeats", "1", "--threads", "1"),
        *("--output", str(output)),
    )
    assert result.returncode == 0, result.stderr
    cells = json.loads(output.read_text())["cells"]
    assert [cell["situation"] for cell in cells] == list(benchmark_layer.SITUATIONS)
    assert all(way["seconds"] > 0 for cell in cells for way in cell["ways"].values())


@pytest.mark.slow
def test_savings(workplace, tmp_path):  # noqa: F811
    output = tmp_path / "savings.json"
    result = run(
        *(sys.executable, "recipes/savings.py", "--model_name_or_path", str(workplace / "model"), "--use_cpu"),
        *("--dataset_name", str(workplace / "data.jsonl"), "--test_name", str(workplace / "data.jsonl")),
        *("--num_hypotheses", "2", "--sequences", "8", "--test_sequences", "8", "--epochs", "4", "--batch_size", "4"),
        *("--dtype", "float32", "--output", str(output)),
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(output.read_text())
    assert len(found["runs"]) == 6
    assert all(own["wta_nll"] > 0 for own in found["runs"].values())
    assert all(0 <= flips <= 1 for flips in found["runs"]["score_every=2"]["winner_flips"])
    assert set(found["prefixes"]) == {"1", "2", "4", "8", "16", "32"}
