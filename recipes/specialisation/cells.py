"""One cell of the experiments: a task, a method and a seed, trained, measured on held-out data and written to a file."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed

from peft_mcl import MCLoraConfig
from recipes.specialisation.methods import METHODS, SHARED, Method
from recipes.specialisation.tasks import Task
from trainer_ext import MCLConfig, MCLTrainer
from trainer_ext.evaluation import agreement
from trainer_ext.metrics import ScoreWindow, competition_metrics, win_weights


# Below this part of the held-out sequences a hypothesis is dead.
DEAD_SHARE = 0.01
# How often, during training, the winners of the validation split are compared with the modes.
LOOKS = 3
DECODED_PROMPTS = 12
DECODED_TOKENS = 32


def run_cell(task: Task, name: str, seed: int, bases: Path, keep: Path, steps: int | None = None) -> dict[str, Any]:
    """Train and measure; returns everything that the report needs.

    Args:
        task ([`Task`]): What is learned.
        name (`str`): A name in `METHODS`.
        seed (`int`): Of the data, the first hypotheses and the order of training.
        bases (`Path`): For what the trainer writes, and for base models that are trained first.
        keep (`Path`): Where the trained adapter goes; with several LoRAs, into folders `0`, `1`... in it.
        steps (`int`, *optional*): Optimizer steps, in place of the task's.
    """
    method, data = METHODS[name], task.data(seed)
    wall, cpu = time.monotonic(), cpu_seconds()
    if method.separate or method.told:
        # Runs of one LoRA each, whose scores are put side by side.
        runs = train_apart(task, method, seed, data, bases, keep, steps)
        windows = {split: side_by_side([run["windows"][split] for run in runs]) for split in runs[0]["windows"]}
        texts = [text for run in runs for text in run["texts"]]
        found = {**runs[0], "hypotheses": len(runs), "windows": windows, "texts": texts}
        for cost in ("train_wall_seconds", "train_cpu_seconds"):
            found[cost] = sum(run[cost] for run in runs)
    else:
        found = train(task, method, seed, data, bases, keep, steps)
    windows = found.pop("windows")
    return {
        "task": task.name,
        "method": name,
        "seed": seed,
        "asked_steps": steps or task.training["max_steps"],
        **found,
        **measure(windows["test"], windows["validation"], data["test"][task.label]),
        "wall_seconds": time.monotonic() - wall,
        "cpu_seconds": cpu_seconds() - cpu,
        "threads": torch.get_num_threads(),
    }


def train_apart(
    task: Task, method: Method, seed: int, data: dict[str, Dataset], bases: Path, keep: Path, steps: int | None
) -> list[dict[str, Any]]:
    """One LoRA after the other: with seeds of their own on all data, or one for each mode."""
    if method.separate:
        seeds = [seed * 100 + k for k in range(task.num_hypotheses)]
        return [train(task, method, one, data, bases, keep / str(place), steps) for place, one in enumerate(seeds)]
    modes = sorted(set(data["train"][task.label]))
    part = (steps or task.training["max_steps"]) // len(modes)
    found = []
    for place, mode in enumerate(modes):
        rows = data["train"]
        own = rows.select([row for row, label in enumerate(rows[task.label]) if label == mode])
        found.append(train(task, method, seed, {**data, "train": own}, bases, keep / str(place), part))
    return found


def trainer_of(
    task: Task,
    method: Method,
    seed: int,
    data: dict[str, Dataset],
    bases: Path,
    steps: int | None = None,
    r: int | None = None,
) -> MCLTrainer:
    """The trainer of one run: all hypotheses, or one LoRA.

    A `plain` LoRA gets all ranks of hypotheses with a shared part together, unless `r` is given.
    """
    set_seed(seed)
    count = 1 if method.plain or method.separate or method.told else task.num_hypotheses
    own = method.adapter.get("r", task.r)
    rank = r or (task.num_hypotheses * SHARED["r"] + SHARED["shared_r"] if method.plain else own)
    adapter = {"task_type": "CAUSAL_LM", **task.adapter, **method.adapter, "r": rank}
    # The same scale at every rank.
    adapter["lora_alpha"] = task.adapter["lora_alpha"] * rank / task.r
    training = {**task.training, **method.training}
    if steps is not None:
        training["max_steps"] = steps
    # Only what the trainer knows: a label must not reach it.
    columns = data["train"].remove_columns(task.label)
    trainer = (NoisyScores if method.noisy_scores else MCLTrainer)(
        model=base_model(task, seed, bases),
        args=MCLConfig(
            output_dir=tempfile.mkdtemp(dir=bases, prefix="run-"),
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
            logging_steps=5,
            disable_tqdm=True,
            card_prompts=0,
            **training,
        ),
        train_dataset=columns,
        peft_config=MCLoraConfig(num_hypotheses=count, **adapter),
    )
    if method.one_a:
        tie_a(trainer.model)
    return trainer


def tie_a(model: nn.Module) -> None:
    """Let all hypotheses have one A: they begin with the first one's, and each gets the sum of all gradients."""
    for name, parameter in model.named_parameters():
        if "mclora_A" in name:
            with torch.no_grad():
                parameter.copy_(parameter[:1].expand_as(parameter))
            parameter.register_hook(lambda gradient: gradient.sum(dim=0, keepdim=True).expand_as(gradient))


