"""The windows of data=mix: by weight over any stretch, and by their number alone."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
import torch

from muse.data import Mix, end_of_training_text, training_batch
from muse.errors import ConfigError

WEIGHTS = [
    (1.0,),
    (0.7, 0.3),
    (1.0, 1.0),
    (0.999, 0.001),
    (0.001, 0.999),
    (0.5, 0.3, 0.2),
    (1.0, 2.0, 3.0, 4.0),
    (0.3, 0.1, 0.0003, 0.4, 0.2, 1e-9),
    tuple(1 / n for n in range(1, 20)),
]
# Where the first source begins, and how far it goes; the others follow.
LENGTHS = (400, 1000, 130)
STARTS = (0, 1000, 5000)


def mix_of(weights: tuple[float, ...]) -> Mix:
    names = tuple(f"s{number}" for number in range(len(weights)))
    return Mix(names, tuple(np.zeros(9, np.uint16) for _ in weights), weights)


def counting(weights: tuple[float, ...] = (0.5, 0.3, 0.2)) -> Mix:
    """Sources whose tokens tell which one they are of, and where in it."""
    tokens = (start + np.arange(size, dtype=np.uint16) for start, size in zip(STARTS, LENGTHS, strict=True))
    return Mix(("data.sources.a", "data.sources.b", "data.sources.c"), tuple(tokens), weights)


@pytest.mark.parametrize("weights", WEIGHTS, ids=len)
@pytest.mark.parametrize("first", [0, 10**12])
def test_weights_hold_over_every_stretch(weights, first):
    mix, total = mix_of(weights), sum(weights)
    chosen = np.array([mix.source_of(first + window, seed=3)[0] for window in range(3000)])
    for number, weight in enumerate(weights):
        counts = np.concatenate([[0], np.cumsum(chosen == number)])
        for size in (1, 2, 10, 1000):
            found = counts[size:] - counts[:-size]
            assert np.abs(found - size * weight / total).max() <= max(0, len(weights) - 1)


@pytest.mark.parametrize("weights", WEIGHTS, ids=len)
def test_the_windows_of_a_source_are_numbered_without_a_gap(weights):
    mix = mix_of(weights)
    seen = [0] * len(weights)
    for window in range(2000):
        assert mix.windows_of(window, seed=1) == seen
        source, place = mix.source_of(window, seed=1)
        assert place == seen[source]
        seen[source] += 1


def test_seeds_begin_elsewhere():
    mix = mix_of((0.7, 0.3))
    orders = {tuple(mix.source_of(window, seed)[0] for window in range(50)) for seed in range(10)}
    assert len(orders) > 3


def test_each_source_is_seen_whole_and_once_an_epoch():
    mix, seq_len = counting(), 8
    starts: dict[int, list[int]] = {number: [] for number in range(3)}
    inputs, targets = training_batch(mix, 0, 1000, seq_len, seed=0)
    assert torch.equal(targets, inputs + 1)
    for window, start in enumerate(inputs[:, 0].tolist()):
        number, _ = mix.source_of(window, seed=0)
        assert STARTS[number] <= start < STARTS[number] + LENGTHS[number]
        starts[number].append(start)
    for number, found in starts.items():
        windows = (LENGTHS[number] - 1) // seq_len - 1
        epoch = sorted(found[:windows])
        assert epoch == list(accumulate([seq_len] * (windows - 1), initial=epoch[0]))


def test_a_batch_depends_on_nothing_but_its_number_and_is_cut_into_any_parts():
    mix = counting()
    whole = training_batch(mix, 5, 12, 8, seed=4)[0]
    parts = [training_batch(mix, step, 4, 8, seed=4)[0] for step in (17, 15, 16)]
    assert torch.equal(whole, torch.cat([parts[1], parts[2], parts[0]]))
    assert not torch.equal(whole, training_batch(mix, 5, 12, 8, seed=5)[0])


def test_a_source_that_is_too_short_is_named():
    with pytest.raises(
        ConfigError, match=r"model\.seq_len=200 is too long for data\.sources\.c of 130 tokens"
    ):
        training_batch(counting(), 0, 20, 200, seed=0)


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1.0, 9.0, 0.1), (1.0, 1.0, 5.0)])
@pytest.mark.parametrize("windows", [1, 3, 16])
def test_the_end_is_the_last_step_before_a_source_would_be_seen_again(weights, windows):
    mix, seq_len = counting(weights), 8
    steps, name = end_of_training_text(mix, windows, seq_len, 2, 10_000) or (0, "")
    there = [(length - 1) // seq_len - 1 for length in LENGTHS]
    ended = mix.names.index(name)
    assert all(seen <= most for seen, most in zip(mix.windows_of(steps * windows, 2), there, strict=True))
    assert mix.windows_of((steps + 1) * windows, 2)[ended] > there[ended]
    assert end_of_training_text(mix, windows, seq_len, 2, steps) is None
    assert end_of_training_text(mix, windows, seq_len, 2, steps + 1) == (steps, name)


def test_a_single_text_ends_with_its_epoch():
    tokens = np.arange(1000, dtype=np.uint16)
    steps, _ = end_of_training_text(tokens, 4, 16, 0, 10_000) or (0, "")
    inputs = torch.cat([training_batch(tokens, step, 4, 16, 0)[0] for step in range(steps)])
    assert len(set(inputs.flatten().tolist())) == inputs.numel()
    again = training_batch(tokens, steps, 4, 16, 0)[0]
    assert len(set(torch.cat([inputs, again]).flatten().tolist())) < inputs.numel() + again.numel()
