"""Matching references with hypotheses, against all assignments; keeping groups together."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from trainer_ext.groups import GROUPS, GroupCollator, GroupSampler, group_id, match_groups, matched_weights
from trainer_ext.objectives import pick_winners


def best_sum(scores):
    """Of all assignments of one group with at most ceil(R / K) sequences for a hypothesis."""
    rows, hypotheses = scores.shape
    most = -(-rows // hypotheses)
    return max(
        sum(scores[row, k].item() for row, k in enumerate(chosen))
        for chosen in itertools.product(range(hypotheses), repeat=rows)
        if max(Counter(chosen).values()) <= most
    )


@pytest.mark.parametrize("hypotheses", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6])
def test_the_sum_is_the_best_of_all(rows, hypotheses):
    generator = torch.Generator().manual_seed(rows * 10 + hypotheses)
    for _ in range(10):
        scores = torch.randn(rows, hypotheses, generator=generator, dtype=torch.float64) * 30 - 100
        lots = torch.rand(rows, hypotheses, generator=generator)
        winners = match_groups(scores, torch.full((rows,), 7), lots)
        found = sum(scores[row, k].item() for row, k in enumerate(winners.tolist()))
        # But for what counts as a tie.
        assert found == pytest.approx(best_sum(scores), rel=1e-6)
        assert max(Counter(winners.tolist()).values()) <= -(-rows // hypotheses)


def test_groups_are_told_by_their_number_and_matched_each_on_its_own():
    generator = torch.Generator().manual_seed(0)
    scores, lots = torch.randn(9, 3, generator=generator), torch.rand(9, 3, generator=generator)
    groups = torch.tensor([5, 2, 5, 9, 2, 5, 2, 8, 2])
    winners = match_groups(scores, groups, lots)
    for group in groups.unique():
        own = groups == group
        assert torch.equal(winners[own], match_groups(scores[own], groups[own], lots[own]))
    assert sorted(winners[groups == 5].tolist()) == [0, 1, 2]
    alone = torch.tensor([3, 7])
    assert torch.equal(winners[alone], pick_winners(scores, lots)[alone])


def test_matching_is_not_racing():
    scores = torch.tensor([[-1.0, -5.0], [-2.0, -3.0]])
    assert match_groups(scores, torch.tensor([1, 1]), torch.rand(2, 2)).tolist() == [0, 1]
    assert pick_winners(scores, torch.rand(2, 2)).tolist() == [0, 0]


def test_ties_go_by_lot():
    generator = torch.Generator().manual_seed(0)
    found = Counter(
        tuple(match_groups(torch.full((3, 3), -12.5), torch.zeros(3), torch.rand(3, 3, generator=generator)).tolist())
        for _ in range(600)
    )
    assert set(found) == set(itertools.permutations(range(3)))
    assert min(found.values()) > 60


def test_ties_are_ties_whatever_the_last_digits():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        # Hypotheses 0 and 1 are copies; only rounding tells them apart.
        scores = torch.randn(4, 3, generator=generator, dtype=torch.float64) * 30 - 100
        scores[:, 1] = scores[:, 0]
        lots = torch.rand(4, 3, generator=generator)
        noisy = scores * (1 + 2e-7 * torch.randn(4, 3, generator=generator, dtype=torch.float64).clamp(-1, 1))
        groups = torch.zeros(4, dtype=torch.int64)
        assert torch.equal(match_groups(noisy, groups, lots), match_groups(scores, groups, lots))


def test_weights_of_groups_of_one_stay_and_broken_hypotheses_get_none():
    nan = float("nan")
    scores = torch.tensor([[nan, -1.0, -9.0], [nan, -1.5, -2.0], [nan, -3.0, -1.0], [-5.0, -5.5, -6.0]])
    groups, draws = torch.tensor([4, 4, 4, 9]), torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    soft = torch.tensor([[0.2, 0.3, 0.5]]).expand(4, 3)
    found = matched_weights(soft, scores, groups, objective="relaxed", epsilon=0.2, draws=draws)
    # Someone must take hypothesis 0: the second, whose other scores are closest to the worst; its best takes the weight.
    assert (found[:3, 0] == 0).all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(4))
    torch.testing.assert_close(found[3], soft[3])
    assert found[:3].argmax(dim=1).tolist() == [1, 1, 2]
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.9, 0.1]))


def test_lots_decide_nothing_else():
    scores = torch.tensor([[-100.0, -100.01], [-100.0, -100.0]])
    for lots in (torch.tensor([[0.0, 0.99], [0.99, 0.0]]), torch.tensor([[0.99, 0.0], [0.0, 0.99]])):
        assert match_groups(scores, torch.tensor([1, 1]), lots).tolist() == [0, 1]


def test_scores_that_are_not_finite_are_avoided():
    nan, inf = float("nan"), float("inf")
    lots = torch.rand(3, 3, generator=torch.Generator().manual_seed(0))
    scores = torch.tensor([[nan, -1.0, -9.0], [-inf, -1.5, -2.0], [-900.0, -1.0, -1.0]])
    # Only the last can take hypothesis 0; of the rest -1 - 2 is better than -9 - 1.5.
    assert match_groups(scores, torch.zeros(3), lots).tolist() == [1, 2, 0]
    assert match_groups(torch.tensor([[inf, -1.0], [-3.0, -800.0]]), torch.zeros(2), lots[:2, :2]).tolist() == [0, 1]
    assert sorted(match_groups(torch.full((3, 3), nan), torch.zeros(3), lots).tolist()) == [0, 1, 2]
    # Scores of any size: what is broken does not hide the differences of the others.
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert match_groups(scores.to(dtype), torch.zeros(3), lots).tolist() == [1, 2, 0]


def test_ids_depend_on_the_value_alone():
    assert group_id("a prompt") == group_id("a prom" + "pt")
    values = ["1", 1, "a", ["a"], {"a": 1}, 1.5, True]
    assert len({group_id(value) for value in values}) == len(values)
    assert all(0 <= group_id(value) < 2**63 for value in values)
    with pytest.raises(ValueError, match="`group_column` has a null value"):
        group_id(None)


def test_groups_stay_together_in_a_shuffled_order():
    groups = [row % 7 for row in range(23)]
    sampler = GroupSampler(groups, seed=3)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(23))
        assert len(sampler) == 23
        runs = [group for group, _ in itertools.groupby(groups[row] for row in order)]
        assert len(runs) == 7
        orders.append(order)
        again = GroupSampler(groups, seed=3)
        again.set_epoch(epoch)
        assert list(again) == order
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert list(GroupSampler(groups, seed=4)) != orders[0]


def test_a_batch_tells_its_groups():
    collate = GroupCollator(lambda rows: {"rows": rows}, "prompt_id")
    batch = collate([{"x": 1, "prompt_id": "a"}, {"x": 2, "prompt_id": "b"}, {"x": 3, "prompt_id": "a"}])
    assert batch["rows"] == [{"x": 1}, {"x": 2}, {"x": 3}]
    assert batch[GROUPS].dtype == torch.int64
    assert batch[GROUPS].tolist() == [group_id("a"), group_id("b"), group_id("a")]
    for row in ({"x": 4}, {"x": 4, "prompt_id": None}):
        assert collate([{"x": 1, "prompt_id": "a"}, row]) == {"rows": [{"x": 1}, {"x": 4}]}
