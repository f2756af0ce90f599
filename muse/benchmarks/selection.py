"""``benchmark=selection``: what of the training text a selection leaves out, and keeps of each document."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from muse.benchmarks.benchmark import Benchmark, kinds_of
from muse.benchmarks.model import benchmark_model, train_briefly
from muse.benchmarks.results import Results, Unmeasured, name_of
from muse.benchmarks.workload import Workload, batch_shape
from muse.config import BenchConfig
from muse.data import Mix, TokenData, load_tokens
from muse.errors import ConfigError
from muse.hardware import autocast_dtype
from muse.models import LanguageModel
from muse.options import changed
from muse.report.sweep_plot import Metric
from muse.training.parallel import ParallelLoss
from muse.training.selection import Choice, Selection, check_reference, selection_of

# Of all tokens, those that are kept for the criterion; the documents ask that so many be left out then,
# though what is left out is 1 - SHARE, and for so many windows of each document.
SHARE = 0.2
FILTER_TARGET = 0.82
SAMPLES_TARGET = 100
# Documents that are looked at, evenly spaced over those long enough, and windows of each, likewise.
DOCUMENTS = 8
WINDOWS = 128


def measure_selection(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Let ``optim.selection`` choose among windows of the training split, in batches as a step has them.

    The windows are those of documents, files of data=stdlib and text, with at least ``SAMPLES_TARGET`` of
    them, a window being of the document in which it begins; in random order. Where no document is that long
    they are any. The model is that of ``benchmark.checkpoint``, or trained for ``benchmark.train_steps``.

    Returns:
        ``documents``, how many were looked at, and ``left_out``, how many are shorter; ``windows`` that were
        looked at; and by share, 0.2 and ``optim.selection_share``, in ``shares``: ``filtered``, the share of
        their tokens that is left out; ``samples``, of the document with the fewest, how many windows keep a
        token; ``least`` and ``most``, of any document, the share of its tokens that is kept; these None where
        no document is long enough.

    Raises:
        ConfigError: the text has no documents, or the reference is none for it.
    """
    if config.data.name == "synthetic":
        raise ConfigError("benchmark=selection needs text; choose data=stdlib, wikitext2, text or files")
    data = load_tokens(config.data, config.tokenizer, config.model.vocab_size)
    if isinstance(data.train, Mix):
        raise ConfigError("benchmark=selection asks of the documents of one text; choose other data than mix")
    check_reference(config, data.tokenizer)
    config = changed(config, model={"vocab_size": data.vocab_size})
    starts, documents, left_out = _windows(data, batch_shape(config)[1])
    model = _model(config, data, device).eval()
    selection = selection_of(config, ParallelLoss(model, "none"), device)
    assert selection is not None
    order = np.random.default_rng(config.seed).permutation(len(starts))
    shares = dict.fromkeys((SHARE, config.optim.selection_share))
    # Back where they were.
    kept = [
        of_windows[np.argsort(order)]
        for of_windows in _kept(config, model, selection, list(shares), data.train, starts[order], device)
    ]
    names = np.unique(documents)
    return {
        "documents": len(names),
        "left_out": left_out,
        "windows": len(starts),
        "shares": {
            f"{share:g}": _of_share(of_windows, documents, names, batch_shape(config)[1])
            for share, of_windows in zip(shares, kept, strict=True)
        },
    }


def _windows(data: TokenData, length: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Where windows begin and of which document each is; how many documents are too short.

    The second one is empty where all are.
    """
    assert data.tokenizer is not None
    if data.tokenizer.of_words:
        raise ConfigError(
            "tokenizer=word does not tell where documents end, which benchmark=selection asks; choose "
            "tokenizer=bpe or gpt2"
        )
    starts = np.arange((len(data.train) - 1) // length) * length
    if not len(starts):
        raise ConfigError(f"the training split has no window of {length} tokens; give a longer text")
    ends = np.flatnonzero(np.asarray(data.train) == data.tokenizer.end_id)
    document_of = np.searchsorted(ends, starts)
    counts = np.bincount(document_of)
    long = np.flatnonzero(counts >= SAMPLES_TARGET)
    left_out = len(ends) - len(long)
    if not len(long):
        return _evenly(starts, WINDOWS), np.zeros(0, np.int64), left_out
    chosen = [_evenly(starts[document_of == document], WINDOWS) for document in _evenly(long, DOCUMENTS)]
    numbers = [np.full(len(own), number) for number, own in enumerate(chosen)]
    return np.concatenate(chosen), np.concatenate(numbers), left_out


def _evenly(values: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of them, evenly spaced."""
    return values[np.unique(np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int))]


