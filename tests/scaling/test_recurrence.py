import numpy as np
import pytest

from muse.scaling.recurrence import Recurrence, recurrence_exponents

LADDER = [Recurrence(1000, 4000 * depth, 1) for depth in (1, 2, 4)]
LOOPED = [Recurrence(1000, 4000, times) for times in (2, 4)]


def losses(models, exponent, noise=0.0, draws=1):
    sizes = np.array([model.once + model.times**exponent * model.repeated for model in models])
    return 4 - 0.2 * np.log(sizes) + noise * np.random.default_rng(0).normal(size=(draws, len(models)))


@pytest.mark.parametrize("exponent", [-0.3, 0.0, 0.46, 1.0, 1.4])
def test_the_exponent_of_a_law_is_found(exponent):
    models = LADDER + LOOPED
    assert recurrence_exponents(models, losses(models, exponent)) == pytest.approx(exponent, abs=0.003)


def test_each_draw_has_its_own():
    models = LADDER + LOOPED
    found = recurrence_exponents(models, losses(models, 0.46, noise=0.01, draws=200))
    assert found.shape == (200,)
    assert 0.01 < found.std() < 0.2
    assert found.mean() == pytest.approx(0.46, abs=0.05)


@pytest.mark.parametrize(
    ("models", "slope"),
    [
        # Nothing says what weights are worth; and here they do harm.
        (LADDER[:1] + LOOPED, 1.0),
        (LADDER + LOOPED, -1.0),
    ],
)
def test_what_cannot_be_told_is_no_number(models, slope):
    assert np.isnan(recurrence_exponents(models, slope * losses(models, 0.46))).all()


def test_an_exponent_at_the_end_of_those_tried_was_not_found():
    assert np.isnan(recurrence_exponents(LADDER + LOOPED, losses(LADDER + LOOPED, 3.0))).all()
