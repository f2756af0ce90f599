"""Windows of tokens: training batches by step number, and the evaluation of a whole split."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from muse.data.interleaving import Mix
from muse.data.packing import PackedText
from muse.errors import ConfigError

# What messages call a training split that is no mix.
WHOLE = "the training split"


def training_batch(
    tokens: np.ndarray | Mix, step: int, batch_size: int, seq_len: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of one training step, a pure function of its arguments.

    An epoch starts at a random offset and visits, in random order and once each, consecutive windows
    of ``seq_len`` inputs. A batch may straddle two epochs, and of a mix each source has its own.

    Args:
        tokens: the training split, integers of shape (n,), or several.
        step: number of the micro-batch, from 0.
        batch_size: windows in the batch.
        seq_len: inputs in a window; a window has one token more, the last target.
        seed: seed of the offsets and orders.

    Returns:
        Inputs and targets, the tokens that follow; int64 of shape (batch_size, seq_len).

    Raises:
        ConfigError: when the split is shorter than one window.
    """
    windows = [
        _window(tokens, index, seq_len, seed) for index in range(step * batch_size, (step + 1) * batch_size)
    ]
    batch = torch.from_numpy(np.stack(windows).astype(np.int64))
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def document_batch(
    text: PackedText | Mix, step: int, batch_size: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The batch of one training step on documents, a pure function of its arguments.

    An epoch visits every window once, in random order; else it is as ``training_batch``.

    Args:
        text: the packed training split, or several.
        step: number of the micro-batch, from 0.
        batch_size: windows in the batch.
        seed: seed of the orders.

    Returns:
        Inputs, targets, the tokens that follow, or -1 where nothing does, and positions, which are 0 where a
        token sees none of those before it; int64 of shape (batch_size, seq_len).
    """
    windows = [
        packed.window(number)
        for packed, number in _packed_windows(text, step * batch_size, (step + 1) * batch_size, seed)
    ]
    inputs, targets, positions = (torch.from_numpy(np.stack(part)) for part in zip(*windows, strict=True))
    return inputs, targets, positions


def document_targets(text: PackedText | Mix, first: int, last: int, seed: int) -> int:
    """How many targets count in the windows ``first`` to ``last - 1`` of a training on documents."""
    return sum(packed.filled(number) for packed, number in _packed_windows(text, first, last, seed))


def _packed_windows(
    text: PackedText | Mix, first: int, last: int, seed: int
) -> Iterator[tuple[PackedText, int]]:
    """Of each window in the row of all epochs, the text that it is of and its number there."""
    for index in range(first, last):
        packed, _, key, own = _source_of(text, index, seed)
        epoch, position = divmod(own, packed.windows)
        _, order = _epoch(packed.windows, 0, (*key, epoch))
        yield packed, int(order[position])


def end_of_training_text(
    tokens: np.ndarray | PackedText | Mix, windows: int, seq_len: int, seed: int, most: int
) -> tuple[int, str] | None:
    """After which step some training text has no window left that was not seen.

    Args:
        tokens: the training split, packed or not, or several.
        windows: in a step.
        seq_len: inputs in a window.
        seed: of the training.
        most: steps to look at.

    Returns:
        The number of steps, and what ends; None where nothing does within ``most`` steps.

    Raises:
        ConfigError: as ``training_batch``.
    """
    mix = tokens if isinstance(tokens, Mix) else Mix((WHOLE,), (tokens,), (1.0,))
    ends = []
    for number, (name, stream) in enumerate(zip(mix.names, mix.tokens, strict=True)):
        if isinstance(stream, PackedText):
            there = stream.windows
        else:
            there, _ = _epoch_size(len(stream), seq_len, name)

        def seen(step: int, number: int = number) -> int:
            return mix.windows_of(step * windows, seed)[number]

        ends.append((bisect_right(range(most + 1), there, key=seen) - 1, name))
    first = min(ends)
    return first if first[0] < most else None


def _window(tokens: np.ndarray | Mix, index: int, seq_len: int, seed: int) -> np.ndarray:
    """A window of ``seq_len`` inputs and the last target, by its number."""
    source, name, key, own = _source_of(tokens, index, seed)
    windows, slack = _epoch_size(len(source), seq_len, name)
    epoch, position = divmod(own, windows)
    offset, order = _epoch(windows, slack, (*key, epoch))
    start = offset + int(order[position]) * seq_len
    return source[start : start + seq_len + 1]


def _source_of(text: Any, index: int, seed: int) -> tuple[Any, str, tuple[int, ...], int]:
    """What a window is of, its name, what its epochs are drawn by, and the window's number in it."""
    if not isinstance(text, Mix):
        return text, WHOLE, (seed,), index
    source, index = text.source_of(index, seed)
    return text.tokens[source], text.names[source], (seed, source), index


def _epoch_size(tokens: int, seq_len: int, name: str) -> tuple[int, int]:
    """Windows in an epoch of a split, and the largest offset of the first one."""
    windows, slack = divmod(tokens - 1, seq_len)
    if windows < 1:
        raise ConfigError(
            f"model.seq_len={seq_len} is too long for {name} of {tokens} tokens; it must be at most "
            f"{tokens - 1}"
        )
    if windows > 1:
        # One window fewer, so that every epoch has as many and can still start anywhere in a window.
        windows, slack = windows - 1, slack + seq_len
    return windows, slack


# Two of each source where there are many.
@lru_cache(maxsize=32)
def _epoch(windows: int, slack: int, seed: tuple[int, ...]) -> tuple[int, np.ndarray]:
    """The offset of the first window, at most ``slack``, and the order of the windows."""
    generator = np.random.default_rng(seed)
    return int(generator.integers(slack + 1)), generator.permutation(windows)


def evaluation_batches(
    tokens: np.ndarray, seq_len: int, batch_size: int, stride: int | None = None, limit: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Windows that predict every token but the first exactly once, in order, or some of them, evenly spread.

    Without ``stride`` the windows do not overlap. With it they move by ``stride`` tokens, and only the
    last ``stride`` targets of each count (all of the first window's), so that a prediction sees at
    least ``seq_len - stride`` tokens of context.

    Args:
        tokens: a split, integers of shape (n,).
        seq_len: inputs in a window.
        batch_size: windows in a batch; the last one may have fewer.
        stride: tokens that the window moves by, at most ``seq_len``; None for ``seq_len``.
        limit: tokens to predict, by as many windows as that takes: those of the whole split in the middle
            of equal parts of it, which depend on nothing but the sizes; 0 for all.

    Yields:
        Inputs and targets, int64, and the mask of the targets that count, bool; each of shape
        (batch_size, seq_len). Inputs and targets beyond the end of the split are 0.

    Raises:
        ConfigError: when the stride would skip tokens or there is nothing to predict.
    """
    stride = seq_len if stride is None else stride
    if not 1 <= stride <= seq_len:
        raise ConfigError(
            f"train.eval_stride={stride} is not allowed; it must be between 1 and model.seq_len={seq_len}"
        )
    if len(tokens) < 2:
        raise ConfigError(f"data has a split of {len(tokens)} tokens; an evaluation needs at least 2")
    windows, chosen = (evaluation_windows(len(tokens), seq_len, stride, most) for most in (0, limit))
    for first in range(0, chosen, batch_size):
        # The middle of part i is (i + 1/2) windows / chosen.
        parts = torch.arange(first, min(first + batch_size, chosen))
        starts = ((2 * parts + 1) * windows // (2 * chosen))[:, None] * stride
        batch = torch.zeros(len(starts), seq_len + 1, dtype=torch.int64)
        for row, start in enumerate(starts.flatten().tolist()):
            window = tokens[start : start + seq_len + 1].astype(np.int64)
            batch[row, : len(window)] = torch.from_numpy(window)
        position = torch.arange(seq_len)
        new = ((starts == 0) | (position >= seq_len - stride)) & (starts + position < len(tokens) - 1)
        yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), new


def evaluation_windows(tokens: int, seq_len: int, stride: int | None = None, limit: int = 0) -> int:
    """How many windows ``evaluation_batches`` yields of a split of so many tokens."""
    stride = seq_len if stride is None else stride
    windows = 1 + max(0, -(-(tokens - 1 - seq_len) // stride))
    return windows if limit == 0 else min(windows, -(-limit // stride))


def rolling_batches(
    documents: Sequence[np.ndarray], prefix: int, seq_len: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Windows that predict every token of each document once, as the lm-evaluation-harness cuts them.

    A document's first window begins with ``prefix``, and each window after it with the token before its first
    target; the last one of several begins earlier, so that it is full, and only its new targets count.

    Args:
        documents: integers of shape (n,) each; an empty one has no window.
        prefix: the token before each document.
        seq_len: inputs in a window.
        batch_size: windows in a batch; the last one may have fewer.

    Yields:
        What ``evaluation_batches`` yields.
    """
    streams = [np.concatenate([[prefix], document]).astype(np.int64) for document in documents]
    # Stream, first input, first target that counts.
    windows = [
        (stream, min(predicted, max(0, len(stream) - 1 - seq_len)), predicted)
        for stream in streams
        for predicted in range(0, len(stream) - 1, seq_len)
    ]
    for first in range(0, len(windows), batch_size):
        chosen = windows[first : first + batch_size]
        batch = torch.zeros(len(chosen), seq_len + 1, dtype=torch.int64)
        new = torch.zeros(len(chosen), seq_len, dtype=torch.bool)
        for row, (stream, start, predicted) in enumerate(chosen):
            window = torch.from_numpy(stream[start : start + seq_len + 1])
            batch[row, : len(window)] = window
            new[row, predicted - start : len(window) - 1] = True
        yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), new