def _model(config: BenchConfig, data: TokenData, device: torch.device) -> LanguageModel:
    if config.benchmark.checkpoint is not None or not config.benchmark.train_steps:
        return benchmark_model(config, device)
    with tempfile.TemporaryDirectory() as folder:
        return train_briefly(config, data, device, Path(folder), [])[0]


@torch.no_grad()
def _kept(
    config: BenchConfig,
    model: LanguageModel,
    selection: Selection,
    shares: list[float],
    tokens: np.ndarray,
    starts: np.ndarray,
    device: torch.device,
) -> list[np.ndarray]:
    """How many tokens each window keeps, by share."""
    batch, length = batch_shape(config)
    cast = autocast_dtype(config.stage.precision)
    kept: list[list[Tensor]] = [[] for _ in shares]
    for number, first in enumerate(range(0, len(starts), batch)):
        rows = [tokens[start : start + length + 1] for start in starts[first : first + batch]]
        windows = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)
        inputs, targets = windows[:, :-1], windows[:, 1:]
        with torch.autocast(device.type, cast, enabled=cast is not None):
            features = model.features(inputs)
            for share, own in zip(shares, kept, strict=True):
                one = copy.copy(selection)
                one.options = dataclasses.replace(selection.options, selection_share=share)
                chosen = Choice(one, number)(model, features, inputs, targets)
                own.append(torch.bincount(chosen // length, minlength=len(rows)).cpu())
    return [torch.cat(own).numpy() for own in kept]


def _of_share(kept: np.ndarray, documents: np.ndarray, names: np.ndarray, length: int) -> dict[str, Any]:
    of_documents = [kept[documents == name] for name in names]
    shares = [float(own.mean() / length) for own in of_documents]
    return {
        "filtered": 1 - float(kept.mean() / length),
        "samples": min((int((own > 0).sum()) for own in of_documents), default=None),
        "least": min(shares, default=None),
        "most": max(shares, default=None),
    }


def judge(config: BenchConfig, results: Results) -> None:
    """What is left out at a kept share of 0.2, and how many windows of each document keep a token."""
    found: dict[str, Any] = Unmeasured()
    if config.optim.selection == "none":
        needed = kinds_of(config, "optim", "selection")
        reason = f"optim.selection=none leaves no token out; it needs {needed}"
        results.leave_open(reason, "filter_rate", "selection_samples")
    else:
        found = results.run("selection", config, name_of(config))
    details = {f"a share of {share}": values for share, values in (found["shares"] or {}).items()}
    if details:
        results.details["selection"] = details
    own = details.get(f"a share of {SHARE:g}") or Unmeasured()
    if found["documents"] == 0:
        reason = f"no document of the training split has {SAMPLES_TARGET} windows; choose a longer text"
        results.leave_open(reason, "selection_samples")
    rate, samples = own["filtered"], own["samples"]
    results.values |= {
        "filter_rate": rate,
        "filter_rate_pass": results.at_least(
            f"tokens left out at a kept share of {SHARE:g}, which is 1 - that", rate, FILTER_TARGET
        ),
        "selection_samples": samples,
        "selection_samples_pass": results.at_least(
            "windows that keep a token, of the document with the fewest", samples, SAMPLES_TARGET
        ),
        "selection_documents": found["documents"],
        "selection_documents_left_out": found["left_out"],
    }


def check(config: BenchConfig) -> None:
    """See that there is a selection.

    Raises:
        ConfigError: there is none.
    """
    if config.benchmark.name == "selection" and config.optim.selection == "none":
        raise ConfigError(f"benchmark=selection needs {kinds_of(config, 'optim', 'selection')}")


BENCHMARK = Benchmark(
    measure={"selection": measure_selection},
    judge=judge,
    shown=(Metric("filter_rate", "share of the tokens left out"),),
    stages=("3",),
    # A step's.
    workload=lambda config: Workload(config.train.batch_size),
    check=check,
)
