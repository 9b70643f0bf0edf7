"""Any masks and lengths, half precision, and hypotheses that overflow: always numbers, and the right ones."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from datasets import Dataset
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.tiny import PAD, VOCABULARY, tiny_llama
from tests.trainer_ext.reference import (
    adapted_llama,
    assert_same_gradients,
    count_tokens,
    frozen_copy,
    logged,
    ragged_rows,
    trainer_for,
    weights_by_hand,
)
from trainer_ext.batches import SequenceBatch
from trainer_ext.config import NORMALIZATIONS
from trainer_ext.objectives import OBJECTIVES, give_broken_to_winner, is_broken
from trainer_ext.scoring import plan_scoring, score_sequences, score_tokens


BROKEN = 1
TRIGGER = VOCABULARY - 1
EPSILON, TEMPERATURE = 0.2, 0.5
OPTIONS = {"relaxed_epsilon": EPSILON, "initial_temperature": TEMPERATURE, "temperature_decay": 1.0, "max_length": None}
TARGETS = ["embed_tokens", "q_proj", "v_proj", "up_proj", "down_proj"]
# A row: which of its tokens are supervised, columns of padding, and whether these are on the left.
ROWS = st.lists(
    st.tuples(st.lists(st.booleans(), max_size=7), st.integers(0, 3), st.booleans()), min_size=1, max_size=4
)


# Those that give a sequence its weights whatever the others of a step are. "balanced" is the matter of test_balanced.
ONE_BY_ONE = [objective for objective in OBJECTIVES if objective != "balanced"]


@pytest.fixture(scope="module", params=[(o, n) for o in ONE_BY_ONE for n in NORMALIZATIONS], ids="/".join)
def trainer(request, tmp_path_factory):
    """A trainer that is not run, but asked for the losses of batches."""
    objective, normalization = request.param
    model = adapted_llama(target_modules=TARGETS)
    exact = frozen_copy(model).double()
    options = {"objective": objective, "loss_normalization": normalization, **OPTIONS}
    found = trainer_for(tmp_path_factory.mktemp("trainer"), model=model, data=ragged_rows(), **options)
    found.exact = exact
    assign = found._assign

    def keep_weights(*args):
        found.weights, winners = assign(*args)
        return found.weights, winners

    found._assign = keep_weights
    return found


def make_batch(rows) -> dict[str, torch.Tensor]:
    """A batch of rows as in `ROWS`, without the token `TRIGGER`."""
    width = max(1, *(len(supervised) + padding for supervised, padding, _ in rows))
    generator = torch.Generator().manual_seed(len(rows) * 100 + width)
    ids, mask, labels = [], [], []
    for supervised, _, left in rows:
        own = torch.randint(PAD + 1, TRIGGER, (len(supervised),), generator=generator).tolist()
        targets = [token if counts else -100 for token, counts in zip(own, supervised, strict=True)]
        if left:
            targets[:1] = [-100] * len(targets[:1])  # Else it would be predicted from the padding before it.
        gap = width - len(own)
        before, after = (gap, 0) if left else (0, gap)
        ids.append([PAD] * before + own + [PAD] * after)
        mask.append([0] * before + [1] * len(own) + [0] * after)
        labels.append([-100] * before + targets + [-100] * after)
    return {name: torch.tensor(x) for name, x in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def sequences_in(batch) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each row without its padding, wherever that is."""
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True)
    return [(ids[mask].tolist(), labels[mask].tolist()) for ids, mask, labels in rows]


def score(model, ids, labels, hypothesis) -> torch.Tensor:
    """s_k by a plain loop over the tokens, in float64."""
    if not count_tokens(labels):
        return torch.zeros((), dtype=torch.float64)
    logits = model(input_ids=torch.tensor([ids]), hypotheses=hypothesis).logits[0]
    terms = [logits[t - 1].log_softmax(-1)[labels[t]] for t in range(1, len(ids)) if labels[t] != -100]
    return torch.stack(terms).sum()


