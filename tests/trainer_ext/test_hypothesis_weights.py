"""The win shares of training and evaluation as the weights of the saved hypotheses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import TrainerCallback

from tests.trainer_ext.reference import logged, ragged_pairs, trainer_for


def saved_weights(folder: Path) -> list[float]:
    return json.loads((folder / "adapter_config.json").read_text())["hypothesis_weights"]


def smoothed(trainer, prefix: str, count: int) -> list[float]:
    """By hand: one win more for each hypothesis."""
    wins = [round(logged(trainer, f"{prefix}win_share/{k}")[-1] * count) for k in range(3)]
    return [(n + 1) / (count + 3) for n in wins]


def test_of_the_last_training_sequences_without_an_evaluation(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model()
    assert saved_weights(tmp_path) == pytest.approx(smoothed(trainer, "", 4))
    assert all(weight > 0 for weight in saved_weights(tmp_path))


def test_of_the_last_evaluation_also_after_resuming(tmp_path):
    options = {
        "eval_dataset": ragged_pairs(7, seed=5),
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
    }
    whole = trainer_for(tmp_path, max_steps=5, save_steps=4, **options)
    whole.train()
    assert whole.model.active_peft_config.hypothesis_weights == pytest.approx(smoothed(whole, "eval_", 7))
    wins = [round(logged(whole, f"eval_win_share/{k}")[0] * 7) for k in range(3)]
    first = pytest.approx([(n + 1) / 10 for n in wins])
    assert saved_weights(tmp_path / "checkpoint-4") == first

    class Recorder(TrainerCallback):
        seen: list[list[float]] = []

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                self.seen.append(resumed.model.active_peft_config.hypothesis_weights)

    resumed = trainer_for(tmp_path, max_steps=5, save_steps=4, callbacks=[Recorder()], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    # The log of step 5 leaves those of the evaluation at step 3 alone.
    assert Recorder.seen == [first]
    assert resumed.model.active_peft_config.hypothesis_weights == whole.model.active_peft_config.hypothesis_weights


def test_those_of_a_user_are_left_alone(tmp_path):
    given = [0.5, 0.25, 0.25]
    trainer = trainer_for(tmp_path, max_steps=1, eval_dataset=ragged_pairs(4))
    trainer.model.active_peft_config.hypothesis_weights = given
    trainer.evaluate()
    assert trainer.model.active_peft_config.hypothesis_weights == given
    # Training makes other hypotheses.
    trainer.train()
    assert trainer.model.active_peft_config.hypothesis_weights != given
    trainer.model.active_peft_config.hypothesis_weights = given
    trainer.evaluate()
    trainer.save_model()
    assert saved_weights(tmp_path) == given


def test_the_best_model_has_its_own(tmp_path):
    trainer = trainer_for(
        tmp_path, max_steps=2, eval_dataset=ragged_pairs(7, seed=5), eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="wta_nll",
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert trainer.model.active_peft_config.hypothesis_weights == saved_weights(best)
