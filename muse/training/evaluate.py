"""The fixed evaluation protocol: contiguous windows over the whole split, every token predicted once.

Along the way a part of these windows stands for all, always the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from muse.data import Counts, evaluation_batches, rolling_batches
from muse.dynamics import deferred_checks, layers_that_fall_back
from muse.models import LanguageModel
from muse.models.language_model import model_device
from muse.processes.ranks import all_reduced_sum, rank, ranks
from muse.report.table import table

# Bytes a word on average beyond which what stands between white space is no word: Chinese, or DNA.
LONGEST_WORDS = 40


@dataclass(frozen=True)
class Evaluation:
    """Loss of a split, told in three units because a perplexity per token depends on the tokenizer.

    Attributes:
        loss: mean cross-entropy in nats a token.
        ppl: perplexity per token.
        word_ppl: perplexity per word; None where ``word_ppl_reason`` says why.
        bits_per_byte: bits per UTF-8 byte; None without text or when only a part was evaluated.
        tokens: predicted tokens.
        word_ppl_reason: why there is no perplexity per word; None where there is one.
    """

    loss: float
    ppl: float
    word_ppl: float | None
    bits_per_byte: float | None
    tokens: int
    word_ppl_reason: str | None


def evaluation_table(found: Mapping[str, Evaluation], texts: str) -> str:
    """Evaluations by the name of their text, for the terminal; ``texts`` heads these names."""
    return table(
        (texts, "loss [nats/token]", "perplexity", "per word", "bits/byte", "tokens"),
        [(name, e.loss, e.ppl, e.word_ppl, e.bits_per_byte, e.tokens) for name, e in found.items()],
    )


def perplexity(loss: float) -> float:
    """exp of a loss in nats; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def evaluate(
    model: LanguageModel,
    tokens: np.ndarray,
    counts: Counts | None,
    seq_len: int,
    batch_size: int,
    stride: int | None = None,
    limit: int = 0,
    precision: torch.dtype | None = None,
) -> Evaluation:
    """Evaluate ``model`` on a split; ranks take turns in the windows of a batch, and all know the result.

    Args:
        tokens: the split, (tokens,).
        counts: its words and bytes.
        seq_len: tokens in a window.
        batch_size: windows at a time.
        stride: tokens that the window moves by; None for no overlap.
        limit: tokens to evaluate, in windows spread evenly over the split; 0 for all.
        precision: autocast dtype; None for the dtype of the parameters.
    """
    windows = partial(evaluation_batches, tokens, seq_len, batch_size, stride, limit)
    total, predicted = _total(model, precision, windows)
    return _in_units(total, predicted, counts, counts is not None and predicted >= len(tokens) - 1)


def evaluate_rolling(
    model: LanguageModel,
    documents: Sequence[np.ndarray],
    counts: Counts,
    prefix: int,
    seq_len: int,
    batch_size: int,
    precision: torch.dtype | None = None,
) -> Evaluation:
    """Evaluate each document by itself, as ``loglikelihood_rolling`` of the lm-evaluation-harness does.

    Args:
        model: as in ``evaluate``, whose other arguments are these.
        documents: (tokens,) each, without ends.
        counts: words and bytes of all of them.
        prefix: the token from which a document's first one is predicted.
        seq_len: tokens in a window.
        batch_size: windows at a time.
        precision: autocast dtype; None for the dtype of the parameters.
    """
    windows = partial(rolling_batches, documents, prefix, seq_len, batch_size)
    return _in_units(*_total(model, precision, windows), counts, True)


Batches = Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@torch.no_grad()
def _total(
    model: LanguageModel, precision: torch.dtype | None, windows: Callable[[], Batches]
) -> tuple[float, int]:
    """The summed loss of the windows, and how many tokens it is of."""
    training = model.training
    model.eval()
    try:
        with deferred_checks(model):
            total, predicted = _sum(model, precision, windows())
        if not math.isfinite(total) and layers_that_fall_back(model):
            total, predicted = _sum(model, precision, windows())
    finally:
        model.train(training)
    return total, predicted


def _sum(model: LanguageModel, precision: torch.dtype | None, windows: Batches) -> tuple[float, int]:
    """The same, in one pass. The host waits for the device once."""
    device = model_device(model)
    total, predicted = torch.zeros((), dtype=torch.float64, device=device), 0
    for inputs, targets, mask in windows:
        targets = targets.masked_fill(~mask, -1)
        inputs, targets = (x.to(device, non_blocking=True) for x in _share(inputs, targets))
        with torch.autocast(device.type, precision, enabled=precision is not None):
            total += model.loss(inputs, targets, reduction="sum")
        predicted += int(mask.sum())
    return (all_reduced_sum(total) if ranks() > 1 else total).item(), predicted


def _in_units(total: float, predicted: int, counts: Counts | None, whole: bool) -> Evaluation:
    """A summed loss of so many tokens, those of the whole text or not."""
    loss = total / max(1, predicted)
    reason = _no_word_ppl(total, counts, whole)
    word_ppl = perplexity(total / counts.words) if reason is None and counts and counts.words else None
    bits = total / math.log(2) / counts.bytes if whole and counts and counts.bytes else None
    return Evaluation(loss, perplexity(loss), word_ppl, bits, predicted, reason)


def _no_word_ppl(total: float, counts: Counts | None, whole: bool) -> str | None:
    """Why a loss of ``total`` nats has no perplexity per word; None where it has one."""
    if counts is None or not counts.words:
        return "the words were not counted"
    if not whole:
        return "only a part of the split was evaluated"
    if counts.bytes and counts.bytes > LONGEST_WORDS * counts.words:
        return f"words of {counts.bytes / counts.words:,.0f} bytes on average are none"
    if math.isinf(perplexity(total / counts.words)):
        return "it is too large for a float"
    return None


def _share(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows of this rank; one that does not count where there are too few.

    With sharded parameters a rank must not leave a forward pass out.
    """
    if ranks() == 1:
        return inputs, targets
    own = slice(rank(), None, ranks())
    if rank() < len(inputs):
        return inputs[own], targets[own]
    return inputs[:1], torch.full_like(targets[:1], -1)
