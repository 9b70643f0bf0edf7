"""What the opt-in savings of scoring cost in loss: remembered winners (`score_every`) and prefixes (`score_prefix`).

```bash
python recipes/savings.py --model_name_or_path ~/.cache/peft-mcl/smollm2-135m-instruct --dtype bfloat16 --use_cpu \
    --dataset_name ~/.cache/peft-mcl/bible-styles/train.jsonl --test_name ~/.cache/peft-mcl/bible-styles/test.jsonl
```

Trains the same hypotheses on the same sequences for several epochs with and without each saving, one run after the other
(seconds of such runs are rougher than those of `recipes/benchmark.py`, which interleaves them), and scores held-out data. Then
asks of the model trained without savings how often a prefix names another winner than the whole sequence.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
from trl import TrlParser


# Run by path, Python looks for `recipes` beside this file.
sys.path.insert(0, str(Path(__file__).parents[1]))

from peft_mcl import MCLoraConfig
from recipes.files import write_whole
from trainer_ext import MCLConfig, MCLTrainer


PREFIXES = (1, 2, 4, 8, 16, 32)


@dataclass
class SavingsArguments:
    """On what to measure, and how long."""

    model_name_or_path: str = field(metadata={"help": "A causal language model."})
    dataset_name: str = field(metadata={"help": "A local JSONL file with the columns prompt and completion."})
    test_name: str = field(metadata={"help": "A local JSONL file with held-out sequences."})
    dtype: str = field(default="auto", metadata={"help": "Of the base model."})
    num_hypotheses: int = field(default=5, metadata={"help": "K."})
    sequences: int = field(default=320, metadata={"help": "Training sequences."})
    test_sequences: int = field(default=360, metadata={"help": "Held-out sequences."})
    epochs: int = field(default=4, metadata={"help": "Times that each training sequence is seen."})
    batch_size: int = field(default=8, metadata={"help": "Sequences of an optimizer step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    annealing_fraction: float = field(default=0.25, metadata={"help": "Part of training with warm annealing."})
    initial_temperature: float = field(default=0.5, metadata={"help": "In nats per token."})
    final_temperature: float = field(default=1e-3, metadata={"help": "In nats per token."})
    max_length: int = field(default=128, metadata={"help": "Longest sequence, in tokens."})
    seed: int = field(default=0, metadata={"help": "Of the adapters and the order of the data."})
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU."})
    runs: list[str] = field(default_factory=list, metadata={"help": "Some of the runs, by name; all by default."})
    output: str = field(default="outputs/savings.json", metadata={"help": "The figures as JSON."})


RUNS: dict[str, dict[str, Any]] = {
    "plain LoRA (K = 1)": {},
    "all scores": {},
    "score_every=2": {"score_every": 2},
    "score_every=4": {"score_every": 4},
    "score_prefix=8": {"score_prefix": 8},
    "score_every=4, score_prefix=8": {"score_every": 4, "score_prefix": 8},
}


class StepClock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begin)


def main(args: SavingsArguments) -> None:
    disable_progress_bars()
    unknown = set(args.runs) - set(RUNS)
    if unknown:
        raise ValueError(f"`runs`: there is no {sorted(unknown)}, only {list(RUNS)}.")
    train = load(args.dataset_name, args.sequences, "dataset_name")
    test = load(args.test_name, args.test_sequences, "test_name")
    figures: dict[str, Any] = {"arguments": vars(args), "threads": torch.get_num_threads(), "runs": {}, "prefixes": {}}
    for name in args.runs or RUNS:
        trainer, figures["runs"][name] = run(name, train, test, args)
        if name == "all scores":
            figures["prefixes"] = wrong_winners(trainer, test)
        write_whole(Path(args.output), json.dumps(figures, indent=2) + "\n")
    show(figures)


def load(path: str, count: int, option: str) -> Dataset:
    if not Path(path).is_file():
        raise ValueError(f"`{option}`: there is no file {path!r}. Check the path.")
    data = load_dataset("json", data_files=path, split="train")
    return data.select_columns(["prompt", "completion"]).select(range(min(count, len(data))))


def run(name: str, train: Dataset, test: Dataset, args: SavingsArguments) -> tuple[MCLTrainer, dict[str, Any]]:
    """Train once and score the held-out data."""
    set_seed(args.seed)
    count = 1 if "K = 1" in name else args.num_hypotheses
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=args.dtype)
    clock = StepClock()
    config = MCLConfig(
        output_dir=tempfile.mkdtemp(),
        objective="annealed",
        initial_temperature=args.initial_temperature,
        final_temperature=args.final_temperature,
        annealing_fraction=args.annealing_fraction,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        max_length=args.max_length,
        gradient_checkpointing=False,
        use_cpu=args.use_cpu,
        bf16=args.dtype == "bfloat16",
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=args.seed,
        **RUNS[name],
    )
    trainer = MCLTrainer(
        model=model,
        args=config,
        train_dataset=train,
        processing_class=AutoTokenizer.from_pretrained(args.model_name_or_path),
        peft_config=MCLoraConfig(
            num_hypotheses=count, r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    metrics = trainer.evaluate(test)
    flips = [log["winner_flips"] for log in trainer.state.log_history if "winner_flips" in log]
    final = clock.seconds[int(len(clock.seconds) * args.annealing_fraction) + 1 :]
    return trainer, {
        "seconds_per_step": statistics.mean(clock.seconds),
        "seconds_per_step_after_annealing": statistics.mean(final),
        "winner_flips": flips,
        **{key: metrics[f"eval_{key}"] for key in ("wta_nll", "mixture_nll", "mean_nll", "assignment_entropy")},
        "win_shares": [metrics[f"eval_win_share/{k}"] for k in range(count)],
    }


def wrong_winners(trainer: MCLTrainer, test: Dataset) -> dict[str, float]:
    """The part of the sequences for which the first n tokens of the completion name another winner, by n."""
    whole = trainer.score(test)
    tokenizer = trainer.processing_class
    rows = []
    for prompt, completion in zip(test["prompt"], test["completion"], strict=True):
        start = tokenizer(prompt)["input_ids"]
        ids = (start + tokenizer(completion)["input_ids"])[: trainer.args.max_length]
        rows.append((ids, len(start)))
    found = {}
    for count in PREFIXES:
        data = Dataset.from_list(
            [
                {
                    "input_ids": ids,
                    "labels": [t if start <= i < start + count else -100 for i, t in enumerate(ids)],
                }
                for ids, start in rows
            ]
        )
        found[str(count)] = (trainer.score(data).winners != whole.winners).float().mean().item()
    return found


def show(figures: dict[str, Any]) -> None:
    console = Console(width=120)
    runs = figures["runs"]
    plain, exact = runs.get("plain LoRA (K = 1)"), runs.get("all scores")
    table = Table(
        title=f"K = {figures['arguments']['num_hypotheses']}, {figures['threads']} threads", title_justify="left"
    )
    for column in (
        "run",
        "s/step",
        "x LoRA",
        "after annealing",
        "x LoRA",
        "winner flips",
        "wta_nll",
        "lost",
        "mixture",
    ):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, own in runs.items():
        step, final = own["seconds_per_step"], own["seconds_per_step_after_annealing"]
        table.add_row(
            name,
            f"{step:.2f}",
            f"{step / plain['seconds_per_step']:.2f}" if plain else "-",
            f"{final:.2f}",
            f"{final / plain['seconds_per_step_after_annealing']:.2f}" if plain else "-",
            ", ".join(f"{share:.3f}" for share in own["winner_flips"]) or "-",
            f"{own['wta_nll']:.3f}",
            f"{100 * (own['wta_nll'] / exact['wta_nll'] - 1):+.2f} %" if exact and own is not plain else "-",
            f"{own['mixture_nll']:.3f}",
        )
    console.print(table)
    for count, share in figures["prefixes"].items():
        console.print(
            f"The first {count} tokens name another winner for {100 * share:.1f} % of the held-out sequences."
        )


if __name__ == "__main__":
    main(*TrlParser((SavingsArguments,)).parse_args_and_config())
