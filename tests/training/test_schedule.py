from __future__ import annotations

from itertools import pairwise

import pytest

from muse.config import OptimConfig
from muse.training.schedule import learning_rate_factor

SCHEDULES = ["cosine", "wsd", "constant"]


def factors(steps, **options):
    config = OptimConfig(**options)
    return [learning_rate_factor(config, step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (100, 0), (40, 1000), (2, 50), (7, 3)])
def test_warmup_is_linear_and_never_longer_than_half_of_the_run(schedule, steps, warmup):
    values = factors(steps, schedule=schedule, warmup=warmup)
    length = min(warmup, steps // 2)
    assert values[:length] == pytest.approx([(n + 1) / length for n in range(length)])
    assert values[length] <= 1
    assert max(values) == pytest.approx(1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("warmup", [0, 5, 500])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_bounds(schedule, steps, warmup, final):
    values = factors(steps, schedule=schedule, warmup=warmup, final_lr=final)
    length = min(warmup, steps // 2)
    assert all(0 < value <= 1 for value in values[:length])
    assert all(final - 1e-12 <= value <= 1 for value in values[length:])


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.1), ("wsd", 0.1), ("constant", 1.0)])
@pytest.mark.parametrize("steps", [10, 137])
def test_last_step(schedule, last, steps):
    assert factors(steps, schedule=schedule, warmup=3)[-1] == pytest.approx(last)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_falls_after_the_warmup(schedule):
    values = factors(200, schedule=schedule, warmup=20)[20:]
    assert all(after <= before + 1e-12 for before, after in pairwise(values))


def test_cosine_is_halfway_down_in_the_middle():
    values = factors(101, schedule="cosine", warmup=0, final_lr=0.2)
    assert values[0] == pytest.approx(1)
    assert values[50] == pytest.approx(0.6)
    assert values[25] - values[50] == pytest.approx(values[50] - values[75])


def test_wsd_is_stable_and_then_falls_linearly():
    values = factors(100, schedule="wsd", warmup=10, decay=0.2, final_lr=0.0)
    assert all(value == 1 for value in values[10:80])
    falls = [before - after for before, after in pairwise(values[79:])]
    assert falls == pytest.approx([0.05] * 20)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_after_the_end_stay_at_the_last_value(schedule):
    config = OptimConfig(schedule=schedule, warmup=3)
    assert learning_rate_factor(config, 500, 20) == pytest.approx(learning_rate_factor(config, 19, 20))
