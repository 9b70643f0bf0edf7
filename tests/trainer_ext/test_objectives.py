"""The objectives as pure functions: their definitions against plain loops, and any input at all."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.trainer_ext.reference import weights_by_hand
from trainer_ext.draws import Occurrences, sequence_draws
from trainer_ext.objectives import (
    OBJECTIVES,
    annealed_weights,
    assignment_weights,
    decay_for,
    finite_scores,
    pick_winners,
    random_weights,
    relaxed_weights,
    temperature_at,
    wta_weights,
)


EXTREMES = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, -1e38, 3.4e38, -3.4e38, 1e-45, -1e-45, -700.0]
ANY_SCORE = st.one_of(
    st.sampled_from(EXTREMES), st.floats(-1e4, 0.0), st.floats(width=32, allow_nan=True, allow_infinity=True)
)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
TEMPERATURES = st.one_of(
    st.sampled_from([1e-300, 1e-45, 1e-38, 1.2e-38, 1e-6, 1.0, 1e38, 1e39, 1e300]), st.floats(1e-300, 1e300)
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lots(num_sequences: int, num_hypotheses: int, seed: int = 0) -> torch.Tensor:
    """The numbers that `pick_winners` takes, and with one hypothesis more those of `assignment_weights`."""
    return torch.rand(num_sequences, num_hypotheses, generator=seeded(seed))


@st.composite
def score_tables(draw, elements=ANY_SCORE, max_sequences: int = 5):
    num_sequences, num_hypotheses = draw(st.integers(1, max_sequences)), draw(st.integers(1, 5))
    row = st.lists(elements, min_size=num_hypotheses, max_size=num_hypotheses)
    table = draw(st.lists(row, min_size=num_sequences, max_size=num_sequences))
    num_tokens = draw(st.lists(st.integers(0, 5000), min_size=num_sequences, max_size=num_sequences))
    return table, num_tokens


def as_finite(score: float) -> float:
    """What a score counts as: NaN is as bad as -inf."""
    limit = float(torch.finfo(torch.float32).max)
    if math.isnan(score):
        return -limit
    return min(max(score, -limit), limit)


# --- the definitions, by plain loops ---


@pytest.mark.parametrize("objective", ["wta", "relaxed", "annealed"])
@pytest.mark.parametrize("num_hypotheses", [1, 2, 5])
@pytest.mark.parametrize(("epsilon", "temperature"), [(0.0, 1.0), (0.05, 0.1), (0.5, 3.0), (1.0, 0.01)])
def test_weights_equal_their_definition(objective, num_hypotheses, epsilon, temperature):
    scores = -torch.rand(7, num_hypotheses, generator=seeded(0)) * 40
    num_tokens = torch.tensor([1, 2, 3, 5, 8, 13, 21])
    weights, winners = assignment_weights(
        objective, scores, num_tokens, epsilon=epsilon, temperature=temperature, draws=lots(7, num_hypotheses + 1)
    )
    expected = [
        weights_by_hand(objective, row, n, epsilon, temperature)
        for row, n in zip(scores.tolist(), num_tokens.tolist(), strict=True)
    ]
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-5, atol=1e-7)
    assert winners.tolist() == [max(range(num_hypotheses), key=row.__getitem__) for row in scores.tolist()]


def test_annealed_is_wta_once_the_temperature_is_final():
    scores = -torch.rand(6, 3, generator=seeded(0))
    annealed, _ = assignment_weights("annealed", scores, torch.ones(6), temperature=None, draws=lots(6, 4))
    assert torch.equal(annealed, wta_weights(scores.argmax(dim=1), 3))


def test_annealed_compares_scores_for_each_token():
    # The same gap per token, in sequences of 1 and of 100 tokens.
    weights = annealed_weights(torch.tensor([[-1.0, -2.0], [-100.0, -200.0]]), torch.tensor([1, 100]), 0.7)
    torch.testing.assert_close(weights[0], weights[1])
    torch.testing.assert_close(weights[0, 0] / weights[0, 1], torch.tensor(math.exp(1 / 0.7)))


def test_annealed_tends_to_equal_shares_and_to_the_winner():
    scores, num_tokens = torch.tensor([[-3.0, -1.0, -2.0]]), torch.tensor([4])
    torch.testing.assert_close(annealed_weights(scores, num_tokens, 1e9), torch.full((1, 3), 1 / 3))
    assert annealed_weights(scores, num_tokens, 1e-9).tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("num_hypotheses", [2, 3, 7])
def test_relaxed_ends_exactly(num_hypotheses):
    winners = torch.arange(num_hypotheses)
    assert torch.equal(relaxed_weights(winners, num_hypotheses, 0.0), torch.eye(num_hypotheses))
    all_to_losers = relaxed_weights(winners, num_hypotheses, 1.0)
    assert all_to_losers.diagonal().tolist() == [0.0] * num_hypotheses
    assert relaxed_weights(torch.zeros(4, dtype=torch.long), 1, 0.4).tolist() == [[1.0]] * 4


def test_unknown_objective_is_named_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"`objective` must be one of wta, relaxed, annealed, balanced, random, got 'hard'"
    ):
        assignment_weights("hard", torch.zeros(1, 2), torch.ones(1), draws=lots(1, 3))


# --- any input ---


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    score_tables(),
    DTYPES,
    st.sampled_from(OBJECTIVES),
    st.floats(0.0, 1.0),
    st.one_of(st.none(), TEMPERATURES),
    st.integers(0, 2**32),
)
@example(([[3.4e38, -3.4e38]], [1]), torch.float32, "annealed", 0.0, 1e300, 0)
@example(([[math.inf, -math.inf, math.nan]], [0]), torch.float32, "annealed", 0.0, 1e39, 0)
@example(([[3.4e38, -3.4e38]], [1]), torch.float32, "annealed", 0.0, 1e-300, 0)
def test_weights_are_shares_whatever_the_scores(table_and_tokens, dtype, objective, epsilon, temperature, seed):
    table, tokens = table_and_tokens
    scores = torch.tensor(table, dtype=torch.float64).to(dtype).requires_grad_()
    weights, winners = assignment_weights(
        objective,
        scores,
        torch.tensor(tokens),
        epsilon=epsilon,
        temperature=temperature,
        draws=lots(len(table), scores.shape[1] + 1, seed),
    )
    assert weights.dtype == torch.float32
    assert weights.shape == scores.shape
    assert not weights.requires_grad
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(table)), rtol=0, atol=1e-5)
    assert winners.dtype == torch.int64
    # The winner is a hypothesis with the best score, but for the last digits of float32.
    for row, winner in zip(scores.float().tolist(), winners.tolist(), strict=True):
        finite = [as_finite(score) for score in row]
        assert max(finite) - finite[winner] <= 1.01e-6 * abs(max(finite))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(score_tables(), TEMPERATURES)
def test_annealed_never_prefers_a_worse_hypothesis(table_and_tokens, temperature):
    table, tokens = table_and_tokens
    weights = annealed_weights(torch.tensor(table), torch.tensor(tokens), temperature)
    for scores, row in zip(torch.tensor(table).tolist(), weights.tolist(), strict=True):
        finite = [as_finite(score) for score in scores]
        assert row[max(range(len(row)), key=finite.__getitem__)] == max(row)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(score_tables(), DTYPES)
def test_finite_scores_keeps_the_order(table_and_tokens, dtype):
    given_scores = torch.tensor(table_and_tokens[0], dtype=torch.float64).to(dtype)
    finite = finite_scores(given_scores)
    assert finite.dtype == torch.float32
    assert torch.isfinite(finite).all()
    for before, after in zip(given_scores.flatten().tolist(), finite.flatten().tolist(), strict=True):
        expected = as_finite(before)
        # float64 is rounded to float32.
        assert after == pytest.approx(expected, rel=1e-6, abs=1e-44)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.floats(1e-300, 1e300),
    st.floats(1e-300, 1e300),
    st.floats(1e-6, 1.0),
    st.integers(0, 10**9),
)
def test_temperature_is_between_its_ends_and_falls(first, second, decay, step):
    initial, final = max(first, second), min(first, second)
    now, later = (temperature_at(at, initial, final, decay) for at in (step, step + 1))
    assert final <= later <= now <= initial


# --- ties and draws ---


def test_ties_are_broken_uniformly_among_the_tied_only():
    count = 6000
    scores = torch.tensor([-1.0, -5.0, -1.0, -1.0]).repeat(count, 1)
    shares = torch.bincount(pick_winners(scores, lots(count, 4)), minlength=4) / count
    assert shares[1] == 0
    # Three standard deviations of a share of 1/3 are .018.
    assert all(abs(share - 1 / 3) < 0.025 for share in shares[[0, 2, 3]].tolist())


@pytest.mark.parametrize("size", [1e-3, 1.0, 37.3, 1e4])
def test_the_last_digits_of_float32_do_not_decide(size):
    best = -torch.tensor(size)
    digit = torch.nextafter(best, torch.tensor(-math.inf))
    lot = torch.tensor([[0.1, 0.9]])
    assert pick_winners(torch.stack([best, digit])[None], lot).tolist() == [1]
    # What float32 can tell does.
    assert pick_winners(torch.stack([best, best * (1 + 1e-5)])[None], lot).tolist() == [0]


def test_ties_of_infinities_and_nans_are_broken_too():
    for value in (math.nan, -math.inf, math.inf):
        winners = pick_winners(torch.full((300, 3), value), lots(300, 3))
        assert set(winners.tolist()) == {0, 1, 2}


def test_nan_never_wins_against_a_number():
    assert pick_winners(torch.tensor([[math.nan, -1e30], [math.nan, -3e38]]), lots(2, 2)).tolist() == [1, 1]


def test_the_global_random_numbers_are_left_alone_and_not_asked():
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        for objective in OBJECTIVES:
            found.append(
                assignment_weights(objective, torch.zeros(64, 3), torch.ones(64), temperature=1.0, draws=lots(64, 4))
            )
        sequence_draws([(1, 0), (2, 0)], 3, "place")
        assert torch.equal(before, torch.get_rng_state())
    for first, second in zip(found[: len(OBJECTIVES)], found[len(OBJECTIVES) :], strict=True):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


def test_random_choices_are_uniform_and_blind_to_the_scores():
    count = 6000
    scores = torch.tensor([0.0, -50.0, -1000.0]).repeat(count, 1)
    weights, winners = assignment_weights("random", scores, torch.ones(count), draws=lots(count, 4))
    assert (weights.sum(dim=1) == 1).all()
    assert (weights.max(dim=1).values == 1).all()
    assert all(abs(share - 1 / 3) < 0.025 for share in weights.mean(dim=0).tolist())
    assert winners.unique().tolist() == [0]
    # Independent of the ties.
    tied, tie_winners = assignment_weights("random", torch.zeros(count, 3), torch.ones(count), draws=lots(count, 4))
    agreement = (tied.argmax(dim=1) == tie_winners).float().mean()
    assert abs(agreement - 1 / 3) < 0.025


def test_random_weights_at_the_ends_of_the_draws():
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert random_weights(1, ends).tolist() == [[1.0]] * 2
    for num_hypotheses in (2, 3, 7, 1000):
        assert random_weights(num_hypotheses, ends).argmax(dim=1).tolist() == [0, num_hypotheses - 1]


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 3)), max_size=8), st.integers(1, 6), st.randoms())
def test_a_sequence_draws_the_same_wherever_it_is(sequences, count, random):
    together = dict(zip(sequences, sequence_draws(sequences, count, "0/1").tolist(), strict=True))
    order = random.sample(sequences, len(sequences))
    assert [together[sequence] for sequence in order] == sequence_draws(order, count, "0/1").tolist()
    for key, occurrence in sequences:
        assert sequence_draws([(key, occurrence)], count, "0/1").tolist() == [together[key, occurrence]]
        others = [((key, occurrence), "0/2"), ((key + 1, occurrence), "0/1"), ((key, occurrence + 1), "0/1")]
        for other, place in others:
            assert sequence_draws([other], count, place).tolist() != [together[key, occurrence]]


def test_equal_sequences_are_numbered_until_the_place_changes():
    occurrences = Occurrences()
    assert occurrences.number([7, 5, 7], "a") == [(7, 0), (5, 0), (7, 1)]
    assert occurrences.number([7, 5], "a") == [(7, 2), (5, 1)]
    assert occurrences.number([7], "b") == [(7, 0)]


def test_draws_of_sequences_are_uniform():
    draws = sequence_draws([(key, 0) for key in range(3000)], 4, "0/1")
    assert draws.min() >= 0
    assert draws.max() < 1
    # Three standard deviations of the mean are .016, those of a correlation .055.
    assert (draws.mean(dim=0) - 0.5).abs().max() < 0.016
    assert (torch.corrcoef(draws.T) - torch.eye(4)).abs().max() < 0.055
    assert torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))[0, 1].abs() < 0.055


# --- the schedule ---


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50, 333, 5000])
@pytest.mark.parametrize(("initial", "final"), [(1.0, 1e-6), (0.3, 0.1), (5.0, 4.9), (1e100, 1e-100), (1e-200, 1e-201)])
def test_derived_decay_starts_and_ends_exactly(initial, final, steps):
    decay = decay_for(initial, final, steps)
    assert temperature_at(0, initial, final, decay) == initial
    assert temperature_at(steps, initial, final, decay) == final
    assert temperature_at(steps + 1, initial, final, decay) == final
    if steps > 1:
        assert final < temperature_at(steps - 1, initial, final, decay) < initial


def test_derived_decay_is_geometric():
    temperatures = [temperature_at(step, 1.0, 1e-6, decay_for(1.0, 1e-6, 6)) for step in range(8)]
    assert temperatures == pytest.approx([1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-6])


@pytest.mark.parametrize("steps", [0.0, 0.3, 1.0])
def test_annealing_of_less_than_a_step_ends_after_one(steps):
    decay = decay_for(1.0, 0.01, steps)
    assert temperature_at(0, 1.0, 0.01, decay) == 1.0
    assert temperature_at(1, 1.0, 0.01, decay) == 0.01


def test_given_decay():
    assert temperature_at(3, 2.0, 1e-6, 0.5) == 0.25
    assert temperature_at(10**9, 2.0, 1e-6, 0.5) == 1e-6
    assert temperature_at(10**9, 2.0, 1e-6, 1.0) == 2.0


def test_equal_ends_are_final_from_the_start():
    assert temperature_at(0, 0.5, 0.5, decay_for(0.5, 0.5, 100)) == 0.5
