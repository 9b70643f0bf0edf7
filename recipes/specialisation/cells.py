"""One cell of the experiments: a task, a method and a seed, trained, measured on held-out data and written to a file."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

from peft_mcl import MCLoraConfig
from recipes.evaluate import agreement
from recipes.specialisation.methods import METHODS, Method
from recipes.specialisation.tasks import TASKS, Task
from trainer_ext import MCLConfig, MCLTrainer
from trainer_ext.metrics import ScoreWindow, competition_metrics


# Below this part of the held-out sequences a hypothesis is dead.
DEAD_SHARE = 0.01
# How often, during training, the winners of the validation split are compared with the modes.
LOOKS = 5
DECODED_PROMPTS = 24
DECODED_TOKENS = 32


def run_cell(task: Task, name: str, seed: int, folder: Path, steps: int | None = None) -> dict[str, Any]:
    """Train and measure; returns everything that the report needs.

    Args:
        task ([`Task`]): What is learned.
        name (`str`): A name in `METHODS`.
        seed (`int`): Of the data, the first hypotheses and the order of training.
        folder (`Path`): For what the trainer writes and for merged base models.
        steps (`int`, *optional*): Optimizer steps, in place of the task's.
    """
    method, data = METHODS[name], task.data(seed)
    wall, cpu = time.monotonic(), cpu_seconds()
    if method.separate:
        # K runs, each as good as the next; their scores are put side by side.
        runs = [train(task, Method(plain=True), seed * 100 + k, data, folder, steps, r=task.r) for k in range(task.num_hypotheses)]
        windows = {split: side_by_side([run["windows"][split] for run in runs]) for split in runs[0]["windows"]}
        found = {**runs[0], "windows": windows, "texts": [text for run in runs for text in run["texts"]], "looks": []}
    else:
        found = train(task, method, seed, data, folder, steps)
    windows = found.pop("windows")
    return {
        "task": task.name,
        "method": name,
        "seed": seed,
        **found,
        **measure(windows["test"], windows["validation"], data["test"][task.label]),
        "wall_seconds": time.monotonic() - wall,
        "cpu_seconds": cpu_seconds() - cpu,
        "threads": torch.get_num_threads(),
    }


def train(
    task: Task,
    method: Method,
    seed: int,
    data: dict[str, Dataset],
    folder: Path,
    steps: int | None = None,
    r: int | None = None,
) -> dict[str, Any]:
    """One run of the trainer, the held-out scores, and what each hypothesis decodes."""
    set_seed(seed)
    count = 1 if method.plain else task.num_hypotheses
    total = task.num_hypotheses * task.r + 8 if method.plain and r is None else (r or task.r)
    options = {"task_type": "CAUSAL_LM", **task.adapter, **method.adapter, "r": total}
    # The same scale at every rank.
    options["lora_alpha"] = task.adapter["lora_alpha"] * total / task.r
    training = {**task.training, **method.training}
    if steps is not None:
        training["max_steps"] = steps
    plain = {split: rows.remove_columns(task.label) for split, rows in data.items()}
    looks = Looks(plain["validation"], data["validation"][task.label], training["max_steps"] // LOOKS)
    trainer = MCLTrainer(
        model=base_model(task, seed, folder),
        args=MCLConfig(
            output_dir=str(folder / "trainer"),
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
            logging_steps=5,
            disable_tqdm=True,
            card_prompts=0,
            **training,
        ),
        train_dataset=plain["train"],
        peft_config=MCLoraConfig(num_hypotheses=count, **options),
        callbacks=[looks],
    )
    looks.trainer = trainer
    started, cpu = time.monotonic(), cpu_seconds()
    trainer.train()
    spent = {"train_wall_seconds": time.monotonic() - started, "train_cpu_seconds": cpu_seconds() - cpu}
    windows = {split: trainer.score(plain[split]) for split in ("validation", "test")}
    return {
        "steps": trainer.state.global_step,
        "rank": total,
        "hypotheses": count,
        **spent,
        "logs": [log for log in trainer.state.log_history if "loss" in log],
        "looks": looks.found,
        "windows": windows,
        "texts": decode(trainer, plain["test"]) if "prompt" in plain["test"].column_names else [],
    }


class Looks(TrainerCallback):
    """Compares winners with modes a few times during training."""

    trainer: MCLTrainer

    def __init__(self, rows: Dataset, modes: list[str], every: int) -> None:
        self.rows, self.modes, self.every = rows, modes, max(every, 1)
        self.found: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            window = self.trainer.score(self.rows)
            agreed = agreement(self.modes, window.winners, window.scores.shape[1])
            self.found.append({"step": state.global_step, **agreed})


def base_model(task: Task, seed: int, folder: Path) -> Any:
    """The base model of a task, in bfloat16; with `trained_base`, one into which a LoRA of the mixture is merged."""
    model = AutoModelForCausalLM.from_pretrained(task.model(seed), dtype=torch.bfloat16)
    if not task.trained_base:
        return model
    raise NotImplementedError


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
    wins = torch.bincount(validation.winners, minlength=count).double()
    # One win more for each: a mixture must give every hypothesis some weight.
    weights = (wins + 1) / (wins + 1).sum()
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
