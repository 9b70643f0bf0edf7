"""Two thousand steps with evaluation and checkpoints: is memory flat, is the pace steady, does a hypothesis die?

```bash
make long-run
```

A tiny Llama learns to copy the last word of a prompt three times in one of three vocabularies, drawn at random: three modes.
Prints a table with one line for each 200 steps.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from datasets import Dataset
from transformers import TrainerCallback

from tests.tiny import tiny_llama
from tests.trainer_ext.reference import WORDS, trainer_for


STEPS, EVERY = 2000, 200
NUM_MODES = 3


def three_modes(rows: int, seed: int) -> Dataset:
    generator = random.Random(seed)
    third = len(WORDS) // NUM_MODES
    found = []
    for _ in range(rows):
        prompt = generator.choices(range(third), k=generator.randint(2, 12))
        mode = generator.randrange(NUM_MODES)
        found.append(
            {
                "prompt": " ".join(WORDS[word] for word in prompt),
                "completion": " " + " ".join([WORDS[mode * third + prompt[-1]]] * generator.randint(1, 6)),
            }
        )
    return Dataset.from_list(found)


class Watch(TrainerCallback):
    """Memory of the process and seconds of the steps alone, every 200 steps."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float, float]] = []
        self._process = psutil.Process()
        self._seconds = self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds += time.perf_counter() - self._began
        if state.global_step % EVERY == 0:
            self.rows.append((state.global_step, self._process.memory_info().rss / 2**20, EVERY / self._seconds))
            self._seconds = 0.0


def main() -> None:
    watch = Watch()
    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_for(
            Path(directory),
            model=tiny_llama(hidden_size=64, intermediate_size=128),
            data=three_modes(4000, seed=0),
            eval_dataset=three_modes(100, seed=1),
            callbacks=[watch],
            max_steps=STEPS,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            logging_steps=50,
            eval_strategy="steps",
            eval_steps=EVERY,
            save_strategy="steps",
            save_steps=EVERY,
            save_total_limit=2,
            initial_temperature=0.5,
            final_temperature=1e-3,
        )
        trainer.train()
        checkpoints = sorted(path.name for path in Path(directory).glob("checkpoint-*"))
    evaluated = {log["step"]: log for log in trainer.state.log_history if "eval_wta_nll" in log}
    print("| step | memory, MiB | steps a second | eval best of 3 | eval mean of 3 | win shares |")
    print("|---|---|---|---|---|---|")
    for step, memory, pace in watch.rows:
        log = evaluated[step]
        shares = " / ".join(f"{log[f'eval_win_share/{k}']:.2f}" for k in range(3))
        print(
            f"| {step} | {memory:.0f} | {pace:.1f} | {log['eval_wta_nll']:.3f} | {log['eval_mean_nll']:.3f} | {shares} |"
        )
    print(f"\nCheckpoints left: {', '.join(checkpoints)}.", file=sys.stderr)


if __name__ == "__main__":
    main()