def loss_by_hand(trainer, batch, broken: tuple[int, ...] = ()) -> torch.Tensor:
    """The loss of a batch that is a whole step, one sequence and one hypothesis at a time, in float64.

    Args:
        broken: Rows for which the hypothesis `BROKEN` has no finite score: the best takes over its weight.
    """
    objective, by_token = trainer.args.objective, trainer.args.loss_normalization == "token"
    total, terms = 0, [torch.zeros((), dtype=torch.float64)]
    for row, (ids, labels) in enumerate(sequences_in(batch)):
        count = count_tokens(labels)
        if not count:
            continue
        without = BROKEN if row in broken else None
        scores = {k: score(trainer.exact, ids, labels, k) for k in range(3) if k != without}
        values = [scores[k].item() if k in scores else -math.inf for k in range(3)]
        if objective == "random":
            q = trainer.weights[row].tolist()  # Whatever was drawn.
        else:
            q = weights_by_hand(objective, values, count, EPSILON, TEMPERATURE)
        if without is not None:
            q[values.index(max(values))] += q[without]
            q[without] = 0.0
        terms += [-q[k] * s / (1 if by_token else count) for k, s in scores.items() if q[k]]
        total += count if by_token else 1
    return torch.stack(terms).sum() / max(total, 1)


def loss_of(trainer, batch) -> torch.Tensor:
    """The loss of a batch that is a whole step, by the trainer, with what Trainer itself does before it."""
    trainer.model.train()
    count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    return trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)


