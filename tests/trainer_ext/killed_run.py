"""What the tests of kill -9 start: a whole run for comparison, and one that ends at once in the middle or goes on after that.

torchrun --nproc_per_node 2 tests/trainer_ext/killed_run.py OUTPUT_DIR between|during|not

What is started first in a directory makes the whole run, too.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed

from tests.trainer_ext.leaving import leave
from tests.trainer_ext.reference import hypotheses, ragged_pairs, trainer_for
from trainer_ext import MCLTrainer


STEPS, SAVE_STEPS = 8, 2
# Between the checkpoints of steps 4 and 6, and while that of step 6 is written.
KILLED_BETWEEN, KILLED_DURING = 5, 6
NAMES = (
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "wta_nll",
    "mean_nll",
    "temperature",
    "win_share/0",
    "win_share/1",
)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillBetween(TrainerCallback):
    """The last process is gone."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED_BETWEEN and args.process_index == args.world_size - 1:
            kill()


def make(directory: Path, **options: Any) -> MCLTrainer:
    set_seed(0)
    return trainer_for(
        directory,
        data=ragged_pairs(21),
        # Dropout, so that the random states matter.
        peft_config=hypotheses(lora_dropout=0.2),
        objective="annealed",
        initial_temperature=0.5,
        final_temperature=1e-3,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        **options,
    )


def logs(trainer: MCLTrainer) -> list[dict[str, float]]:
    return [{name: log[name] for name in NAMES} for log in trainer.state.log_history if "loss" in log]


def main() -> None:
    root, phase = Path(sys.argv[1]), sys.argv[2]
    is_first = not (root / "whole.json").exists()
    if is_first:
        whole = make(root / "whole")
        whole.train()
        if whole.is_world_process_zero():
            (root / "whole.json").write_text(json.dumps(logs(whole)))
    trainer = make(root / "cut", callbacks=[KillBetween()] if phase == "between" else None)
    if phase == "during":
        save = trainer._save_rng_state

        def save_and_die(output_dir: str) -> None:
            save(output_dir)
            # The other processes have written their part, the first has not yet said how far training is.
            if trainer.state.global_step == KILLED_DURING and trainer.is_world_process_zero():
                kill()

        trainer._save_rng_state = save_and_die
    trainer.train(resume_from_checkpoint=not is_first)
    if trainer.is_world_process_zero():
        (root / "cut.json").write_text(json.dumps(logs(trainer)))
    leave()


if __name__ == "__main__":
    main()