def train(
    task: Task,
    method: Method,
    seed: int,
    data: dict[str, Dataset],
    bases: Path,
    keep: Path,
    steps: int | None = None,
) -> dict[str, Any]:
    """One run of the trainer, the held-out scores, and what each hypothesis decodes."""
    trainer = trainer_of(task, method, seed, data, bases, steps)
    trainer.remove_callback(PrinterCallback)
    held_out = {split: data[split].remove_columns(task.label) for split in ("validation", "test")}
    looks = Looks(trainer, held_out["validation"], data["validation"][task.label])
    trainer.add_callback(looks)
    wall, cpu = time.monotonic(), cpu_seconds()
    trainer.train()
    spent = {"train_wall_seconds": time.monotonic() - wall, "train_cpu_seconds": cpu_seconds() - cpu}
    trainer.model.save_pretrained(keep)
    config = trainer.model.peft_config["default"]
    return {
        "steps": trainer.state.global_step,
        "rank": config.r + config.shared_r,
        "hypotheses": config.num_hypotheses,
        **spent,
        "logs": [log for log in trainer.state.log_history if "loss" in log],
        "looks": looks.found,
        "windows": {
            "validation": looks.last or trainer.score(held_out["validation"]),
            "test": trainer.score(held_out["test"]),
        },
        "texts": decode(trainer, held_out["test"]) if "prompt" in held_out["test"].column_names else [],
    }


class NoisyScores(MCLTrainer):
    """Chooses winners with the noise of dropout, to measure what that costs."""

    def _scoring_mode(self, is_training: bool) -> AbstractContextManager[None]:
        return nullcontext() if is_training else super()._scoring_mode(is_training)


class Looks(TrainerCallback):
    """Compares winners with modes a few times during training."""

    def __init__(self, trainer: MCLTrainer, rows: Dataset, modes: list[str]) -> None:
        self.trainer, self.rows, self.modes = trainer, rows, modes
        self.found: list[dict[str, Any]] = []
        self.last: ScoreWindow | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_due = state.global_step % -(-state.max_steps // LOOKS) == 0 or state.global_step == state.max_steps
        if is_due and self.trainer.model.num_hypotheses > 1:
            self.last = self.trainer.score(self.rows)
            agreed = agreement(self.modes, self.last.winners, self.last.scores.shape[1])
            self.found.append({"step": state.global_step, **agreed})


def base_model(task: Task, seed: int, bases: Path) -> Any:
    """The base model of a task; with `trained_base`, one into which a LoRA of the mixture is merged, kept in `bases`."""
    dtype = torch.bfloat16 if task.training["bf16"] else torch.float32
    if not task.trained_base:
        return AutoModelForCausalLM.from_pretrained(task.model(seed), dtype=dtype)
    merged = bases / f"{task.name}.seed{seed}"
    with FileLock(f"{merged}.lock"):
        if not merged.exists():
            first = replace(task, trained_base=False)
            trainer = trainer_of(first, Method(task.base_training, plain=True), seed, first.data(seed), bases)
            trainer.train()
            # In float32: an update is lost in the rounding of bfloat16 weights.
            model = trainer.model.float().merge_and_unload()
            partial = Path(f"{merged}.partial")
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(task.model(seed)).save_pretrained(partial)
            os.replace(partial, merged)
    return AutoModelForCausalLM.from_pretrained(merged, dtype=dtype)


def side_by_side(windows: list[ScoreWindow]) -> ScoreWindow:
    """The scores of K models with one hypothesis each, as those of one with K."""
    joined = ScoreWindow()
    scores = torch.cat([window.scores for window in windows], dim=1)
    joined.add(scores, windows[0].num_tokens, scores.argmax(dim=1))
    return joined


def measure(test: ScoreWindow, validation: ScoreWindow, modes: list[str]) -> dict[str, Any]:
    """The figures of a cell, on the test split; what the mixture weighs its hypotheses by comes from the validation split."""
    count = test.scores.shape[1]
    figures = competition_metrics(test.scores, test.num_tokens, test.winners)
    shares = [figures.pop(f"win_share/{k}") for k in range(count)]
    wins = torch.bincount(validation.winners, minlength=count)
    weights = torch.tensor(win_weights(wins.tolist()), dtype=torch.float64)
    mixture = torch.logsumexp(test.scores.double() + weights.log(), dim=1)
    return {
        "figures": {**figures, "mixture_nll": -mixture.sum().item() / int(test.num_tokens.sum())},
        "win_shares": shares,
        "dead": sum(share < DEAD_SHARE for share in shares),
        "tokens_per_sequence": test.num_tokens.double().mean().item(),
        "agreement": agreement(modes, test.winners, count),
    }


def decode(trainer: MCLTrainer, rows: Dataset) -> list[list[str]]:
    """What each hypothesis answers, greedily: for each hypothesis the texts of the first prompts."""
    model, tokenizer = trainer.model, trainer.processing_class
    prompts = list(dict.fromkeys(rows["prompt"]))[:DECODED_PROMPTS]
    texts: list[list[str]] = [[] for _ in range(model.num_hypotheses)]
    model.eval()
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
        found = model.generate(
            **inputs, max_new_tokens=DECODED_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        new = found[:, inputs["input_ids"].shape[1] :]
        for k, text in enumerate(tokenizer.batch_decode(new, skip_special_tokens=True)):
            texts[k].append(text.strip().split("\n")[0])
    return texts


def cpu_seconds() -> float:
    """What this process has spent, in seconds of one core."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
