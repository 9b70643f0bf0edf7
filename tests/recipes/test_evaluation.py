"""The evidence kit, on tiny models: the whole command, its parts, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from peft_mcl import export_hypotheses
from recipes import evaluate
from recipes.evaluation import baselines, runs
from recipes.evaluation.contenders import contender, parse_contenders
from recipes.evaluation.decoders import DECODERS, decode, options_of
from recipes.evaluation.results import evaluate as evaluate_rows
from recipes.evaluation.rows import prompts_and_references
from recipes.evaluation.settings import Settings
from tests.tiny import tiny_llama, with_hypotheses
from tests.trainer_ext.reference import ragged_pairs, word_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base model, an adapter of two hypotheses, the same as LoRA adapters, and rows with two references each."""
    folder = tmp_path_factory.mktemp("evaluation")
    tokenizer = word_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    base = tiny_llama(vocab_size=len(tokenizer))
    model = with_hypotheses(base, num_hypotheses=2)
    model.peft_config["default"].base_model_name_or_path = str(folder / "model")
    model.save_pretrained(folder / "mcl")
    export_hypotheses(folder / "mcl", folder / "loras")
    rows = [*ragged_pairs(rows=6), *[{**row, "completion": row["completion"] + " w3"} for row in ragged_pairs(rows=6)]]
    rows = [{**row, "mode": f"mode {i // 6}"} for i, row in enumerate(rows)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def quick(folder: Path, **options) -> Settings:
    return Settings(
        **{"output_dir": folder, "max_new_tokens": 4, "batch_size": 4, "resamples": 20, "dtype": "float32", **options}
    )


def lora(place: Path, hypothesis: int = 0) -> str:
    return str(place / "loras" / f"hypothesis_{hypothesis}")


def test_every_decoder_gives_k_outputs_that_depend_on_the_seed_alone(place, tmp_path):
    model, tokenizer = contender("lora", [lora(place)]).load(quick(tmp_path))
    prompts = ["w1 w2", "w3", "w4 w5 w6"]
    for name in DECODERS:
        found = []
        for seed in (0, 0, 1):
            settings = quick(tmp_path, seed=seed, batch_size=2, num_beams=2)
            options = options_of(name, settings, outputs=3, hypotheses=1)
            found.append(decode(model, tokenizer, prompts, options, settings))
        assert [len(row["outputs"]) for row in found[0]] == [1 if name == "greedy" else 3] * 3
        assert found[0] == found[1]
        is_random = name not in ("greedy", "beam", "diverse_beam")
        assert (found[0] != found[2]) is is_random


def test_loras_side_by_side_are_the_hypotheses_they_came_from(place, tmp_path):
    settings = quick(tmp_path)
    found = []
    for paths in ([str(place / "mcl")], [lora(place), lora(place, 1)]):
        one = contender("x", paths)
        assert one.num_hypotheses == 2
        model, tokenizer = one.load(settings)
        found.append(decode(model, tokenizer, ["w1 w2", "w3"], options_of("greedy", settings, 2, 2), settings))
    assert found[0] == found[1]
    assert found[0][0]["outputs"][0] != found[0][0]["outputs"][1]


def test_the_base_model_is_the_base_model(place, tmp_path):
    one = contender("base", [], str(place / "model"))
    model, tokenizer = one.load(quick(tmp_path))
    inputs = tokenizer("w1 w2 w3", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(inputs).logits, tiny_llama(vocab_size=len(tokenizer))(inputs).logits)


def test_the_whole_command(place, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = evaluate.EvaluateArguments(
        adapter=str(place / "mcl"), dataset_name=str(place / "data.jsonl"), mode_column="mode", output_dir=str(out),
        contenders=[f"lora={lora(place)}", f"lora={lora(place, 1)}", f"both={lora(place)},{lora(place, 1)}", "base"],
        decoders=["greedy", "beam", "nucleus"], max_new_tokens=4, metrics=["chrf", "exact_match"], batch_size=4, resamples=20,
    )  # fmt: skip
    evaluate.main(arguments)
    results = json.loads((out / "evaluation.json").read_text())
    assert (results["prompts"], results["references"], results["sequences"]) == (6, 12, 12)
    by_run = {(run["contender"], run["decoder"]): run for run in results["runs"]}
    assert set(by_run) == {
        ("mcl", "greedy"), ("both", "greedy"),
        *((name, decoder) for name in ("lora", "base") for decoder in ("greedy", "beam", "nucleus")),
    }  # fmt: skip
    # Two seeds of one contender; a set of the same LoRAs is the adapter they came from.
    assert by_run["lora", "beam"]["seeds"] == 2
    assert by_run["both", "greedy"]["quality"] == by_run["mcl", "greedy"]["quality"]
    assert {run["outputs"] for key, run in by_run.items() if key[1] != "greedy"} == {2}
    for run in results["runs"]:
        parts = run["quality"]["chrf"]
        assert parts["worst"][0] <= parts["mean"][0] <= parts["best"][0]
        assert all(low <= estimate <= high for estimate, low, high in parts.values())
        assert len(run["corpus"]) == run["seeds"]
        assert len(run["corpus"][0]["chrf"]["hypotheses"]) == run["outputs"]
        assert (run["corpus"][0]["mbleu_4"] is None) is (run["outputs"] == 1)
    top = by_run["mcl", "greedy"]["top1"]
    assert set(top) == {"likelihood", "mixture", "consensus", "oracle", "random"}
    assert all(top[name][0] <= top["oracle"][0] for name in top)
    assert set(by_run["mcl", "greedy"]["top1_minus_greedy"]) == {"lora", "base"}
    modes = by_run["mcl", "greedy"]["best_of_mode"]
    assert set(modes) == set(results["specialisation"]["mcl"][0]["agreement"]["matrix"])
    # Fewer references than all can only be harder to meet.
    assert all(found[0] <= by_run["mcl", "greedy"]["quality"]["chrf"]["best"][0] for found in modes.values())
    found = results["likelihood"]["mcl"]
    assert found["best"][0] <= found["mixture"][0] <= found["worst"][0]
    assert len(set(map(str, (results["likelihood"]["base"][name] for name in ("best", "mean", "mixture"))))) == 1
    assert sum(map(sum, results["specialisation"]["mcl"][0]["agreement"]["matrix"].values())) == 12
    assert (out / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert "| mcl | greedy | 2 |" in (out / "evaluation.md").read_text()
    assert "quality and diversity" in capsys.readouterr().out

    # Nothing is computed again, unless a setting has changed.
    loads = []
    monkeypatch.setattr(runs._Lazily, "__call__", lambda self: loads.append(self.contender.name))
    evaluate.main(arguments)
    assert loads == []
    assert json.loads((out / "evaluation.json").read_text()) == results
    arguments.max_new_tokens = 3
    with pytest.raises(TypeError):
        evaluate.main(arguments)
    assert loads == ["mcl"]


def test_likelihoods_are_those_of_the_short_form(place, tmp_path):
    results = evaluate_rows(
        [contender("mcl", [str(place / "mcl")])],
        Dataset.from_json(str(place / "data.jsonl")),
        quick(tmp_path / "out", metrics=("chrf",)),
    )
    arguments = evaluate.EvaluateArguments(
        adapter=str(place / "mcl"), dataset_name=str(place / "data.jsonl"), output=str(tmp_path / "figures.json"),
        mode_column="mode", dtype="float32",
    )  # fmt: skip
    evaluate.main(arguments)
    figures = json.loads((tmp_path / "figures.json").read_text())
    for name, other in (("best", "wta_nll"), ("mean", "mean_nll"), ("worst", "worst_nll")):
        assert results["likelihood"]["mcl"][name][0] == pytest.approx(figures[other], abs=1e-5)


def test_baselines_are_trained_once(place, tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text("max_steps: 1\n")
    commands = []

    def run(command, check):
        commands.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        count = int(command[command.index("--num_hypotheses") + 1])
        (folder / "adapter_model.safetensors").write_bytes(b"x")
        kind = {"peft_type": "MCLORA", "num_hypotheses": count, "base_model_name_or_path": str(place / "model")}
        (folder / "adapter_config.json").write_text(json.dumps(kind))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(baselines.subprocess, "run", run)
    arguments = (str(place / "mcl"), config, "train.jsonl", tmp_path / "baselines")
    first = baselines.train_baselines(*arguments)
    # r = 4, K = 2: two seeds at rank 4, one at rank 8, one run with random winners.
    ranks = [command[command.index("--lora_r") + 1] for command in commands]
    assert ranks == ["4", "4", "8", "4"]
    # As train_mcl.py reads them: a saved adapter has a float.
    assert all(command[command.index("--lora_alpha") + 1].isdigit() for command in commands)
    assert commands[-1][commands[-1].index("--seeding_fraction") + 1] == "0"
    assert [one.num_hypotheses for one in first] == [1, 1, 2, 2]
    assert baselines.train_baselines(*arguments) == first
    assert len(commands) == 4
    config.write_text("max_steps: 2\n")
    with pytest.raises(ValueError, match="was trained with other settings"):
        baselines.train_baselines(*arguments)


def test_references_are_the_rows_that_share_a_prompt():
    chat = [{"role": "user", "content": "w1"}]
    rows = Dataset.from_list(
        [{"prompt": chat, "completion": [{"role": "assistant", "content": text}]} for text in "aab"]
    )
    assert prompts_and_references(rows) == ([chat], [["a", "b"]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoders": ["beem"]}, r"`decoders`: \['beem'\] given; choose from greedy, beam"),
        ({"metrics": ["spice"]}, r"`metrics`: \['spice'\]"),
        ({"dataset_name": "none.jsonl"}, "`dataset_name` must be"),
        ({"contenders": ["lora=nowhere"]}, "`contenders`: 'lora' cannot be used: There is no adapter_config"),
        ({"contenders": ["lora"]}, "`contenders`: 'lora' is not NAME=PATH"),
        ({"num_beams": 0}, "`num_beams=0` must be at least 1"),
        ({"top_p": 1.5}, "`top_p=1.5` must be above 0 and at most 1"),
        ({"top_k": 0}, "`top_k=0` must be at least 1"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty=0.0` must be above 0"),
        ({"diversity_penalty": -1.0}, "`diversity_penalty=-1.0` must be at least 0 nats"),
        ({"contenders": ["base"], "output_dir": None}, "`contenders` needs `output_dir`"),
        ({"train_baselines": "none.yaml"}, "`train_baselines`: there is no file 'none.yaml'"),
    ],
)
def test_bad_input_is_named_before_a_model_is_loaded(place, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(runs._Lazily, "__call__", lambda self: pytest.fail("A model was loaded."))
    given = {
        "adapter": str(place / "mcl"),
        "dataset_name": str(place / "data.jsonl"),
        "output_dir": str(tmp_path / "o"),
    }
    with pytest.raises(ValueError, match=message):
        evaluate.main(evaluate.EvaluateArguments(**{**given, **options}))


def test_rows_without_references_are_named():
    with pytest.raises(ValueError, match="row 1 has no reference"):
        prompts_and_references(
            Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}])
        )
    with pytest.raises(ValueError, match="'prompt' is not among"):
        prompts_and_references(Dataset.from_list([{"text": "a"}]))


def test_hypotheses_do_not_stand_side_by_side(place):
    with pytest.raises(ValueError, match="has 2 hypotheses; side by side stand adapters with one each"):
        parse_contenders([f"x={place / 'mcl'},{place / 'mcl'}"])
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, task_type="CAUSAL_LM", use_dora=True))
    model.save_pretrained(place / "dora")
    with pytest.raises(ValueError, match="uses use_dora"):
        parse_contenders([f"x={place / 'dora'}"])
