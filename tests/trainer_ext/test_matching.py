"""Training with groups of references: whole steps against brute force, layouts, resuming, and what is refused."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from tests.trainer_ext.reference import (
    Gradients,
    RecordingCollator,
    adapted_llama,
    assert_same_gradients,
    count_tokens,
    frozen_copy,
    gradients_by_hand,
    logged,
    ragged_pairs,
    ragged_rows,
    scores_by_hand,
    sequences_of,
    trainer_for,
)
from tests.trainer_ext.test_balanced import STILL, plan_by_hand


COUNT = 3
# Four prompts of three references, which do not lie side by side, and two of one.
GROUPS = [0, 1, 2, 3, 0, 1, 4, 2, 3, 0, 1, 2, 3, 5]
STILL = {**STILL, "per_device_train_batch_size": 6, "group_column": "prompt_id"}
MATCHED = {"objective": "wta", "group_column": "prompt_id", "per_device_train_batch_size": 6}


def grouped_rows(without_labels=()):
    data = ragged_rows(len(GROUPS), without_labels=without_labels)
    return data.add_column("prompt_id", [f"prompt {group}" for group in GROUPS])


def grouped_pairs(rows=18, of=3):
    """Prompts with `of` completions each; their column is one of the text."""
    data = ragged_pairs(rows)
    return data.add_column("group", [row // of for row in range(rows)])


def best_assignment(scores):
    """Of all assignments of the references of a prompt, at most ceil(R / K) for a hypothesis, the one of the largest sum."""
    most = -(-len(scores) // COUNT)
    allowed = (
        chosen
        for chosen in itertools.product(range(COUNT), repeat=len(scores))
        if max(Counter(chosen).values()) <= most
    )
    return max(allowed, key=lambda chosen: sum(row[k] for row, k in zip(scores, chosen, strict=True)))


def matched_by_hand(scores, groups, alone, matched):
    """The weights of each sequence of a step: `matched(k)` for prompts with several references, `alone(row)` for others."""
    weights = [alone(row) for row in range(len(scores))]
    for group in set(groups) - {None}:
        rows = [row for row, own in enumerate(groups) if own == group]
        if len(rows) > 1:
            for row, k in zip(rows, best_assignment([scores[row] for row in rows]), strict=True):
                weights[row] = matched(k)
    return weights


def one_hot(k):
    return [float(j == k) for j in range(COUNT)]


def relaxed(k):
    return [0.9 if j == k else 0.05 for j in range(COUNT)]


def best(row):
    return max(range(COUNT), key=row.__getitem__)


def steps_of(batches, accumulation):
    """The micro-batches of each step of two epochs."""
    half = len(batches) // 2
    for epoch in (batches[:half], batches[half:]):
        yield from (epoch[start : start + accumulation] for start in range(0, half, accumulation))


@pytest.mark.parametrize("objective", ["wta", "relaxed", "annealed", "balanced"])
@pytest.mark.parametrize("layout", [(6, 1), (3, 2)], ids=["1 x 6", "2 x 3"])
def test_gradients_are_those_of_the_best_assignment(tmp_path, objective, layout):
    model, collator, gradients = adapted_llama(), RecordingCollator(), Gradients()
    reference, data = frozen_copy(model), grouped_rows(without_labels=(5,))
    group_of = {tuple(ids): group for ids, group in zip(data["input_ids"], GROUPS, strict=True)}
    options = {"relaxed_epsilon": 0.1, "initial_temperature": 0.5, "final_temperature": 0.5, "temperature_unit": "nats"}
    if objective == "annealed":
        options["final_temperature"], options["temperature_decay"] = 0.1, 1.0
    if objective == "balanced":
        options |= {
            "balance_queue": 0,
            "balance_strength": float("inf"),
            "seeding_fraction": 0.0,
            "final_temperature": 0.1,
            "temperature_decay": 1.0,
        }
    trainer = trainer_for(
        tmp_path,
        model=model,
        data=data,
        data_collator=collator,
        callbacks=[gradients],
        objective=objective,
        gradient_accumulation_steps=layout[1],
        **{**STILL, **options, "per_device_train_batch_size": layout[0]},
    )
    trainer.train()
    steps = list(steps_of(collator.batches, layout[1]))
    assert len(steps) == len(gradients.steps) == 6
    whole = raced = 0
    for found, batches in zip(gradients.steps, steps, strict=True):
        sequences = [sequence for batch in batches for sequence in sequences_of(batch)]
        counts = [count_tokens(labels) for _, labels in sequences]
        # Nothing is matched with what has nothing to learn.
        groups = [group_of[tuple(ids)] if count else None for (ids, _), count in zip(sequences, counts, strict=True)]
        scores = [row for batch in batches for row in scores_by_hand(reference, batch)]
        per_token = [[s / max(n, 1) for s in row] for row, n in zip(scores, counts, strict=True)]
        if objective == "balanced":
            soft = plan_by_hand([row for row, n in zip(per_token, counts, strict=True) if n], [1 / 3] * 3, 0.5)
            weights = [soft(row) for row in per_token]
            # n T log q is the score with the offsets, but for a number for each sequence.
            scores = [[n * torch.tensor(q).log().item() for q in row] for row, n in zip(weights, counts, strict=True)]
        elif objective == "annealed":
            weights = [torch.softmax(torch.tensor(row) / 0.5, dim=0).tolist() for row in per_token]
        else:
            weights = [(relaxed if objective == "relaxed" else one_hot)(best(row)) for row in scores]
        matched = matched_by_hand(scores, groups, weights.__getitem__, relaxed if objective == "relaxed" else one_hot)
        for group, size in Counter(groups).items():
            if group is not None and size == COUNT:
                winners = [best(row) for row, own in zip(matched, groups, strict=True) if own == group]
                assert sorted(winners) == [0, 1, 2]
                whole += 1
        raced += matched == weights
        split, start = [], 0
        for batch in batches:
            split.append(matched[start : start + len(batch["labels"])])
            start += len(batch["labels"])
        assert_same_gradients(found, gradients_by_hand(reference, batches, split, "token"), 1e-4)
    # Groups do come whole, and matching is not what racing gives.
    assert whole >= 4
    assert raced < 6


NAMES = ("loss", "grad_norm", "wta_nll", "win_share/0")


def test_accumulation_does_what_one_batch_does(tmp_path):
    runs = []
    for rows, accumulation in ((6, 1), (3, 2), (2, 3)):
        torch.manual_seed(0)
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation, "max_steps": 7}
        trainer = trainer_for(tmp_path, data=grouped_pairs(20, of=4), **{**MATCHED, "group_column": "group", **options})
        trainer.train()
        runs.append([logged(trainer, name) for name in NAMES])
    for run in runs[1:]:
        for ours, theirs in zip(run, runs[0], strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5)


def test_padding_free_batches_train_alike(tmp_path):
    runs = []
    for layout in ({}, {"padding_free": True, "pad_to_multiple_of": 8}):
        torch.manual_seed(0)
        options = {**layout, "max_length": None, "group_column": "group"}
        trainer = trainer_for(tmp_path, data=grouped_pairs(), **{**MATCHED, **options})
        trainer.train()
        runs.append([logged(trainer, name) for name in NAMES])
    for ours, theirs in zip(*runs, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)


def test_resumed_run_goes_on_in_the_middle_of_an_epoch(tmp_path):
    options = {**MATCHED, "group_column": "group", "max_steps": 8, "save_strategy": "steps", "save_steps": 5}
    runs = []
    for checkpoint in (None, str(tmp_path / "checkpoint-5")):
        torch.manual_seed(0)
        # 3 steps in an epoch.
        trainer = trainer_for(tmp_path, data=grouped_pairs(), **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append([logged(trainer, name)[-3:] for name in NAMES])
    for ours, theirs in zip(*runs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert len(set(runs[0][0])) == 3


@pytest.mark.parametrize("has_groups", ["none", "some", "all"])
def test_nothing_is_matched_in_evaluation(tmp_path, has_groups):
    data = ragged_pairs(9, seed=5)
    if has_groups != "none":
        data = data.add_column("group", [None if row == 4 and has_groups == "some" else row // 3 for row in range(9)])
    shapes = []

    def metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {}

    options = {**MATCHED, "group_column": "group", "max_steps": 1, "eval_dataset": data, "compute_metrics": metrics}
    trainer = trainer_for(tmp_path, data=grouped_pairs(), **options)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate()["eval_wta_nll"])
    window = trainer.score(ragged_pairs(9, seed=5))
    assert torch.equal(window.scores.max(dim=1).values, window.scores.gather(1, window.winners[:, None]).squeeze(1))
    assert len(shapes) == 3


def test_the_prompt_itself_can_be_the_column(tmp_path):
    data = grouped_pairs()
    prompts = [data[row - row % 3]["prompt"] for row in range(len(data))]
    data = data.remove_columns("prompt").add_column("prompt", prompts)
    trainer = trainer_for(tmp_path, data=data, **{**MATCHED, "group_column": "prompt"})
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert sorted(Counter(batch["mcl_groups"].tolist()).values()) == [3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "random"}, "`objective='random'` cannot be used with `group_column='group'`"),
        ({"score_every": 2}, "`score_every=2` cannot be used with"),
        ({"packing": True, "max_length": 64}, "`packing=True` cannot be used with"),
        ({"train_sampling_strategy": "group_by_length"}, "`train_sampling_strategy='group_by_length'` cannot be used"),
        ({"group_column": ""}, "`group_column` must be the name of a column"),
        ({"group_column": "prompt_id"}, r"`group_column` is 'prompt_id', but `train_dataset` has the columns \['compl"),
        ({"group_column": "completion"}, "has another value in each row"),
        ({"data": ragged_rows().add_column("group", [*range(5), *range(5)]), "group_column": "labels"}, "own, with"),
        ({"data": ragged_pairs(4).add_column("group", ["a", "a", None, "b"])}, "null in row 2 of `train_dataset`"),
        (
            {"data": ragged_rows().add_column("seq_lengths", [[1]] * 10).add_column("group", [0] * 10)},
            "has packed rows",
        ),
        ({"data": grouped_pairs().to_iterable_dataset()}, "needs a `train_dataset` of known length"),
    ],
)
def test_what_cannot_be_matched_is_refused(tmp_path, options, message):
    # Before a model is loaded: there is none of this name.
    options = {
        "data": grouped_pairs(),
        "model": str(tmp_path / "no model"),
        **MATCHED,
        "group_column": "group",
        **options,
    }
    with pytest.raises(ValueError, match=message):
        trainer_for(tmp_path, **options)
