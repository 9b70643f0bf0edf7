"""The parts of training, in steps."""

from __future__ import annotations

import pytest

from tests.trainer_ext.reference import settings
from trainer_ext.schedule import Schedule


def parts(args, num_hypotheses, max_steps):
    found = []
    for step in range(max_steps):
        schedule = Schedule(args, num_hypotheses, step, max_steps)
        assert not (schedule.is_together and schedule.is_seeding)
        found.append("together" if schedule.is_together else "seeding" if schedule.is_seeding else "scores")
    return [found.count(part) for part in ("together", "seeding", "scores")]


@pytest.mark.parametrize(
    ("together", "seeding", "steps", "expected"),
    [
        (0.0, 0.0, 10, [0, 0, 10]),
        (0.3, 0.2, 10, [3, 2, 5]),
        # .7 * 10 is a little more than 7.
        (0.7, 0.1, 10, [7, 1, 2]),
        (0.01, 0.01, 10, [1, 1, 8]),
    ],
)
def test_parts(tmp_path, together, seeding, steps, expected):
    args = settings(tmp_path, together_fraction=together, seeding_fraction=seeding, annealing_fraction=0.9)
    assert parts(args, 3, steps) == expected
    assert parts(args, 1, steps) == [0, 0, steps]


def test_temperature_falls_once_the_scores_decide(tmp_path):
    args = settings(
        tmp_path,
        together_fraction=0.2,
        seeding_fraction=0.2,
        annealing_fraction=0.8,
        initial_temperature=1.0,
        final_temperature=0.1,
    )
    schedules = [Schedule(args, 3, step, 10) for step in range(10)]
    expected = [1.0, 1.0, 0.1, 0.1, 1.0, 10 ** (-1 / 4), 10 ** (-2 / 4), 10 ** (-3 / 4), 0.1, 0.1]
    assert [schedule.temperature for schedule in schedules] == pytest.approx(expected)
    assert [schedule.is_warm for schedule in schedules] == [True] * 2 + [False] * 2 + [True] * 4 + [False] * 2
