"""What the test of several processes launches: short runs of the trainer whose inputs, weights and gradients are kept.

ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 tests/trainer_ext/two_processes.py OUTPUT_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

import trainer_ext.trainer as trainer_module
from tests.trainer_ext.leaving import leave
from tests.trainer_ext.reference import (
    Gradients,
    RecordingCollator,
    adapted_llama,
    logged,
    padded_batch,
    ragged_pairs,
    ragged_rows,
    tokenized,
    trainer_for,
    unpacked,
)
from trainer_ext import MCLTrainer


# Two processes with two micro-batches of two rows: the eight rows are one optimizer step.
ROWS, BATCH_SIZE, ACCUMULATION, STEPS = 8, 2, 2, 2
COLD = {"objective": "annealed", "initial_temperature": 1e-5, "final_temperature": 1e-9, "temperature_decay": 1.0}
CASES: dict[str, dict[str, Any]] = {
    f"{options['objective']}, {normalization}": {**options, "loss_normalization": normalization}
    for normalization in ("token", "sequence")
    for options in (
        {"objective": "wta"},
        {"objective": "relaxed", "relaxed_epsilon": 0.1},
        {"objective": "annealed", "initial_temperature": 0.5, "temperature_decay": 0.9},
        {"objective": "random"},
    )
} | {
    "processes of one mind": COLD,
    "different numbers of scoring calls": {"objective": "wta"},
    "remembered": {"objective": "wta", "score_every": 2},
    "sampled losers": {"objective": "relaxed", "relaxed_epsilon": 0.3, "sample_losers": True},
    "without padding": {"objective": "wta", "padding_free": True, "data_collator": None},
}


def rows_of(case: str) -> Any:
    if case == "processes of one mind":
        # The first process sees nothing but rows without labels, all of whose hypotheses tie; the second sees the rest. So
        # one would run all rows at once and the other score first, if they did not ask each other.
        empty = ([5, 6, 7], [-100, -100, -100])
        first, second, third, fourth = (([3 + row, 20 + row, 40 + row],) * 2 for row in range(4))
        return tokenized([empty, empty, first, second, empty, empty, third, fourth])
    if case == "different numbers of scoring calls":
        # The first process gets rows of one length; in the second the short ones are scored apart from the long ones.
        short = [([3 + row, 20, 40 + row],) * 2 for row in range(3)]
        long = [(list(range(5 + row, 55 + row)) * 3,) * 2 for row in range(1)]
        return tokenized(2 * [short[0], short[1], short[2], *long])
    return ragged_rows(ROWS, without_labels=(3,))


def run(case: str, output_dir: Path, **options: Any) -> dict[str, Any]:
    """Train at learning rate zero and evaluate; returns what this process saw."""
    collator, gradients, weights, calls = RecordingCollator(), Gradients(), [], []
    packed: list[dict[str, Any]] = []

    current: list[torch.Tensor] = []

    def record_weights(*args: Any, **kwargs: Any) -> Any:
        found = assignment(*args, **kwargs)
        current.append(found[0].clone())
        return found

    def record_run(self: Any, model: Any, batch: Any, own: torch.Tensor, is_counted: torch.Tensor) -> Any:
        current.append(own.clone())
        return weighted(self, model, batch, own, is_counted)

    def record_weights_of_batch(self: Any, *args: Any) -> Any:
        current.clear()
        answer = compete(self, *args)
        weights.append(current[-1])
        return answer

    def record_call(*args: Any) -> Any:
        calls.append("run")
        return running(*args)

    def record_scoring(*args: Any) -> Any:
        calls.append(f"score in {len(args[4])} calls")
        return scoring(*args)

    assignment, trainer_module.assignment_weights = trainer_module.assignment_weights, record_weights
    weighted, MCLTrainer._run_weighted = MCLTrainer._run_weighted, record_run  # type: ignore[method-assign]
    compete, MCLTrainer._compete = MCLTrainer._compete, record_weights_of_batch  # type: ignore[method-assign]
    running, trainer_module.score_tokens = trainer_module.score_tokens, record_call
    scoring, trainer_module.score_sequences = trainer_module.score_sequences, record_scoring
    try:
        set_seed(0)
        defaults = {
            "learning_rate": 0.0,
            "max_grad_norm": 0.0,
            "max_length": None,
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH_SIZE,
            "per_device_eval_batch_size": BATCH_SIZE,
            "gradient_accumulation_steps": ACCUMULATION,
            "train_sampling_strategy": "sequential",
            "card_prompts": 1,
        }
        trainer = trainer_for(
            output_dir,
            model=adapted_llama(),
            data=rows_of(case),
            eval_dataset=ragged_pairs(7, seed=5),
            callbacks=[gradients],
            **{"data_collator": collator, **defaults, **CASES[case], **options},
        )
        if trainer.padding_free:
            collate = trainer.data_collator
            trainer.data_collator = lambda rows: packed.append(collate(rows)) or packed[-1]
        trainer.train()
        batches = [padded_batch(unpacked(batch)) for batch in packed] or collator.batches
        found = {"batches": batches[: STEPS * ACCUMULATION], "weights": list(weights), "calls": list(calls)}
        metrics = trainer.evaluate()
        trainer.save_model()
    finally:
        trainer_module.assignment_weights = assignment
        MCLTrainer._run_weighted, MCLTrainer._compete = weighted, compete  # type: ignore[method-assign]
        trainer_module.score_tokens, trainer_module.score_sequences = running, scoring
    return {
        **found,
        "gradients": gradients.steps,
        "logs": trainer.state.log_history,
        "losses": logged(trainer, "loss"),
        "metrics": {
            name: value for name, value in metrics.items() if "per_second" not in name and "runtime" not in name
        },
        "card": (output_dir / "README.md").read_text() if trainer.is_world_process_zero() else "",
        "processes": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "wrapper": type(trainer.model_wrapped).__name__,
    }


def main() -> None:
    root = Path(sys.argv[1])
    found = {case: run(case, root / "out") for case in CASES}
    torch.save(found, root / f"process_{torch.distributed.get_rank()}.pt")
    leave()


if __name__ == "__main__":
    main()
