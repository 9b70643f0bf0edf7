"""What the test of saved hypotheses launches: a short run on two processes that pushes at a checkpoint and at the end.

ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 tests/trainer_ext/saving_run.py OUTPUT_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.trainer_ext.leaving import leave
from tests.trainer_ext.reference import trainer_for


if __name__ == "__main__":
    trainer = trainer_for(
        Path(sys.argv[1]),
        objective="wta",
        save_hypotheses=True,
        push_to_hub=True,
        hub_model_id="user/trained",
        hub_strategy="every_save",
        save_strategy="steps",
        save_steps=3,
        max_steps=3,
    )
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    trainer.push_to_hub()
    leave()
