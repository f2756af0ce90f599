import numpy as np

from muse.measure.bootstrap import mean_interval, resampled


def test_an_interval_holds_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    chosen = resampled(30, draws=1000)
    held = [
        low <= 2.0 <= high
        for low, high in (mean_interval(generator.normal(2.0, 1.0, 30), chosen) for _ in range(300))
    ]
    # Of 30 values, somewhat less often than 95 %.
    assert 0.89 < np.mean(held) < 0.98


def test_equal_values_leave_no_doubt_and_one_value_has_no_interval():
    assert mean_interval(np.full(3, 1.5), resampled(3)) == (1.5, 1.5)
    assert mean_interval(np.array([1.5]), resampled(1)) is None


def test_draws_are_the_same_each_time_and_take_every_repeat():
    assert np.array_equal(resampled(4), resampled(4))
    assert set(resampled(4).ravel()) == {0, 1, 2, 3}
