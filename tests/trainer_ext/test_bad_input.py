"""Bad input is refused early, by name, with what to do about it; an interrupted run can go on."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ParallelismConfig
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import TrainerCallback
from trl import TrlParser

from tests.tiny import tiny_llama, with_hypotheses
from tests.trainer_ext.interrupted_run import STEPS, run
from tests.trainer_ext.reference import (
    LORA,
    hypotheses,
    logged,
    ragged_pairs,
    settings,
    trainer_for,
    word_tokenizer,
)
from trainer_ext import MCLConfig, MCLTrainer, launches


ROOT = Path(__file__).resolve().parents[2]


def says(*parts: str) -> str:
    """A pattern for a message with these parts, in order."""
    return "(?s)" + ".*".join(parts)


# --- values of the configuration ---


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"objective": "hard"}, ("objective", "wta, relaxed, annealed, balanced, random", "'hard'")),
        ({"objective": None}, ("objective", "None")),
        ({"loss_normalization": "batch"}, ("loss_normalization", "token, sequence", "'batch'")),
        ({"relaxed_epsilon": -0.1}, ("relaxed_epsilon", r"\[0, 1\]", "-0.1")),
        ({"relaxed_epsilon": 1.5}, ("relaxed_epsilon", r"\[0, 1\]", "1.5")),
        ({"relaxed_epsilon": math.nan}, ("relaxed_epsilon", "nan")),
        ({"initial_temperature": 0.0}, ("initial_temperature", "above 0", "0.0")),
        ({"initial_temperature": -1.0}, ("initial_temperature", "above 0", "-1.0")),
        ({"initial_temperature": math.inf}, ("initial_temperature", "finite")),
        ({"initial_temperature": math.nan}, ("initial_temperature", "nan")),
        ({"final_temperature": 0.0}, ("final_temperature", "above 0")),
        ({"final_temperature": -1e-6}, ("final_temperature", "above 0", "-1e-06")),
        ({"final_temperature": 2.0}, ("final_temperature", "2.0", "initial_temperature", "0.2")),
        ({"temperature_decay": 0.0}, ("temperature_decay", r"\(0, 1\]", "0.0")),
        ({"temperature_decay": 1.01}, ("temperature_decay", r"\(0, 1\]", "1.01")),
        ({"temperature_decay": -0.5}, ("temperature_decay", "-0.5")),
        ({"temperature_decay": math.nan}, ("temperature_decay", "nan")),
        ({"annealing_fraction": 0.0}, ("annealing_fraction", r"\(0, 1\]", "0.0")),
        ({"annealing_fraction": 1.5}, ("annealing_fraction", r"\(0, 1\]", "1.5")),
        (
            {"temperature_decay": 0.9, "annealing_fraction": 0.5},
            ("temperature_decay", "annealing_fraction", "not both"),
        ),
        ({"no_win_warning_steps": -1}, ("no_win_warning_steps", "-1")),
        ({"min_weight": -0.1}, ("min_weight", r"\[0, 1\]", "-0.1")),
        ({"min_weight": 1.1}, ("min_weight", "1.1")),
        ({"min_weight": "little"}, ("min_weight", "little")),
        ({"scoring_batch_size": 0}, ("scoring_batch_size", "at least 1", "0")),
        ({"scoring_batch_size": 2.5}, ("scoring_batch_size", "integer", "2.5")),
        ({"score_every": 0}, ("score_every", "at least 1", "0")),
        ({"score_every": None}, ("score_every", "None")),
        ({"score_prefix": 0}, ("score_prefix", "at least 1", "0")),
        ({"score_prefix": True}, ("score_prefix", "integer", "True")),
        ({"relaxed_epsilon": "a lot"}, ("relaxed_epsilon", "a lot")),
        ({"initial_temperature": "warm"}, ("initial_temperature", "warm")),
    ],
    ids=str,
)
def test_values_out_of_range_are_named(tmp_path, options, parts):
    with pytest.raises(ValueError, match=says(*parts)):
        settings(tmp_path, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"relaxed_epsilon": 0.0},
        {"relaxed_epsilon": 1.0},
        {"relaxed_epsilon": 1},
        {"temperature_decay": 1.0},
        {"annealing_fraction": 1.0},
        {"initial_temperature": 0.5, "final_temperature": 0.5},
        {"no_win_warning_steps": 0},
        {"loss_type": "nll"},
        {"packing": False, "eval_packing": False},
        {"packing": True},
        {"padding_free": True, "max_length": None},
        {"min_weight": 0.0, "score_every": 1, "score_prefix": 1, "scoring_batch_size": 1},
        {"min_weight": 1.0},
    ],
    ids=str,
)
def test_values_at_the_ends_of_their_ranges_are_fine(tmp_path, options):
    settings(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"loss_type": "dft"}, ("loss_type='dft'", "not supported", "'nll'")),
        ({"label_smoothing_factor": 0.1}, ("label_smoothing_factor=0.1", "not a likelihood")),
        (
            {"packing": True, "packing_strategy": "wrapped"},
            ("packing_strategy='wrapped'", "each sequence has its own winner"),
        ),
        ({"eval_packing": True, "packing_strategy": "wrapped"}, ("packing_strategy='wrapped'", "Set it to 'bfd'")),
    ],
    ids=str,
)
def test_options_without_a_meaning_are_refused_with_the_reason(tmp_path, options, parts):
    with pytest.raises(ValueError, match=says(*parts)):
        settings(tmp_path, **options)


def test_a_loss_of_ones_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match=says("compute_loss_func", "objective")):
        MCLTrainer(
            model=tiny_llama(),
            args=settings(tmp_path),
            train_dataset=ragged_pairs(),
            processing_class=word_tokenizer(),
            peft_config=hypotheses(),
            compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum(),
        )


@pytest.mark.parametrize("name", ["sp", "cp"])
def test_sequence_parallelism_is_refused(name):
    class Accelerator:
        parallelism_config = ParallelismConfig(**{f"{name}_size": 2})

    with pytest.raises(ValueError, match=says("Sequence parallelism", f"{name}_size=2", "Set the size to 1")):
        launches.check_parallelism(Accelerator())


@pytest.mark.parametrize("config", [None, ParallelismConfig(), ParallelismConfig(dp_replicate_size=2)])
def test_other_parallelism_is_not_refused(config):
    class Accelerator:
        parallelism_config = config
        num_processes = 2
        even_batches = True

    launches.check_parallelism(Accelerator())


def test_uneven_batches_are_refused_on_several_processes():
    class Accelerator:
        parallelism_config = None
        num_processes = 2
        even_batches = False

    with pytest.raises(ValueError, match=says("even_batches", "wait for ever", "Leave it at True")):
        launches.check_parallelism(Accelerator())
    Accelerator.num_processes = 1
    launches.check_parallelism(Accelerator())


LAUNCHED_BY_ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "world_size", "parts"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, 1, ("2 processes were launched", "--use_cpu")),
        ({"WORLD_SIZE": "4", "RANK": "0"}, 2, ("4 processes were launched",)),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 1, ("2 processes were launched", "OMPI_COMM_WORLD_SIZE=2")),
        ({"SLURM_STEP_NUM_TASKS": "2"}, 1, ("2 processes were launched", "srun", "torchrun")),
        ({"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "16", "RANK": "3"}, 16, None),
        (LAUNCHED_BY_ACCELERATE, 1, ("several processes", "starts only one", "torchrun --nproc_per_node")),
        ({"WORLD_SIZE": "2", "RANK": "0"}, 2, None),
        ({**LAUNCHED_BY_ACCELERATE, "WORLD_SIZE": "2", "RANK": "1"}, 2, None),
        ({**LAUNCHED_BY_ACCELERATE, "WORLD_SIZE": "1", "RANK": "0"}, 1, None),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, 1, None),
        ({}, 1, None),
    ],
)
def test_launches_with_fewer_processes_than_asked_for_are_refused(monkeypatch, variables, world_size, parts):
    for name in (*LAUNCHED_BY_ACCELERATE, *launches._PROCESSES_LAUNCHED, "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if parts is None:
        launches.check_launch(world_size, 1)
    else:
        with pytest.raises(RuntimeError, match=says(*parts)):
            launches.check_launch(world_size, 1)


def test_several_gpus_need_several_processes():
    with pytest.raises(
        RuntimeError, match=says("4 GPUs", "nn.DataParallel", "--num_processes 4", "CUDA_VISIBLE_DEVICES=0")
    ):
        launches.check_launch(1, 4)
    launches.check_launch(1, 0)


@pytest.mark.parametrize("kind", ["FSDP", "DeepSpeed"])
def test_sharding_that_does_not_happen_is_refused(monkeypatch, tmp_path, kind):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind.upper()}", "true")
    accelerator = Accelerator(cpu=True)
    monkeypatch.setitem(accelerator.state.__dict__, "distributed_type", DistributedType.MULTI_CPU)
    with pytest.raises(RuntimeError, match=says(f"{kind} was asked for", "MULTI_CPU", "recipes/accelerate")):
        launches.check_sharding(accelerator)
    monkeypatch.setitem(accelerator.state.__dict__, "distributed_type", DistributedType(kind.upper()))
    launches.check_sharding(accelerator)


def test_a_trained_head_is_refused_under_fsdp(tmp_path, monkeypatch):
    for modules, refused in ((["lm_head"], True), (["norm"], False)):
        trainer = trainer_for(tmp_path, peft_config=hypotheses(modules_to_save=modules))
        launches.check_trained_head(trainer.model, trainer.accelerator)
        with monkeypatch.context() as patch:
            patch.setitem(trainer.accelerator.state.__dict__, "distributed_type", DistributedType.FSDP)
            if refused:
                with pytest.raises(ValueError, match=says("LM head", "modules_to_save", "DeepSpeed")):
                    launches.check_trained_head(trainer.model, trainer.accelerator)
            else:
                launches.check_trained_head(trainer.model, trainer.accelerator)


def test_a_second_training_is_refused_under_deepspeed(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path)
    trainer.train()
    trainer.train()
    trainer.is_deepspeed_enabled = True
    trainer.model_wrapped = torch.nn.Identity()
    with pytest.raises(RuntimeError, match=says("DeepSpeed", "train once", "new trainer")):
        trainer.train()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named_before_training(tmp_path, value):
    trainer = trainer_for(tmp_path, save_strategy="steps", save_steps=1)
    name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if "layers.1" in n and "mclora_B" in n)
    parameter.data[1, 0, 0] = value
    with pytest.raises(ValueError, match=says("NaN or infinite", "1 of its", name)):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_weights_that_stop_being_finite_are_not_saved(tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                next(p for n, p in model.named_parameters() if "mclora_B" in n).data[2] = math.nan

    trainer = trainer_for(tmp_path, save_strategy="steps", save_steps=1, callbacks=[Break()])
    with pytest.raises(ValueError, match=says("NaN or infinite", "1 of its", "nothing is saved")):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_an_adapter_of_which_peft_leaves_out_layers_is_not_saved(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.save_model()
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    layers = trainer.model.get_base_model().model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    with pytest.raises(
        RuntimeError, match=says("only 14 of 28 tensors", "checkpoint wrapper", "gradient_checkpointing")
    ):
        trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_a_hypothesis_that_broke_is_an_error_in_the_next_step(tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                next(p for n, p in model.named_parameters() if "mclora_B" in n).data[2] = math.nan

    trainer = trainer_for(tmp_path, callbacks=[Break()])
    with pytest.raises(ValueError, match=says("NaN or infinite", "mclora_B")):
        trainer.train()
    assert trainer.state.global_step == 2


def test_a_base_model_that_is_broken_is_an_error_in_the_first_step(tmp_path):
    base = tiny_llama()
    base.model.norm.weight.data[0] = math.nan
    trainer = trainer_for(tmp_path, model=base)
    with pytest.raises(FloatingPointError, match=says("Hypothesis 0, 1, 2", "step 0", "base model")):
        trainer.train()


@pytest.mark.skipif(torch.accelerator.current_accelerator() is not None, reason="there is an accelerator")
def test_offloading_activations_from_nowhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match=says("activation_offloading", "no accelerator", "False")):
        trainer_for(tmp_path, activation_offloading=True)


@pytest.mark.parametrize("by_environment", [False, True])
def test_float16_on_a_cpu_is_refused(tmp_path, monkeypatch, by_environment):
    """accelerate would train in float32 and not say so."""
    if by_environment:  # As `accelerate launch --mixed_precision fp16` asks for it.
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=says("float16", "accelerator", "`bf16=True`")):
        trainer_for(tmp_path, fp16=not by_environment)


def test_unknown_option_in_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nrelaxed_epsilom: 0.1\n")
    with pytest.raises(ValueError, match="relaxed_epsilom"):
        TrlParser(MCLConfig).parse_args_and_config(["--config", str(path)])


def test_value_out_of_range_in_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nrelaxed_epsilon: 2\n")
    with pytest.raises(ValueError, match=says("relaxed_epsilon", "2")):
        TrlParser(MCLConfig).parse_args_and_config(["--config", str(path)])


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("objective: hard", "objective"),
        ("loss_normalization: batch", "loss_normalization"),
        ("relaxed_epsilon: x", "relaxed_epsilon"),
    ],
)
def test_wrong_choice_or_type_in_yaml(tmp_path, capsys, line, name):
    path = tmp_path / "config.yaml"
    path.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\n{line}\n")
    # argparse ends the program for what it can tell itself.
    with pytest.raises((ValueError, SystemExit)) as raised:
        TrlParser(MCLConfig).parse_args_and_config(["--config", str(path)])
    assert name in str(raised.value) + capsys.readouterr().err


# --- the model ---


def refused(tmp_path, model, peft_config, *parts, error=ValueError):
    with pytest.raises(error, match=says(*parts)):
        MCLTrainer(
            model=model,
            args=settings(tmp_path),
            train_dataset=ragged_pairs(),
            processing_class=word_tokenizer(),
            peft_config=peft_config,
        )


def test_a_base_model_without_hypotheses(tmp_path):
    advice = ("not an MCLORA model", "no `peft_config`", "MCLoraConfig", "get_peft_model")
    refused(tmp_path, tiny_llama(), None, *advice)
    # Before a model is loaded.
    refused(tmp_path, "no/such-model", None, *advice)


def test_a_configuration_of_plain_lora(tmp_path):
    refused(tmp_path, tiny_llama(), LoraConfig(**LORA), "peft_config", "MCLoraConfig", "LoraConfig")


def test_a_peft_model_of_plain_lora(tmp_path):
    lora = get_peft_model(tiny_llama(), LoraConfig(**LORA))
    refused(tmp_path, lora, None, "LoraConfig", "not an MCLORA model", "MCLoraConfig")
    refused(tmp_path, lora, hypotheses(), "LoraConfig", "not an MCLORA model")


def test_hypotheses_on_top_of_hypotheses(tmp_path):
    refused(tmp_path, with_hypotheses(tiny_llama()), hypotheses(), "PeftModel", "peft_config")


def test_an_adapter_that_was_loaded_for_inference(tmp_path):
    with_hypotheses(tiny_llama()).save_pretrained(tmp_path / "adapter")
    trainer = trainer_for(tmp_path, model=PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter"))
    assert math.isfinite(trainer.score(ragged_pairs()).summary()["wta_nll"])  # Good enough to score with.
    with pytest.raises(ValueError, match=says("no trainable parameters", "is_trainable=True")):
        trainer.train()


def test_a_target_that_matches_nothing(tmp_path):
    refused(tmp_path, tiny_llama(), hypotheses(target_modules=["no_such_layer"]), "no_such_layer")


@pytest.mark.parametrize(
    "options", [{"num_hypotheses": 0}, {"num_hypotheses": -1}, {"num_hypotheses": 2.5}, {"r": 0}, {"r": -4}]
)
def test_bad_values_of_the_adapter(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        hypotheses(**options)


# --- the data ---


def iterable(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize(
    "empty", [Dataset.from_list([]), ragged_pairs().select([]), iterable([])], ids=["new", "selected", "iterable"]
)
def test_an_empty_data_set(tmp_path, empty):
    with pytest.raises(ValueError, match=says("train_dataset", "empty")):
        trainer_for(tmp_path, data=empty)
    with pytest.raises(ValueError, match=says("eval_dataset", "empty")):
        trainer_for(tmp_path, eval_dataset=empty)
    with pytest.raises(ValueError, match=says(r"eval_dataset\['far'\]", "empty")):
        trainer_for(tmp_path, eval_dataset={"near": ragged_pairs(), "far": empty})


def test_no_data_set(tmp_path):
    with pytest.raises(ValueError, match=says("train_dataset", "required")):
        MCLTrainer(
            model=tiny_llama(), args=settings(tmp_path), processing_class=word_tokenizer(), peft_config=hypotheses()
        )


MESSAGE = {"role": "assistant", "content": "w1"}


@pytest.mark.parametrize(
    "completion",
    ["", "  \n", None, [], [{**MESSAGE, "content": ""}], [{**MESSAGE, "content": None}]],
    ids=["empty", "blank", "none", "no message", "empty message", "message of nothing"],
)
def test_an_empty_completion_is_named_by_its_row(tmp_path, completion):
    prompt, good = (
        ("w1", " w2") if not isinstance(completion, list) else ([{"role": "user", "content": "w1"}], [MESSAGE])
    )
    data = Dataset.from_list([{"prompt": prompt, "completion": value} for value in (good, good, completion, good)])
    with pytest.raises(ValueError, match=says("train_dataset", "empty completion in row 2", "filter")):
        trainer_for(tmp_path, data=data)
    with pytest.raises(ValueError, match=says("eval_dataset", "empty completion in row 2")):
        trainer_for(tmp_path, eval_dataset=data)


@pytest.mark.parametrize(
    "row",
    [{"question": "w1", "answer": "w2"}, {"prompt": "w1"}, {"completion": " w1"}, {"label": 3}],
    ids=lambda row: ", ".join(row),
)
def test_missing_columns_are_listed(tmp_path, row):
    for data in (Dataset.from_list([row] * 3), iterable([row] * 3)):
        with pytest.raises(
            ValueError, match=says("train_dataset", *sorted(row), "'prompt' and 'completion'", "rename_column")
        ):
            trainer_for(tmp_path, data=data)
    with pytest.raises(ValueError, match=says("eval_dataset", *sorted(row))):
        trainer_for(tmp_path, eval_dataset=Dataset.from_list([row] * 3))


def test_the_text_column_must_be_there(tmp_path):
    with pytest.raises(ValueError, match=says("train_dataset", "'story'", "dataset_text_field")):
        trainer_for(tmp_path, data=Dataset.from_list([{"text": "w1 w2"}]), dataset_text_field="story")


def test_every_completion_is_cut_away(tmp_path):
    data = Dataset.from_list([{"prompt": "w1 w2 w3 w4 w5", "completion": " w6"}] * 4)
    with pytest.raises(ValueError, match=says("train_dataset", "max_length=4", "Raise")):
        trainer_for(tmp_path, data=data, max_length=4)
    with pytest.raises(ValueError, match=says("eval_dataset", "max_length=4", "Raise")):
        trainer_for(
            tmp_path, data=Dataset.from_list([{"prompt": "w1", "completion": " w2"}]), eval_dataset=data, max_length=4
        )


def test_some_completions_are_cut_away(tmp_path):
    rows = [{"prompt": "w1 w2 w3 w4 w5", "completion": " w6"}, {"prompt": "w1", "completion": " w6 w7"}]
    trainer = trainer_for(tmp_path, data=Dataset.from_list(rows * 4), max_length=4)
    assert len(trainer.train_dataset) == 4
    trainer.train()
    with pytest.raises(ValueError, match=says("4 of the 8", "max_length=4")):
        trainer.score(Dataset.from_list(rows * 4))


# --- places ---


def test_an_output_directory_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=says("output_dir", "file/out", "cannot be written", "another directory")):
        trainer_for(tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_directory_without_permission(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ValueError, match=says("output_dir", "cannot be written")):
        trainer_for(tmp_path / "closed")


def test_the_output_directory_is_made_and_left_clean(tmp_path):
    trainer_for(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_nothing_to_resume_from(tmp_path):
    trainer = trainer_for(tmp_path)
    with pytest.raises(ValueError, match=says("no whole checkpoint", str(tmp_path), "save_steps")):
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)


# --- Ctrl-C ---


def test_an_interrupt_leaves_the_model_as_it_was(tmp_path):
    # As in a notebook, in the middle of a scoring pass: no route, no selected position and no mode may stay behind.
    model = with_hypotheses(tiny_llama(), lora_alpha=8)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    trainer = trainer_for(tmp_path, model=model, objective="wta", save_strategy="steps", save_steps=1)

    def interrupt(*args):
        # The third scoring pass: the calls without a graph.
        calls.append(torch.is_grad_enabled())
        if calls.count(False) == 3:
            raise KeyboardInterrupt

    calls = []
    hook = model.get_base_model().model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    hook.remove()
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        rows = torch.cat([model(**inputs, hypotheses=k).logits for k in range(3)])
        torch.testing.assert_close(model(**inputs, hypotheses="all").logits, rows)
        assert rows.shape == (3, 4, model.config.vocab_size)
        torch.testing.assert_close(model(**inputs).logits, rows[:1])
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


def test_the_same_trainer_goes_on_after_an_interrupt_as_if_there_had_been_none(tmp_path):
    def new_trainer(name, *callbacks):
        return trainer_for(
            tmp_path / name,
            model=with_hypotheses(tiny_llama(), lora_alpha=8),
            objective="random",
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=1,
            callbacks=list(callbacks),
        )

    class Interrupt(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            # In the middle of the third step, once.
            if state.global_step == 2 and not self.done:
                self.done = True
                raise KeyboardInterrupt

        done = False

    whole, cut = new_trainer("whole"), new_trainer("cut", Interrupt())
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    cut.train(resume_from_checkpoint=True)
    for name in ("loss", "wta_nll", "win_share/0", "win_share/1", "grad_norm"):
        assert logged(cut, name) == logged(whole, name), name


def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "trainer_ext" / "interrupted_run.py"), str(tmp_path / "cut")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them, and so their children, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as cut:
        for line in cut.stdout:
            if line.strip() == "step 8":
                cut.send_signal(signal.SIGINT)
                break
        errors = cut.communicate(timeout=60)[1]
    assert cut.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert sorted(path.name for path in (tmp_path / "cut").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]

    resumed = run(tmp_path / "cut", True, [])
    whole = run(tmp_path / "whole", False, [])
    assert [entry["step"] for entry in resumed] == list(range(1, STEPS + 1))
    assert resumed == whole
    assert (
        json.loads((tmp_path / "cut" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["global_step"]
        == STEPS
    )


# ------------------------------------------------------------------------------------------------------------
# What DeepSpeed needs


def test_deepspeed_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'peft-mcl\[deepspeed\]'"):
        settings(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ["ShareMemCommBuilder"]),
        ({"offload_optimizer": {"device": "cpu"}}, ["CPUAdamBuilder", "ShareMemCommBuilder"]),
        ({"offload_optimizer": {"device": "none"}}, ["ShareMemCommBuilder"]),
    ],
    ids=["nothing", "offloaded", "not offloaded"],
)
def test_what_deepspeed_has_to_build_is_built_or_named(tmp_path, monkeypatch, config, expected):
    accelerator = pytest.importorskip("deepspeed.accelerator")
    asked, error = [], None

    class Builder:
        NAME = name = "extension"

        def load(self, verbose):
            if error is not None:
                raise error

    class Device:
        device_name = staticmethod(lambda: "cpu")

        @staticmethod
        def create_op_builder(name):
            asked.append(name)
            return Builder()

    monkeypatch.setattr(accelerator, "get_accelerator", Device)
    monkeypatch.setattr("deepspeed.ops.__compatible_ops__", {"extension": True}, raising=False)
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": config})
    args = SimpleNamespace(deepspeed=True, deepspeed_plugin=plugin, optim="adamw_torch")
    launches.check_compiler(args)
    assert asked == expected
    error = RuntimeError("Error building extension: [1/2] c++ -O2\n/bin/sh: 1: c++: not found\nninja: build stopped")
    with pytest.raises(RuntimeError, match=r"'extension'.*c\+\+: not found.*apt-get install g\+\+"):
        launches.check_compiler(args)
    launches.check_compiler(SimpleNamespace(deepspeed=None))
    error = None
    lock = tmp_path / "py" / "extension" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    launches.check_compiler(args)
    os.utime(lock, (0, 0))
    with pytest.raises(RuntimeError, match=r"extension/lock' of a build .* minutes old.*Remove the file"):
        launches.check_compiler(args)
