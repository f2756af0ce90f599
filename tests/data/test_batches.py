from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from muse.data import batches, evaluation_batches, evaluation_windows, rolling_batches, training_batch
from muse.errors import ConfigError


def count_up(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.uint16)


def test_targets_are_the_tokens_that_follow():
    inputs, targets = training_batch(count_up(1000), 3, 4, 16, seed=0)
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_a_batch_depends_on_nothing_but_its_arguments():
    tokens = count_up(1000)
    in_order = [training_batch(tokens, step, 4, 16, seed=1)[0] for step in range(50)]
    for step in (49, 0, 31, 14, 30):
        training_batch(tokens, step, 3, 8, seed=7)
        assert torch.equal(training_batch(tokens, step, 4, 16, seed=1)[0], in_order[step])
    assert not torch.equal(training_batch(tokens, 0, 4, 16, seed=2)[0], in_order[0])


@pytest.mark.parametrize("size", [17, 18, 33, 34, 97, 1000])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_an_epoch_visits_every_window_once(size, batch_size):
    seq_len, epochs = 16, 3
    windows = max(1, (size - 1) // seq_len - 1)
    steps = -(-epochs * windows // batch_size)
    inputs = [training_batch(count_up(size), step, batch_size, seq_len, seed=0)[0] for step in range(steps)]
    starts = torch.cat(inputs)[:, 0][: epochs * windows].reshape(epochs, windows)
    for epoch in starts:
        ordered = epoch.sort().values
        assert torch.equal(ordered, ordered[0] + seq_len * torch.arange(windows))


def test_epochs_differ_in_order_and_offset_and_reach_every_token():
    size, seq_len, epochs = 100, 8, 60
    windows = (size - 1) // seq_len - 1
    steps = range(epochs * windows)
    windows_seen = [training_batch(count_up(size), step, 1, seq_len, seed=0) for step in steps]
    starts = torch.stack([inputs[0, 0] for inputs, _ in windows_seen]).reshape(epochs, windows)
    assert len({tuple(epoch.tolist()) for epoch in starts}) == epochs
    assert len({int(start) % seq_len for start in starts.flatten()}) == seq_len
    assert set(torch.cat([inputs for inputs, _ in windows_seen]).flatten().tolist()) == set(range(size - 1))
    assert set(torch.cat([targets for _, targets in windows_seen]).flatten().tolist()) == set(range(1, size))


def test_later_steps_of_an_epoch_do_not_permute_again():
    batches._epoch.cache_clear()
    for step in range(20):
        training_batch(count_up(1000), step, 2, 16, seed=5)
    assert batches._epoch.cache_info().misses == 1


@pytest.mark.parametrize("size", [0, 1, 16])
def test_too_little_training_text_names_the_option(size):
    with pytest.raises(ConfigError, match=r"model\.seq_len=16"):
        training_batch(count_up(size), 0, 1, 16, seed=0)


@pytest.mark.parametrize("stride", [None, 1, 3, 7, 8])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_token_is_predicted_once(stride, batch_size):
    for size in (2, 3, 8, 9, 10, 15, 16, 17, 18, 61, 101):
        check_predictions(size, stride, batch_size)


def check_predictions(size: int, stride: int | None, batch_size: int) -> None:
    seq_len = 8
    predicted: list[int] = []
    for inputs, targets, mask in evaluation_batches(count_up(size), seq_len, batch_size, stride):
        assert inputs.shape == targets.shape == mask.shape
        assert inputs.shape[0] <= batch_size
        assert inputs.shape[1] == seq_len
        assert (inputs.dtype, targets.dtype, mask.dtype) == (torch.int64, torch.int64, torch.bool)
        assert mask.any(dim=1).all(), "a window that predicts nothing is wasted"
        assert torch.equal(targets[mask], inputs[mask] + 1)
        predicted += targets[mask].tolist()
    assert predicted == list(range(1, size))


def windows_of(
    size: int, stride: int | None, limit: int, batch_size: int = 3
) -> list[tuple[torch.Tensor, ...]]:
    """Inputs, targets and mask of each window."""
    found = evaluation_batches(count_up(size), 8, batch_size, stride, limit)
    return [window for batch in found for window in zip(*batch, strict=True)]


@pytest.mark.parametrize("size", [2, 9, 10, 61, 101, 300])
@pytest.mark.parametrize("stride", [None, 1, 3, 8])
def test_a_limit_takes_windows_from_equal_parts_of_the_split(size, stride):
    for limit in (1, 8, 13, 40, 5000):
        check_limit(size, stride, limit)


def check_limit(size: int, stride: int | None, limit: int) -> None:
    every, some = windows_of(size, stride, 0), windows_of(size, stride, limit)
    assert (
        len(some) == evaluation_windows(size, 8, stride, limit) == min(len(every), -(-limit // (stride or 8)))
    )
    assert len(every) == evaluation_windows(size, 8, stride)
    starts = [int(inputs[0]) for inputs, _, _ in every]
    for part, window in enumerate(some):
        place = starts.index(int(window[0][0]))
        # It holds the middle of its part.
        assert place <= (part + 0.5) * len(every) / len(some) < place + 1
        # Predicted as in the evaluation of the whole split: with the same context.
        assert all(torch.equal(a, b) for a, b in zip(window, every[place], strict=True))
    for batch_size in (1, 7):
        again = windows_of(size, stride, limit, batch_size)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(some, again, strict=True))


def test_a_sliding_window_gives_every_prediction_context():
    seq_len, stride = 8, 3
    for inputs, targets, mask in evaluation_batches(count_up(100), seq_len, 4, stride):
        context = targets - inputs[:, :1]
        assert (context[mask & (inputs[:, :1] > 0)] >= seq_len - stride + 1).all()


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_skips_tokens_names_the_option(stride):
    with pytest.raises(ConfigError, match=r"train\.eval_stride="):
        next(evaluation_batches(count_up(100), 8, 4, stride))


def test_nothing_to_predict_is_an_error():
    with pytest.raises(ConfigError, match="at least 2"):
        next(evaluation_batches(count_up(1), 8, 4))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_rolling_windows_predict_each_document_from_its_prefix(batch_size):
    seq_len, prefix = 8, 999
    sizes = [1, 7, 8, 9, 16, 17, 30, 0, 3]
    starts = np.cumsum([0, *sizes])
    documents = [count_up(stop)[start:] for start, stop in pairwise(starts)]
    first = {int(document[0]) for document in documents if len(document)}
    seen, contexts = [], []
    for inputs, targets, new in rolling_batches(documents, prefix, seq_len, batch_size):
        assert inputs.shape == targets.shape == new.shape
        assert len(inputs) <= batch_size
        assert inputs.is_contiguous()
        for row, wanted, counts in zip(inputs.tolist(), targets.tolist(), new.tolist(), strict=True):
            places = [place for place in range(seq_len) if counts[place]]
            assert places == list(range(places[0], places[-1] + 1))
            for place in places:
                assert row[place] == (prefix if wanted[place] in first else wanted[place] - 1)
            seen += [wanted[place] for place in places]
            contexts.append(places[-1] + 1)
    assert seen == list(range(sum(sizes)))
    # Full ones, but for documents that are shorter than a window.
    assert contexts == [min(size, seq_len) for size in sizes for _ in range(0, size, seq_len)]
