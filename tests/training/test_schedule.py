from __future__ import annotations

from itertools import pairwise

import pytest

from muse.config import OptimConfig
from muse.training.schedule import learning_rate, learning_rate_factor, same_until

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


@pytest.mark.parametrize(
    ("schedule", "step", "same"),
    [("cosine", 2, True), ("cosine", 4, False), ("wsd", 6, True), ("wsd", 7, False), ("constant", 8, True)],
)
def test_more_steps_are_the_same_schedule_until_it_decays(schedule, step, same):
    config = OptimConfig(schedule=schedule, warmup=2, decay=0.2)
    assert same_until(step, config, 8, config, 12) is same
    rates = [[learning_rate_factor(config, n, steps) for n in range(step)] for steps in (8, 12)]
    assert (rates[0] == rates[1]) is same


def test_a_warm_up_that_was_cut_short_is_another_one():
    config = OptimConfig(schedule="constant", warmup=50)
    assert not same_until(8, config, 8, config, 12)
    assert same_until(8, config, 100, config, 200)


@pytest.mark.parametrize("option", ["lr", "muon_lr"])
def test_another_peak_is_another_schedule(option):
    assert not same_until(1, OptimConfig(), 8, OptimConfig(**{option: 1.0}), 8)
    assert same_until(0, OptimConfig(), 8, OptimConfig(**{option: 1.0}), 8)


@pytest.mark.parametrize(("name", "peak"), [("adamw", 0.25), ("muon", 0.5)])
def test_the_rate_is_that_of_the_optimiser(name, peak):
    config = OptimConfig(name=name, lr=0.25, muon_lr=0.5, schedule="constant", warmup=2)
    assert [learning_rate(config, step, 8) for step in (0, 1, 7)] == [peak / 2, peak, peak]
