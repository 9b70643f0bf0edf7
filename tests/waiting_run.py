"""recipes/train_mcl.py as it is, with a trainer that waits at one place of the run while `tests/faults.py` does its damage.

The environment says where: WAIT_AT is a place, with the step it is reached in where there are several ("step 3"), and in the
folder WAIT_IN each process leaves its id in a file named after its rank, and goes on once there is a file `go`.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import trainer_ext


PLACE, FOLDER = os.environ["WAIT_AT"], Path(os.environ["WAIT_IN"])
RANK = os.environ.get("RANK", "0")


def wait_at(place: str) -> None:
    mine = FOLDER / f"{RANK}.pid"
    if place != PLACE or mine.exists():
        return
    partial = mine.with_suffix(".partial")
    partial.write_text(str(os.getpid()))
    partial.rename(mine)
    while not (FOLDER / "go").exists():
        time.sleep(0.02)


class WaitingTrainer(trainer_ext.MCLTrainer):
    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        wait_at("data")
        return super()._prepare_dataset(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        wait_at(f"step {self.state.global_step}")
        return super().training_step(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        wait_at(f"evaluation {self.state.global_step}")
        return super().prediction_step(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        # The weights and the optimizer are written, the state of the trainer and the manifest are not.
        wait_at(f"checkpoint {self.state.global_step}")
        super()._save_rng_state(output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:
            wait_at("before the adapter")
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        save = model.save_pretrained

        def save_and_wait(*args: Any, **kwargs: Any) -> None:
            save(*args, **kwargs)
            if output_dir == self.args.output_dir:
                wait_at("adapter")

        model.save_pretrained = save_and_wait
        try:
            super()._save(output_dir, state_dict)
        finally:
            del model.save_pretrained


if __name__ == "__main__":
    trainer_ext.MCLTrainer = WaitingTrainer
    sys.argv[0] = "recipes/train_mcl.py"
    runpy.run_path(sys.argv[0], run_name="__main__")
