"""The metrics of the competition, against slow loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_ext.metrics import ScoreWindow, competition_metrics


def by_hand(scores: list[list[float]], num_tokens: list[int], winners: list[int]) -> dict[str, float]:
    """The metrics by their definitions, one sequence at a time; sequences without tokens do not count."""
    num_hypotheses = len(scores[0])
    rows = [(row, n, winner) for row, n, winner in zip(scores, num_tokens, winners, strict=True) if n > 0]
    tokens = sum(n for _, n, _ in rows)
    shares = [sum(winner == k for _, _, winner in rows) / len(rows) for k in range(num_hypotheses)]

    def mixture(row):
        terms = [math.log(share) + score for share, score in zip(shares, row, strict=True) if share > 0]
        return max(terms) + math.log(sum(math.exp(term - max(terms)) for term in terms))

    metrics = {
        "wta_nll": -sum(max(row) for row, _, _ in rows) / tokens,
        "mean_nll": -sum(sum(row) / num_hypotheses for row, _, _ in rows) / tokens,
        "worst_nll": -sum(min(row) for row, _, _ in rows) / tokens,
        "mixture_nll": -sum(mixture(row) for row, _, _ in rows) / tokens,
        "assignment_entropy": -sum(share * math.log(share) for share in shares if share > 0),
    }
    return {**metrics, **{f"win_share/{k}": share for k, share in enumerate(shares)}}


def random_window(rows: int, num_hypotheses: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    num_tokens = torch.randint(1, 30, (rows,), generator=generator)
    scores = -torch.rand(rows, num_hypotheses, generator=generator) * 5 * num_tokens.unsqueeze(1)
    return scores, num_tokens, scores.argmax(dim=1)


@pytest.mark.parametrize("num_hypotheses", [1, 2, 5])
def test_metrics_equal_a_loop(num_hypotheses):
    scores, num_tokens, winners = random_window(17, num_hypotheses)
    expected = by_hand(scores.tolist(), num_tokens.tolist(), winners.tolist())
    assert competition_metrics(scores, num_tokens, winners) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_metrics_of_a_few_sequences_worked_out_on_paper():
    scores = torch.tensor([[-2.0, -4.0], [-3.0, -1.0], [-1.0, -7.0], [-2.0, -2.0]])
    metrics = competition_metrics(scores, torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 0, 1]))
    assert metrics["wta_nll"] == pytest.approx(6 / 10)
    assert metrics["mean_nll"] == pytest.approx((3 + 2 + 4 + 2) / 10)
    assert metrics["worst_nll"] == pytest.approx((4 + 3 + 7 + 2) / 10)
    assert (metrics["win_share/0"], metrics["win_share/1"]) == (0.5, 0.5)
    assert metrics["assignment_entropy"] == pytest.approx(math.log(2))
    likelihoods = [(math.exp(a) + math.exp(b)) / 2 for a, b in scores.tolist()]
    assert metrics["mixture_nll"] == pytest.approx(-sum(map(math.log, likelihoods)) / 10)


def test_long_sequences_weigh_as_many_tokens_as_they_have():
    # Not the mean of -1 per token and -3 per token.
    metrics = competition_metrics(torch.tensor([[-9.0], [-3.0]]), torch.tensor([9, 1]), torch.tensor([0, 0]))
    assert metrics["wta_nll"] == pytest.approx(12 / 10)


def test_sequences_without_tokens_do_not_count():
    scores, num_tokens, winners = random_window(6, 3)
    padded = (
        torch.cat([scores, torch.zeros(2, 3)]),
        torch.cat([num_tokens, torch.zeros(2, dtype=torch.long)]),
        torch.cat([winners, torch.tensor([2, 2])]),
    )
    assert competition_metrics(*padded) == competition_metrics(scores, num_tokens, winners)


def test_a_window_without_any_token_is_finite():
    metrics = competition_metrics(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.tensor([0, 1, 1]))
    assert set(metrics.values()) == {0.0}


def test_a_dead_hypothesis_takes_no_part_in_the_mixture():
    scores, num_tokens, _ = random_window(8, 2)
    dead = torch.cat([scores, scores.max(dim=1, keepdim=True).values + 1.0], dim=1)
    winners = scores.argmax(dim=1)
    with_dead = competition_metrics(dead, num_tokens, winners)
    assert with_dead["win_share/2"] == 0.0
    # Its likelihood is the best, but its share is zero.
    assert with_dead["mixture_nll"] == pytest.approx(competition_metrics(scores, num_tokens, winners)["mixture_nll"])


def test_one_hypothesis_has_one_likelihood():
    scores, num_tokens, winners = random_window(5, 1)
    metrics = competition_metrics(scores, num_tokens, winners)
    names = ("wta_nll", "mean_nll", "worst_nll", "mixture_nll")
    assert [metrics[name] for name in names] == pytest.approx([metrics["wta_nll"]] * 4)
    assert metrics["win_share/0"] == 1.0
    # Not -0.0.
    assert math.copysign(1, metrics["assignment_entropy"]) == 1.0


def test_identical_hypotheses_have_one_likelihood_however_they_share():
    scores = torch.tensor([[-3.0]] * 9).repeat(1, 3)
    metrics = competition_metrics(scores, torch.ones(9, dtype=torch.long), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2]))
    assert metrics["mixture_nll"] == pytest.approx(3.0)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**32))
def test_bounds_of_the_theory(rows, num_hypotheses, seed):
    scores, num_tokens, winners = random_window(rows, num_hypotheses, seed)
    metrics = competition_metrics(scores, num_tokens, winners)
    slack = 1e-9
    assert metrics["wta_nll"] <= metrics["mixture_nll"] + slack
    assert metrics["wta_nll"] <= metrics["mean_nll"] + slack
    assert metrics["mean_nll"] <= metrics["worst_nll"] + slack
    # Going to the winner costs the mixture at most the entropy of the shares for each sequence.
    per_sequence = (metrics["mixture_nll"] - metrics["wta_nll"]) * int(num_tokens.sum()) / rows
    assert per_sequence <= metrics["assignment_entropy"] + slack
    assert metrics["assignment_entropy"] <= math.log(num_hypotheses) + slack


def test_scores_that_are_not_finite_give_numbers():
    scores = torch.tensor([[math.nan, -1.0], [-math.inf, -2.0]])
    metrics = competition_metrics(scores, torch.tensor([1, 1]), torch.tensor([1, 1]))
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["wta_nll"] == pytest.approx(1.5)


# --- the window ---


def test_window_is_exact_over_ragged_batches():
    scores, num_tokens, winners = random_window(11, 3)
    window = ScoreWindow()
    for start, stop in ((0, 4), (4, 5), (5, 11)):
        window.add(scores[start:stop], num_tokens[start:stop], winners[start:stop])
    assert window.summary() == competition_metrics(scores, num_tokens, winners)
    assert torch.equal(window.scores, scores)
    assert torch.equal(window.num_tokens, num_tokens)
    assert torch.equal(window.winners, winners)


def test_window_is_empty_until_something_is_added_and_after_it_is_cleared():
    window = ScoreWindow()
    assert not window
    window.add(*random_window(2, 3))
    assert window
    window.clear()
    assert not window
    window.add(*random_window(3, 3, seed=1))
    assert window.scores.shape == (3, 3)


def test_window_keeps_no_graph():
    window = ScoreWindow()
    scores = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    window.add(scores * 1.0, torch.ones(2, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    assert not window.scores.requires_grad
    assert window.scores.dtype == torch.float32
