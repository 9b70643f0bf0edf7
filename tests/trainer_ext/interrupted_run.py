"""What the test of Ctrl-C launches: a run that saves checkpoints and can be resumed.

python tests/trainer_ext/interrupted_run.py OUTPUT_DIR [--resume]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tests.trainer_ext.reference import trainer_for


STEPS = 12


class Announce(TrainerCallback):
    """Tells the test how far the run is, and gives it time to interrupt."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(f"step {state.global_step}", flush=True)
        if state.global_step == 8:
            time.sleep(60)


def run(output_dir: Path, resume: bool, callbacks: list[TrainerCallback]) -> list[dict[str, float]]:
    """The training logs of the whole run, without their times."""
    trainer = trainer_for(
        output_dir,
        max_steps=STEPS,
        objective="annealed",
        annealing_fraction=0.9,
        final_temperature=1e-2,
        save_strategy="steps",
        save_steps=3,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    names = ("step", "loss", "wta_nll", "temperature", "win_share/0", "win_share/1")
    return [{name: entry[name] for name in names} for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    resuming = "--resume" in sys.argv
    logs = run(directory, resuming, [] if resuming else [Announce()])
    (directory / "logs.json").write_text(json.dumps(logs))
