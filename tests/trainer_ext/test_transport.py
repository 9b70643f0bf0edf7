"""Sharing sequences out: marginals, optimality against an exhaustive assignment, and the price of missed targets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_ext.planning import LEAST_SPREAD, balanced_scores, finite_rows, spread_of, target_shares
from trainer_ext.transport import score_spread, share_offsets


def table(rows: int, columns: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return -scale * torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plan_by_hand(scores: list[list[float]], offsets: list[float], temperature: float) -> list[list[float]]:
    plan = []
    for row in scores:
        raised = [(score + offset) / temperature for score, offset in zip(row, offsets, strict=True)]
        powers = [math.exp(value - max(raised)) for value in raised]
        plan.append([power / sum(powers) for power in powers])
    return plan


def shares_by_hand(plan: list[list[float]]) -> list[float]:
    return [sum(row[k] for row in plan) / len(plan) for k in range(len(plan[0]))]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-3, 0.3, 5.0]),
    relative=st.floats(0.2, 5.0),
)
def test_strict_shares_are_the_targets(rows, columns, seed, scale, relative):
    scores, temperature = table(rows, columns, seed, scale), relative * scale
    targets = torch.rand(columns, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) + 0.1
    targets /= targets.sum()
    offsets = share_offsets(scores, targets, temperature)
    shares = shares_by_hand(plan_by_hand(scores.tolist(), offsets.tolist(), temperature))
    assert shares == pytest.approx(targets.tolist(), abs=1e-5)
    assert offsets.mean().item() == pytest.approx(0.0, abs=1e-9 * scale)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(seed=st.integers(0, 10**6), strength=st.sampled_from([0.05, 0.5, 5.0]), temperature=st.sampled_from([0.1, 1.0]))
def test_missed_shares_are_paid_for(seed, strength, temperature):
    scores = table(12, 3, seed) + torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64)
    targets = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    offsets = share_offsets(scores, targets, temperature, strength)
    shares = shares_by_hand(plan_by_hand(scores.tolist(), offsets.tolist(), temperature))
    expected = [-strength * math.log(share / target) for share, target in zip(shares, targets.tolist(), strict=True)]
    assert offsets.tolist() == pytest.approx(expected, abs=1e-4 * temperature)


def test_a_high_price_is_strict_and_a_low_one_is_none():
    scores = table(20, 3, 0)
    targets = torch.full((3,), 1 / 3, dtype=torch.float64)
    strict = share_offsets(scores, targets, 0.1)
    dear = share_offsets(scores, targets, 0.1, strength=1e4)
    torch.testing.assert_close(dear - dear.mean(), strict, atol=1e-3, rtol=0)
    assert share_offsets(scores, targets, 0.1, strength=1e-6).abs().max() < 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_cold_plan_is_the_best_of_all_balanced_assignments(seed):
    # 6 sequences, 3 hypotheses, 2 each: all 90 ways are tried.
    scores = table(6, 3, seed)
    offsets = share_offsets(scores, torch.full((3,), 1 / 3, dtype=torch.float64), 0.002)
    found = (scores + offsets).argmax(dim=1).tolist()
    ways = [way for way in itertools.product(range(3), repeat=6) if all(way.count(k) == 2 for k in range(3))]
    best = max(ways, key=lambda way: sum(scores[i, k].item() for i, k in enumerate(way)))
    assert tuple(found) == best


def test_one_that_is_ahead_everywhere_gets_no_more():
    scores = table(400, 4, 1)
    scores[:, 2] += 100.0
    targets = torch.full((4,), 0.25, dtype=torch.float64)
    shares = torch.softmax((scores + share_offsets(scores, targets, 0.05)) / 0.05, dim=1).mean(dim=0)
    assert shares.tolist() == pytest.approx([0.25] * 4, abs=1e-4)


def test_spread_ignores_easy_rows_and_columns_ahead():
    scores = table(30, 4, 2)
    moved = scores + 7 * table(30, 1, 3) + 9 * table(1, 4, 4)
    assert score_spread(moved) == pytest.approx(score_spread(scores))
    total = 0.0
    rows, columns = scores.shape
    for i in range(rows):
        for k in range(columns):
            centred = scores[i, k] - scores[i].mean() - scores[:, k].mean() + scores.mean()
            total += centred.item() ** 2
    assert score_spread(scores) == pytest.approx(math.sqrt(total / ((rows - 1) * (columns - 1))))
    assert score_spread(scores * 3) == pytest.approx(3 * score_spread(scores))
    assert score_spread(scores[:1]) == score_spread(scores[:, :1]) == 0.0


def test_rounding_is_no_spread():
    alike = table(10, 1, 5, 4.0).expand(-1, 3) * (1 + 1e-7 * table(10, 3, 6))
    assert spread_of(alike) == pytest.approx(LEAST_SPREAD * alike.abs().mean().item())


def test_rows_that_are_not_whole_take_no_part():
    scores = torch.tensor([[-4.0, -2.0], [math.nan, -1.0], [-3.0, -math.inf], [-9.0, -6.0], [-1.0, -1.0]])
    rows = finite_rows(scores, torch.tensor([2, 1, 1, 3, 0]))
    assert rows.tolist() == [[-2.0, -1.0], [-3.0, -2.0]]
    balanced = balanced_scores(
        scores, torch.tensor([2, 1, 1, 3, 0]), rows, wanted="uniform", clusters=None, temperature=0.1, strength=math.inf
    )
    assert balanced.isfinite().tolist() == scores.isfinite().tolist()
    # Both rows differ by 1 nat for each token, so the offsets make them tie.
    assert (balanced[3, 0] - balanced[3, 1]).item() == pytest.approx(0.0, abs=1e-4)


def test_targets():
    rows = torch.tensor([[0.0, -9.0], [0.0, -9.0], [0.0, -9.0], [-9.0, 0.0]], dtype=torch.float64)
    clusters = torch.tensor([0.9, 0.1])
    assert target_shares("uniform", clusters, rows, 0.1).tolist() == [0.5, 0.5]
    assert target_shares("clusters", clusters, rows, 0.1).tolist() == pytest.approx(
        [0.95 * 0.9 + 0.025, 0.95 * 0.1 + 0.025]
    )
    assert target_shares("clusters", None, rows, 0.1).tolist() == pytest.approx([0.5, 0.5])
    tracked = target_shares("tracked", clusters, rows, 0.1).tolist()
    assert tracked == pytest.approx([0.8 * 0.75 + 0.1, 0.8 * 0.25 + 0.1])
    assert target_shares([3.0, 1.0], clusters, rows, 0.1).tolist() == [0.75, 0.25]
