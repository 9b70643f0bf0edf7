"""What the tests of launches start: whole runs of the trainer under whatever launcher, with all that it logs and saves.

torchrun --nproc_per_node 2 tests/trainer_ext/launched_run.py OUTPUT_DIR BATCH_SIZE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, set_seed

from tests.tiny import tiny_llama
from tests.trainer_ext.leaving import leave
from tests.trainer_ext.reference import hypotheses, ragged_pairs, trainer_for


# 21 rows and a global batch of 8: the last step of an epoch has 5.
ROWS, GLOBAL_BATCH = 21, 8
OBJECTIVES: dict[str, dict[str, Any]] = {
    "wta": {"objective": "wta"},
    "relaxed": {"objective": "relaxed", "relaxed_epsilon": 0.1},
    "annealed": {"objective": "annealed", "initial_temperature": 0.5, "final_temperature": 1e-3},
    "random": {"objective": "random"},
    "balanced": {"objective": "balanced"},
}
# With an optimizer that has states, whose step is still nearly linear in the gradient. Of 8 hypotheses some do not win for a while.
REVIVED: dict[str, Any] = {
    "optim": "adamw_torch",
    "adam_epsilon": 1e-2,
    "learning_rate": 0.05,
    "peft_config": hypotheses(8),
    "revive_after_steps": 2,
}
WITHOUT_NOISE = "revived, without noise"
CASES: dict[str, dict[str, Any]] = {
    **OBJECTIVES,
    "split": {
        "objective": "balanced",
        "balance_strength": 0.5,
        "target_shares": "tracked",
        "together_fraction": 0.34,
        "annealing_fraction": 0.8,
        "peft_config": hypotheses(shared_r=2, init_perturbation=0.1),
    },
    "matched": {"objective": "relaxed", "relaxed_epsilon": 0.1, "group_column": "group"},
    "revived": {"objective": "wta", **REVIVED},
    # So warm that equal hypotheses, which tie, are trained alike.
    WITHOUT_NOISE: {"objective": "annealed", "temperature_decay": 1.0, **REVIVED, "revive_perturbation": 0.0},
    "wta, mean of sequences": {"objective": "wta", "loss_normalization": "sequence"},
    "sampled losers": {"objective": "relaxed", "relaxed_epsilon": 0.3, "sample_losers": True},
    "remembered": {"objective": "wta", "score_every": 2},
    "checkpointed": {"objective": "annealed", "gradient_checkpointing": True},
    "without padding": {"objective": "wta", "padding_free": True, "max_length": None},
}
# A case of its own under DDP, which an evaluation before training must not do without.
EVALUATED = "evaluated before"
QUANTISED = "nf4"
METRICS = ("loss", "grad_norm", "wta_nll", "mean_nll", "worst_nll", "mixture_nll", "assignment_entropy", "temperature")
METRICS += ("revived",)
METRICS += tuple(f"win_share/{k}" for k in range(3))


def save_base(root: Path) -> None:
    """The base that is loaded in NF4, of widths that its kernels take. To be called before the launch."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    tiny_llama(**sizes).save_pretrained(root / "base")


def quantised(root: Path) -> dict[str, Any]:
    """As a user asks for a 4-bit base: by name, so that it is TRL that knows how to load it under each launcher."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return {
        "model": str(root / "base"),
        "quantization_config": nf4,
        "objective": "annealed",
        "model_init_kwargs": {"dtype": "float32"},
        "gradient_checkpointing": True,
    }


def run(case: str, root: Path, **options: Any) -> dict[str, Any]:
    """Train for two epochs, evaluate and save; returns what this process saw."""
    # The first hypotheses are drawn when the trainer is made.
    set_seed(0)
    directory = root / case.replace(", ", " ").replace(" ", "_")
    defaults = {
        "max_steps": -1,
        "num_train_epochs": 2,
        # A step is linear in the gradient, so that rounding stays rounding.
        "optim": "sgd",
        "learning_rate": 0.5,
        "per_device_eval_batch_size": 3,
    }
    chosen = quantised(root) if case == QUANTISED else CASES["annealed" if case == EVALUATED else case]
    trainer = trainer_for(
        directory,
        # 7 groups, of which a step cuts some.
        data=ragged_pairs(ROWS).add_column("group", [row // 3 for row in range(ROWS)]),
        eval_dataset=ragged_pairs(7, seed=5),
        **{**defaults, **chosen, **options},
    )
    if case == EVALUATED:
        trainer.evaluate()
    trainer.train()
    evaluated = trainer.evaluate()
    trainer.save_model()
    engine = trainer.model_wrapped
    return {
        "logs": [
            {name: log[name] for name in METRICS if name in log} for log in trainer.state.log_history if "loss" in log
        ],
        "evaluated": {name: evaluated[f"eval_{name}"] for name in METRICS if f"eval_{name}" in evaluated},
        "processes": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "wrapper": type(engine).__name__,
        "zero_stage": engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None,
        "adapter": str(directory / "adapter_model.safetensors"),
    }


def main() -> None:
    root, batch_size, cases = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    found = {case: run(case, root, per_device_train_batch_size=batch_size) for case in cases}
    rank = torch.distributed.get_rank()
    (root / f"process_{rank}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