def gradients_of(model, loss) -> dict[str, torch.Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


NOTHING = ([], 2, False)
ALL = ([True] * 5, 0, False)


@hypothesis_settings(deadline=None, derandomize=True, max_examples=12)
@given(ROWS)
@example([NOTHING])
@example([NOTHING, NOTHING, ([False] * 4, 0, True)])
@example([NOTHING, ALL, ([False, False, True], 1, True)])
@example([([True], 0, False), ([], 3, True), ([False, True], 0, False)])
def test_losses_and_gradients_equal_plain_loops_for_any_masks_and_lengths(trainer, rows):
    """Also for rows without a token, without a label, and for batches of nothing else."""
    batch = make_batch(rows)
    loss = loss_of(trainer, batch)
    gradients = gradients_of(trainer.model, loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    expected = loss_by_hand(trainer, batch)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    if expected.requires_grad:
        exact = gradients_of(trainer.exact, expected)
        assert_same_gradients({name: gradient.double() for name, gradient in gradients.items()}, exact, 2e-5)
    else:
        assert loss.item() == 0.0
        assert all(gradient.abs().sum() == 0 for gradient in gradients.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@hypothesis_settings(deadline=None, derandomize=True, max_examples=3)
@given(rows=ROWS)
@example(rows=[NOTHING, ALL, ([False, False, True], 1, True)])
@example(rows=[NOTHING, NOTHING])
def test_half_precision_gives_numbers_near_those_of_float32(trainer, dtype, rows):
    batch = make_batch(rows)
    with torch.autocast("cpu", dtype):
        loss = loss_of(trainer, batch)
    assert loss.dtype == torch.float32
    gradients = gradients_of(trainer.model, loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    torch.testing.assert_close(loss.double(), loss_by_hand(trainer, batch), rtol=2e-2, atol=1e-2)


# --------------------------------------------------------------------------------------------------------------------
# Hypotheses that overflow


def break_hypothesis(model, size: float) -> None:
    """Make hypothesis `BROKEN` multiply by `size` where it reads the token `TRIGGER`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mclora_embedding_A" in name:
                parameter[BROKEN, :, TRIGGER] = size


@pytest.fixture
def broken(trainer):
    """A trainer, and how to make one of its hypotheses overflow on some sequences."""
    whole = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer._reported_broken.clear()
    trainer._train_window.clear()
    yield trainer
    for name, value in whole.items():
        trainer.model.get_parameter(name).data.copy_(value)
        trainer.exact.get_parameter(name).data.copy_(value)
    trainer._train_window.clear()


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 1e6), (torch.float32, 3e38)], ids=["float16", "float32"])
def test_a_hypothesis_that_overflows_does_not_win_and_does_not_poison_the_others(broken, caplog, dtype, size):
    # With float64 the same numbers are finite, so the reference can be differentiated.
    for model in (broken.model, broken.exact):
        break_hypothesis(model, size)
    batch = make_batch([ALL, ([False] * 3, 0, False), ([False, True, True], 0, False), ([True] * 4, 0, True)])
    batch["input_ids"][:2, 0] = TRIGGER
    drawn = set()
    for step in range(12):  # The row that has nothing to learn draws its winner from all of them, broken or not.
        broken.state.global_step = step
        autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with autocast, caplog.at_level(logging.WARNING, logger="trainer_ext"):
            loss = loss_of(broken, batch)
        drawn.add(broken._winners[1].item())
        assert broken._winners[0] != BROKEN
        gradients = gradients_of(broken.model, loss)
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
        expected = loss_by_hand(broken, batch, broken=(0,))
        if dtype == torch.float16:
            torch.testing.assert_close(loss.double(), expected, rtol=2e-2, atol=1e-2)
        else:
            torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
            exact = gradients_of(broken.exact, expected)
            assert_same_gradients({name: gradient.double() for name, gradient in gradients.items()}, exact, 2e-5)
    broken.state.global_step = 0
    assert BROKEN in drawn
    assert [record.message.split(":")[0] for record in caplog.records] == [
        f"Hypothesis {BROKEN} gives a likelihood that is not finite for a sequence of step 0"
    ]
    scores = broken._train_window.scores.view(12, 4, 3)
    assert torch.isfinite(scores).all(dim=0).tolist() == [[k != BROKEN for k in range(3)]] + [[True] * 3] * 3
    assert all(math.isfinite(value) for value in broken._train_window.summary().values())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_and_evaluation_go_on_past_sequences_that_break_a_hypothesis(tmp_path, objective):
    model = adapted_llama(target_modules=TARGETS)
    break_hypothesis(model, 3e38)
    rows = [row for row in ragged_rows(8, without_labels=()) if TRIGGER not in row["input_ids"]]
    for row in rows[:2]:
        row["input_ids"][0] = TRIGGER
    data = Dataset.from_list(rows)
    options = {"objective": objective, "eval_strategy": "steps", "eval_steps": 2, **OPTIONS}
    trainer = trainer_for(tmp_path, model=model, data=data, eval_dataset=data, **options)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    for entry in trainer.state.log_history:
        assert all(math.isfinite(value) for value in entry.values() if isinstance(value, float)), entry
    assert max(logged(trainer, "worst_nll")) > 1e30  # It did break.
    for name, value in before.items():
        after = model.get_parameter(name)
        assert torch.isfinite(after).all(), name
        assert not torch.equal(after, value), name


def test_the_winner_takes_over_the_weight_of_the_broken():
    nan, inf = math.nan, math.inf
    scores = torch.tensor([[-1.0, nan, -2.0], [-1.0, -3.0, -2.0], [nan, -inf, inf], [-inf, -5.0, nan]])
    weights = torch.tensor([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.3, 0.4, 0.3]])
    assert is_broken(scores).tolist() == [
        [False, True, False],
        [False, False, False],
        [False, False, False],  # All of them: nothing is left to go on with.
        [True, False, True],
    ]
    expected = torch.tensor([[0.9, 0.0, 0.1], [0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.0, 1.0, 0.0]])
    actual = give_broken_to_winner(weights, scores, torch.tensor([0, 0, 0, 1]))
    torch.testing.assert_close(actual, expected)
    assert torch.equal(actual[1:3], weights[1:3])


# --------------------------------------------------------------------------------------------------------------------
# Scores in half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_scores_under_autocast_are_float32_and_those_of_training(trainer, dtype):
    """The winner that is scored is the winner that is trained: both heads round alike."""
    batch = SequenceBatch(make_batch([ALL, ([False, False, True, True], 2, True), NOTHING]))
    model = trainer.model.eval()
    with torch.autocast("cpu", dtype):
        scores = score_sequences(model, trainer._positions, batch, 3, plan_scoring(batch, 3))
        trained = score_tokens(model, trainer._positions, batch, "all")
    assert scores.dtype == trained.log_probs.dtype == torch.float32
    torch.testing.assert_close(scores, trained.per_sequence().T, rtol=1e-5, atol=1e-4)
    # Of logits rounded to half precision, but not of log-probabilities rounded to it: a sum has more digits.
    assert (scores[0] != scores[0].to(dtype).float()).any()


@torch.no_grad()
def test_sums_go_on_where_half_precision_would_stop_counting(tmp_path):
    """5,000 tokens of some nats each: in bfloat16 a sum would stall far below."""
    model = tiny_llama(max_position_embeddings=6000)
    model.lm_head.weight.zero_()  # Every token has the probability 1 / VOCABULARY.
    trainer = trainer_for(tmp_path, model=model.to(torch.bfloat16), data=ragged_rows())
    ids = torch.randint(PAD + 1, VOCABULARY, (1, 5001))
    batch = SequenceBatch({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    scores = score_sequences(trainer.model.eval(), trainer._positions, batch, 3, plan_scoring(batch, 3))
    torch.testing.assert_close(scores, torch.full((1, 3), -5000 * math.log(VOCABULARY)), rtol=1e-4, atol=0)
