"""Balanced assignment, learning as one, and temperatures in spreads: whole steps against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from tests.tiny import tiny_llama
from tests.trainer_ext.reference import (
    LORA,
    QUICK,
    Gradients,
    RecordingCollator,
    adapted_llama,
    assert_same_gradients,
    count_tokens,
    frozen_copy,
    gradients_by_hand,
    hypotheses,
    logged,
    ragged_pairs,
    ragged_rows,
    scores_by_hand,
    sequences_of,
    trainer_for,
    word_tokenizer,
)
from trainer_ext.planning import RecentScores, StepPlan


ROWS = 10
STILL = {
    "learning_rate": 0.0,
    "max_grad_norm": 0.0,
    "max_length": None,
    "max_steps": -1,
    "num_train_epochs": 2,
    "sample_winner": False,
}


def spread_by_hand(rows):
    count, columns = len(rows), len(rows[0])
    mean = sum(map(sum, rows)) / (count * columns)
    of_row = [sum(row) / columns for row in rows]
    of_column = [sum(row[k] for row in rows) / count for k in range(columns)]
    centred = [(row[k] - of_row[i] - of_column[k] + mean) ** 2 for i, row in enumerate(rows) for k in range(columns)]
    return math.sqrt(sum(centred) / ((count - 1) * (columns - 1)))


def plan_by_hand(rows, targets, temperature, strength=math.inf):
    """Sinkhorn's scaling of rows and columns in turn, in plain loops; returns softmax((z + v) / T) as a function of z.

    v is -strength log(share / target), and the share of a column is its scale, exp(v / T), times what follows from the others.
    """
    power = 1.0 if math.isinf(strength) else strength / (strength + temperature)
    kernel = [[math.exp((z - max(row)) / temperature) for z in row] for row in rows]
    scale = [1.0] * len(targets)
    for _ in range(3000):
        sums = [sum(k * s for k, s in zip(row, scale, strict=True)) for row in kernel]
        shares = [sum(row[j] / total for row, total in zip(kernel, sums, strict=True)) for j in range(len(targets))]
        scale = [(target * len(rows) / share) ** power for target, share in zip(targets, shares, strict=True)]

    def weights(row):
        powers = [math.exp((z - max(row)) / temperature) * s for z, s in zip(row, scale, strict=True)]
        return [power / sum(powers) for power in powers]

    return weights


def steps_by_hand(model, batches, accumulation, options, remembered):
    """The weights of all sequences of each step, by micro-batch; `remembered` says whether earlier steps take part."""
    found, seen, per_epoch = [], [], len(batches) // 2
    starts = [start for epoch in (0, per_epoch) for start in range(epoch, epoch + per_epoch, accumulation)]
    decay = (options["final_temperature"] / options["initial_temperature"]) ** (1 / (0.5 * len(starts)))
    for step, start in enumerate(starts):
        stop = min(start + accumulation, per_epoch if start < per_epoch else 2 * per_epoch)
        own = []
        for batch in batches[start:stop]:
            counts = [count_tokens(labels) for _, labels in sequences_of(batch)]
            scores = scores_by_hand(model, batch)
            own.append(([[s / max(n, 1) for s in row] for row, n in zip(scores, counts, strict=True)], counts))
        rows = [row for part, counts in own for row, n in zip(part, counts, strict=True) if n]
        seen = seen + rows if remembered else rows
        temperature = max(options["initial_temperature"] * decay**step, options["final_temperature"])
        is_final = temperature <= options["final_temperature"] * (1 + 1e-6)
        unit = spread_by_hand(seen)
        temperature *= unit
        targets = options.get("target_shares", [1 / 3] * 3)
        balanced = plan_by_hand(seen, targets, temperature, options["balance_strength"] * unit)
        weights = [[balanced(row) for row in part] for part, _ in own]
        if is_final:
            weights = [[[float(w == max(row)) for w in row] for row in part] for part in weights]
        found.append((range(start, stop), weights, temperature))
    return found


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize(
    ("options", "remembered"),
    [
        ({"balance_queue": 0}, False),
        ({"balance_queue": 1000, "target_shares": [0.5, 0.3, 0.2]}, True),
        ({"balance_queue": 1000, "target_shares": [0.5, 0.3, 0.2], "balance_strength": 2.0}, True),
    ],
    ids=["step alone", "with a queue", "at a price"],
)
def test_gradients_of_balanced_steps(tmp_path, accumulation, normalization, options, remembered):
    temperatures = {"initial_temperature": 2.0, "final_temperature": 0.5}
    options = {"seeding_fraction": 0.0, "balance_strength": math.inf, **temperatures, **options}
    options["objective"] = "balanced"
    model, collator, gradients = adapted_llama(), RecordingCollator(), Gradients()
    reference = frozen_copy(model)
    trainer = trainer_for(
        tmp_path,
        model=model,
        data=ragged_rows(ROWS),
        data_collator=collator,
        callbacks=[gradients],
        gradient_accumulation_steps=accumulation,
        loss_normalization=normalization,
        **STILL,
        **options,
    )
    trainer.train()
    expected = steps_by_hand(reference, collator.batches, accumulation, options, remembered)
    assert len(expected) == len(gradients.steps)
    assert logged(trainer, "temperature") == pytest.approx([temperature for *_, temperature in expected], rel=1e-3)
    was_soft = False
    for found, (numbers, weights, _) in zip(gradients.steps, expected, strict=True):
        was_soft |= any(0.2 < weight < 0.8 for part in weights for row in part for weight in row)
        by_hand = gradients_by_hand(reference, [collator.batches[n] for n in numbers], weights, normalization)
        assert_same_gradients(found, by_hand, 1e-4)
    assert was_soft


def lora_run(directory, steps, **options):
    trainer = SFTTrainer(
        model=tiny_llama(),
        args=SFTConfig(output_dir=str(directory), **{**QUICK, "max_steps": steps, **options}),
        train_dataset=ragged_pairs(),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(**LORA),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"padding_free": True, "max_length": None}]
)
def test_learning_together_is_plain_lora(tmp_path, options):
    # Their gradients are smaller by sqrt(K), which AdamW does not mind but for its epsilon.
    options = {**options, "adam_epsilon": 1e-15}
    torch.manual_seed(0)
    plain = lora_run(tmp_path / "plain", 5, **options)
    torch.manual_seed(0)
    ours = trainer_for(
        tmp_path / "ours",
        peft_config=hypotheses(init_perturbation=0.0),
        objective="wta",
        together_fraction=0.99,
        max_steps=5,
        **options,
    )
    ours.train()
    for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        assert logged(ours, name) == pytest.approx(logged(plain, name), rel=2e-5)
    theirs = dict(plain.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        if parameter.requires_grad:
            twin = theirs[name.replace("mclora_", "lora_").replace(".default", ".default.weight")]
            for hypothesis in parameter:
                torch.testing.assert_close(hypothesis, twin, rtol=1e-4, atol=1e-5)


def test_hypotheses_split_and_compete(tmp_path):
    trainer = trainer_for(
        tmp_path,
        peft_config=hypotheses(init_perturbation=0.1, shared_r=2),
        objective="balanced",
        together_fraction=0.3,
        seeding_fraction=0.0,
        annealing_fraction=0.8,
        max_steps=10,
    )
    spread = []
    trainer.add_callback(WatchSpread(trainer, spread))
    trainer.train()
    assert logged(trainer, "together") == [1.0] * 3 + [0.0] * 7
    # B is the same in all of them until they split, up to rounding, and then no longer.
    assert max(spread[:3]) < 1e-6 < 1e-4 < min(spread[3:])
    relative = [t / s for t, s in zip(logged(trainer, "temperature"), logged(trainer, "score_spread"), strict=True)]
    assert len(relative) == 7
    assert relative[0] == pytest.approx(0.2)
    assert relative[-1] == pytest.approx(0.05)
    assert all(a >= b for a, b in itertools.pairwise(relative))
    # All tie while they are one.
    assert logged(trainer, "wta_nll")[:3] == pytest.approx(logged(trainer, "worst_nll")[:3])


class WatchSpread(Gradients):
    """How far the hypotheses' own B differ after each step."""

    def __init__(self, trainer, found):
        super().__init__()
        self.trainer, self.found = trainer, found

    def on_step_end(self, args, state, control, **kwargs):
        stacks = [m.stacked_b["default"] for m in self.trainer.model.modules() if hasattr(m, "stacked_b")]
        self.found.append(max((stack - stack[:1]).abs().max().item() for stack in stacks))


