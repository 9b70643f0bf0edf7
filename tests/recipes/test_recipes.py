"""The recipes, run as a user runs them: the files by path, in processes of their own, on a tiny model and real files."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from trl import ModelConfig, ScriptArguments, TrlParser

from peft_mcl import export_hypotheses
from recipes import evaluate, generate, plot, train_mcl
from tests.tiny import tiny_llama
from tests.trainer_ext.reference import ragged_pairs, word_tokenizer
from trainer_ext import MCLConfig


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with a tiny model and a data set as JSONL, with a mode column that training must not see."""
    folder = tmp_path_factory.mktemp("recipes")
    tokenizer = word_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{**row, "mode": f"mode {i % 2}"} for i, row in enumerate(ragged_pairs(rows=24))]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=settings, text=True, capture_output=True, timeout=600)


def launch(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    return run(
        *(accelerate, "launch", "--num_processes", "1", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "recipes/train_mcl.py"),
        *("--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "data.jsonl")),
        *("--use_cpu", "--bf16", "False", "--report_to", "none", "--lora_target_modules", "all-linear"),
        *("--logging_steps", "1", "--gradient_checkpointing", "False"),
        *options,
        **environment,
    )


@pytest.fixture(scope="module")
def trained(workplace) -> Path:
    """An adapter trained by `accelerate launch recipes/train_mcl.py`, most of its options from a YAML file."""
    config = workplace / "config.yaml"
    config.write_text(
        "num_hypotheses: 2\nobjective: annealed\nmax_steps: 3\nlora_r: 4\nlearning_rate: 1e-2\nsave_steps: 2\n"
    )
    out = workplace / "out"
    result = launch(
        workplace, "--config", str(config), "--output_dir", str(out), "--lora_r", "2",
        "--eval_dataset_name", str(workplace / "data.jsonl"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return out


def test_training_leaves_an_adapter_a_card_and_its_figures(trained):
    model = AutoPeftModelForCausalLM.from_pretrained(trained)
    config = model.peft_config["default"]
    # The YAML file gives the number of hypotheses, the command line overrides its rank.
    assert (config.num_hypotheses, config.r) == (2, 2)
    assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if "mclora_B" in name)
    assert "LoRA-MCL" in (trained / "README.md").read_text()
    assert json.loads((trained / "eval_results.json").read_text())["eval_loss"] > 0
    assert (trained / "checkpoint-2").is_dir()


def test_resuming_from_the_command_line_goes_on_with_the_last_checkpoint(workplace, trained):
    before = (trained / "adapter_model.safetensors").read_bytes()
    result = launch(
        workplace, "--config", str(workplace / "config.yaml"), "--output_dir", str(trained), "--lora_r", "2",
        "--resume_from_checkpoint", "True",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (trained / "adapter_model.safetensors").read_bytes() == before


def test_generate_shows_a_column_for_each_hypothesis_and_writes_jsonl(trained, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a b"}\n{"prompt": "c"}\n{"prompt": "a b"}\n')
    output = tmp_path / "deep" / "out.jsonl"
    result = run(
        *(sys.executable, "recipes/generate.py", "--adapter", str(trained), "--prompts_file", str(prompts)),
        *("--prompts", "d e f", "--max_new_tokens", "4", "--output", str(output)),
    )
    assert result.returncode == 0, result.stderr
    assert "hypothesis 0" in result.stdout
    assert "hypothesis 1" in result.stdout
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["d e f", "a b", "c"]
    assert all(len(row["continuations"]) == 2 for row in rows)


def test_decoding_is_what_the_model_generates(trained):
    model = AutoPeftModelForCausalLM.from_pretrained(trained).eval()
    tokenizer = generate.load_tokenizer(str(trained), model)
    options = generate.GenerateArguments(adapter=str(trained), max_new_tokens=5)
    together = generate.decode(model, tokenizer, ["a b c", "d"], options)
    for hypothesis in (0, 1):
        options.hypotheses = [hypothesis]
        for prompt, decoded in zip(["a b c", "d"], together, strict=True):
            continuations = decoded["continuations"]
            assert generate.decode(model, tokenizer, [prompt], options)[0]["continuations"] == [
                continuations[hypothesis]
            ]


@pytest.mark.parametrize("rank", ["likelihood", "mixture", "consensus"])
def test_ranked_continuations_are_the_same_ones_best_first(trained, capsys, tmp_path, rank):
    model = AutoPeftModelForCausalLM.from_pretrained(trained).eval()
    tokenizer = generate.load_tokenizer(str(trained), model)
    options = generate.GenerateArguments(adapter=str(trained), max_new_tokens=5)
    plain = generate.decode(model, tokenizer, ["a b c", "d"], options)
    options.rank = rank
    for row, ranked in zip(plain, generate.decode(model, tokenizer, ["a b c", "d"], options), strict=True):
        assert ranked["continuations"] == [row["continuations"][k] for k in ranked["hypotheses"]]
        assert ranked["scores"] == sorted(ranked["scores"], reverse=True)
    options.prompts, options.output = ["a b c"], str(tmp_path / "out.jsonl")
    generate.main(options)
    assert "rank 1" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.jsonl").read_text())["scores"]) == 2


def test_evaluate_reports_likelihood_and_agreement(workplace, trained, tmp_path):
    output = tmp_path / "figures.json"
    result = run(
        *(sys.executable, "recipes/evaluate.py", "--adapter", str(trained), "--baseline", str(trained)),
        *("--dataset_name", str(workplace / "data.jsonl"), "--mode_column", "mode", "--output", str(output)),
        *("--batch_size", "5"),
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(output.read_text())
    assert figures["sequences"] == 24
    assert figures["wta_nll"] <= figures["mixture_nll"]
    assert figures["wta_nll"] <= figures["mean_nll"] <= figures["worst_nll"]
    assert figures["log_k_line"] < figures["baseline_nll"]
    matrix = figures["agreement"]["matrix"]
    assert [sum(counts) for counts in matrix.values()] == [12, 12]
    assert f"purity {figures['agreement']['purity']:.3f}" in result.stdout


def test_qlora_from_the_command_line(tmp_path):
    """Train on a 4-bit base, go on from a checkpoint, evaluate and decode on a 4-bit base and on a plain one."""
    pytest.importorskip("bitsandbytes")
    tokenizer = word_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    tiny_llama(vocab_size=len(tokenizer), **sizes).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ragged_pairs(rows=16)))
    out = tmp_path / "out"
    command = [
        *(
            "--load_in_4bit",
            "--use_bnb_nested_quant",
            "--dtype",
            "bfloat16",
            "--num_hypotheses",
            "2",
            "--max_steps",
            "4",
        ),
        *("--bf16", "True", "--gradient_checkpointing", "True", "--save_steps", "2", "--output_dir", str(out)),
        *("--eval_dataset_name", str(tmp_path / "data.jsonl"), "--eval_strategy", "steps", "--eval_steps", "1"),
    ]
    result = launch(tmp_path, *command)
    assert result.returncode == 0, result.stderr
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_wta_nll" in entry for entry in log) == 4
    before = (out / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoint-4")
    result = launch(tmp_path, *command, "--resume_from_checkpoint", "True")
    assert result.returncode == 0, result.stderr
    assert (out / "adapter_model.safetensors").read_bytes() == before

    figures = []
    for number, options in enumerate(
        ({"load_in_4bit": True, "use_bnb_nested_quant": True}, {"load_in_8bit": True}, {})
    ):
        output = tmp_path / f"{number}.json"
        data = str(tmp_path / "data.jsonl")
        evaluate.main(evaluate.EvaluateArguments(adapter=str(out), dataset_name=data, output=str(output), **options))
        figures.append(json.loads(output.read_text())["wta_nll"])
        arguments = generate.GenerateArguments(
            adapter=str(out), prompts=["w1 w2"], max_new_tokens=3, output=str(output), **options
        )
        generate.main(arguments)
        assert len(json.loads(output.read_text())["continuations"]) == 2
    # The evaluation of training, but for the dtype of the adapters; and a little off it on another base.
    in_training = [entry["eval_wta_nll"] for entry in log if "eval_wta_nll" in entry][-1]
    assert figures[0] == pytest.approx(in_training, abs=2e-3)
    assert figures[1] != figures[0] != figures[2]
    assert figures == pytest.approx([in_training] * 3, abs=0.1)


def test_4_bit_layers_need_a_dtype_to_compute_in():
    with pytest.raises(ValueError, match=r"`dtype='auto'`.*`--dtype bfloat16`"):
        train_mcl.quantization_config(ModelConfig(load_in_4bit=True, dtype="auto"))
    assert train_mcl.quantization_config(ModelConfig(dtype="auto")) is None


def test_plot_draws_a_picture(trained, tmp_path):
    plot.main(plot.PlotArguments(run=str(trained), output=str(tmp_path / "p" / "plot.png"), baseline=str(trained)))
    assert (tmp_path / "p" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_local_files_of_all_formats_and_folders(workplace, tmp_path):
    rows = [json.loads(line) for line in (workplace / "data.jsonl").read_text().splitlines()]
    with (tmp_path / "data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    train_mcl.load_file(str(workplace / "data.jsonl"), streaming=False).to_parquet(tmp_path / "data.parquet")
    for name in ("data.csv", "data.parquet"):
        assert train_mcl.load_file(str(tmp_path / name), streaming=False)["prompt"][3] == rows[3]["prompt"]
    folder = tmp_path / "folder"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text((workplace / "data.jsonl").read_text())
    arguments = (ScriptArguments(dataset_name=str(folder)), training_arguments(tmp_path, eval_strategy="epoch"))
    train, test = train_mcl.load_data(*arguments, train_mcl.HypothesisArguments())
    assert len(train) == len(test) == 24


def training_arguments(folder: Path, **options) -> MCLConfig:
    return MCLConfig(output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to=[], **options)


# --------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("count", [1, 2])
def test_a_warm_start_from_the_command_line(workplace, trained, tmp_path, count):
    adapters = [str(path) for path in export_hypotheses(trained, tmp_path / "adapters")]
    arguments = ["--model_name_or_path", str(workplace / "model"), "--dataset_name", str(workplace / "data.jsonl")]
    arguments += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "False", "--report_to", "none"]
    arguments += ["--max_steps", "2", "--learning_rate", "1e-6", "--num_hypotheses", "2", "--save_hypotheses", "True"]
    arguments += ["--gradient_checkpointing", "False", "--init_adapters", *adapters[:count]]
    arguments += ["--init_perturbation", "0.2"] if count == 1 else []
    parser = TrlParser((ScriptArguments, MCLConfig, ModelConfig, train_mcl.HypothesisArguments))
    train_mcl.main(*parser.parse_args_and_config(arguments))
    start = AutoPeftModelForCausalLM.from_pretrained(trained).state_dict()
    end = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert start.keys() == end.keys()
    for name, tensor in start.items():
        if "mclora_B" in name and tensor[0].any():
            # Two small steps have hardly moved it.
            from_one = (end[name] - tensor[:1]).norm() / (2**0.5 * tensor[0].norm())
            assert (0.1 < from_one < 0.3) if count == 1 else torch.allclose(end[name], tensor, atol=1e-4)
    assert sorted(path.name for path in (tmp_path / "out").glob("hypothesis_*")) == ["hypothesis_0", "hypothesis_1"]


def test_a_wrong_number_of_adapters_to_start_from(workplace, tmp_path):
    arguments = train_mcl.HypothesisArguments(num_hypotheses=3, init_adapters=["a", "b"])
    with pytest.raises(ValueError, match="`init_adapters` names 2 adapters: give 1, or one for each of 3 hypotheses"):
        train_mcl.warm_start(ModelConfig(), training_arguments(tmp_path), arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_adapters": ["a"], "shared_r": 2}, "`shared_r=2` cannot be used with `init_adapters`"),
        (
            {"init_adapters": ["a", "b"], "init_perturbation": 0.0},
            "`init_perturbation=0.0` cannot be used with 2 `init_adapters`",
        ),
    ],
)
def test_options_that_adapters_to_start_from_have_no_use_for(tmp_path, options, message):
    arguments = train_mcl.HypothesisArguments(num_hypotheses=2, **options)
    with pytest.raises(ValueError, match=message):
        train_mcl.warm_start(ModelConfig(), training_arguments(tmp_path), arguments)


def test_the_options_of_hypotheses_reach_the_adapter():
    arguments = train_mcl.HypothesisArguments(num_hypotheses=4, shared_r=2, init_perturbation=0.3)
    config = train_mcl.peft_config(ModelConfig(lora_r=5), arguments)
    assert (config.num_hypotheses, config.r, config.shared_r, config.init_perturbation) == (4, 5, 2, 0.3)
    assert train_mcl.peft_config(ModelConfig(), train_mcl.HypothesisArguments()).init_perturbation is None


def test_an_unknown_option_in_yaml_is_named(workplace, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("num_hypotheses: 2\nnumber_of_beams: 3\n")
    parser = TrlParser((ScriptArguments, MCLConfig, ModelConfig, train_mcl.HypothesisArguments))
    with pytest.raises(ValueError, match="number_of_beams"):
        parser.parse_args_and_config(["--config", str(config), "--output_dir", str(tmp_path), "--use_cpu"])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [(None, "`dataset_name` is required"), ("missing.jsonl", "no file 'missing.jsonl'")],
)
def test_a_missing_data_set_is_named(tmp_path, dataset, message):
    script_args = ScriptArguments(dataset_name=dataset)
    with pytest.raises(ValueError, match=message):
        train_mcl.load_data(script_args, training_arguments(tmp_path), train_mcl.HypothesisArguments())


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    script_args = ScriptArguments(dataset_name=str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match=r"empty.jsonl' is empty"):
        train_mcl.load_data(script_args, training_arguments(tmp_path), train_mcl.HypothesisArguments())


def test_a_missing_split_is_named_with_those_there_are(workplace, tmp_path):
    script_args = ScriptArguments(dataset_name=str(workplace / "data.jsonl"), dataset_train_split="trian")
    with pytest.raises(ValueError, match=r"no split 'trian', only \['train'\]"):
        train_mcl.load_data(script_args, training_arguments(tmp_path), train_mcl.HypothesisArguments())


def test_dora_is_refused():
    with pytest.raises(ValueError, match="use_dora"):
        train_mcl.peft_config(ModelConfig(use_dora=True), train_mcl.HypothesisArguments())


def test_nothing_to_decode_or_to_draw(tmp_path):
    with pytest.raises(ValueError, match="nothing to decode"):
        generate.read_prompts(generate.GenerateArguments(adapter="x"))
    with pytest.raises(ValueError, match="trainer_state"):
        plot.main(plot.PlotArguments(run=str(tmp_path)))


def test_a_missing_mode_column_is_named(workplace, trained):
    options = evaluate.EvaluateArguments(
        adapter=str(trained), dataset_name=str(workplace / "data.jsonl"), mode_column="style"
    )
    with pytest.raises(ValueError, match="no column 'style'"):
        evaluate.main(options)


# --- the Hub ---

SECRET = "hf_secretOfTheRecipes"


@pytest.fixture(scope="module")
def pushed(hub, workplace) -> str:
    """An adapter whose pushes fail while it is trained, and that is pushed by the command that training ends with."""
    hub.accounts[SECRET] = "user"
    out = workplace / "pushed"
    options = (
        *("--output_dir", str(out), "--num_hypotheses", "2", "--max_steps", "2", "--save_steps", "1"),
        *("--push_to_hub", "--hub_model_id", "user/recipe", "--card_prompts", "1"),
        # On the command line, `accelerate launch` would print it when a run fails.
        *("--config", str(workplace / "token.yaml")),
    )
    (workplace / "token.yaml").write_text(f"hub_token: {SECRET}\n")
    with hub.failing("POST", ".*/commit/.*", status=500, times=9) as failure:
        result = launch(workplace, *options, HF_HUB_OFFLINE="0", TRANSFORMERS_VERBOSITY="debug")
    assert result.returncode == 1, result.stderr
    assert failure.times < 8, result.stderr
    assert "A checkpoint could not be pushed to user/recipe" in result.stderr
    assert hub.messages("user/recipe") == ["initial commit"]
    message = next(line for line in result.stderr.splitlines() if line.startswith("The adapter is saved in"))
    # Not less than a run without a push leaves.
    for name in ("adapter_model.safetensors", "trainer_state.json", "README.md", "checkpoint-2/adapter_config.json"):
        assert (out / name).is_file(), name
    for text in (result.stdout, result.stderr):
        assert SECRET not in text
    assert [path for path in out.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()] == []
    hub.accounts.pop(SECRET)

    command = re.search("`(hf upload [^`]*)`", message)[1]
    folder = Path(sys.executable).parent
    upload = run("bash", "-c", command, HF_HUB_OFFLINE="0", PATH=f"{folder}{os.pathsep}{os.environ['PATH']}")
    assert upload.returncode == 0, upload.stderr
    return "user/recipe"


def test_a_push_that_failed_is_made_later_by_the_command_that_was_told(hub, workplace, pushed):
    files = hub.files(pushed)
    weights = (workplace / "pushed" / "adapter_model.safetensors").read_bytes()
    assert files["adapter_model.safetensors"] == weights
    assert not [name for name in files if name.startswith("checkpoint-")]
    card = files["README.md"].decode()
    assert "`data.jsonl` (a local path)" in card
    assert "## Examples" in card


def test_generate_takes_an_adapter_of_the_hub(pushed, fresh_home):
    result = run(
        *(sys.executable, "recipes/generate.py", "--adapter", pushed, "--prompts", "d e f", "--max_new_tokens", "4"),
        **fresh_home,
    )
    assert result.returncode == 0, result.stderr
    assert "hypothesis 1" in result.stdout


def test_generate_tells_what_is_wrong_with_an_adapter_of_the_hub(workplace):
    get_peft_model(tiny_llama(), LoraConfig(r=2, task_type="CAUSAL_LM")).push_to_hub("user/recipe-lora")
    for name, reason in (
        ("user/recipe-lora", "type LORA, not MCLORA"),
        ("user/recipe-none", "neither a folder here nor"),
    ):
        with pytest.raises(ValueError, match=f"'{name}' .*{reason}"):
            generate.main(generate.GenerateArguments(adapter=name, prompts=["a"]))