def test_resumed_run_goes_on_with_its_queue(tmp_path):
    options = {
        "peft_config": hypotheses(init_perturbation=0.1),
        "objective": "balanced",
        "together_fraction": 0.2,
        # Clusters decide in steps 2 to 6: the checkpoint falls between.
        "seeding_fraction": 0.5,
        "annealing_fraction": 0.8,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 5,
        "data": ragged_pairs(30),
    }
    torch.manual_seed(0)
    whole = trainer_for(tmp_path / "whole", **options)
    whole.train()
    torch.manual_seed(0)
    resumed = trainer_for(tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    names = ("loss", "temperature", "score_spread", "wta_nll", "win_share/0")
    for name in names:
        assert logged(resumed, name)[-3:] == pytest.approx(logged(whole, name)[-3:], rel=1e-6)
    path = tmp_path / "whole" / "checkpoint-5" / "recent_scores.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        RecentScores(3).load(path.parent)


def test_annealing_in_spreads(tmp_path):
    trainer = trainer_for(
        tmp_path,
        objective="annealed",
        temperature_unit="spread",
        sample_winner=True,
        max_steps=6,
        data=ragged_pairs(30),
    )
    trainer.train()
    relative = [t / s for t, s in zip(logged(trainer, "temperature"), logged(trainer, "score_spread"), strict=True)]
    assert relative[0] == pytest.approx(0.2)
    assert relative[-1] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_shares": "even"}, "`target_shares` must be 'clusters', 'uniform', 'tracked' or one number above 0"),
        ({"target_shares": [0.5, 0.0, 0.5]}, "`target_shares` must be"),
        ({"target_shares": [0.5, 0.5]}, "`target_shares` has 2 numbers"),
        ({"balance_strength": 0.0}, "`balance_strength` must be above 0"),
        ({"balance_queue": -1}, "`balance_queue` must be an integer of at least 0"),
        ({"together_fraction": 1.0}, "`together_fraction` must be in"),
        ({"together_fraction": 0.2}, "init_perturbation=0.1"),
        ({"together_fraction": 0.3, "seeding_fraction": 0.2}, "must be below `annealing_fraction`"),
        ({"seeding_fraction": -0.1}, "`seeding_fraction` must be in"),
        ({"seeding_sequences": 0}, "`seeding_sequences` must be an integer of at least 1"),
        ({"objective": "wta", "seeding_fraction": 0.1}, "needs `objective='balanced'`"),
        ({"temperature_unit": "bits"}, "`temperature_unit` must be one of nats, spread"),
        ({"score_every": 2}, "`score_every=2` cannot be used with `objective='balanced'`"),
        ({"sample_winner": True, "sample_losers": True}, "not both"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_for(tmp_path, **{"objective": "balanced", **options})


def test_batches_that_were_not_planned(tmp_path):
    weights = torch.eye(3)
    plan = StepPlan([7, 8, 7], weights)
    assert torch.equal(plan.take([8, 7]), weights[[1, 0]])
    assert len(plan) == 1
    with pytest.raises(RuntimeError, match="not one of those that the step was planned with"):
        plan.take([8])
    # Outside of a step, a batch is one.
    trainer = trainer_for(tmp_path, objective="balanced", max_steps=1)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.training_step(trainer.model, batch, num_items_in_batch=torch.tensor(10)).isfinite()
