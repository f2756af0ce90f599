"""What ranks tell each other, and what they find out together."""

from __future__ import annotations

import errno
import functools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.configs import SEQ_LEN, VOCAB, stage_config
from support.distributed import run_config, run_ranks, run_train, token_data
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.tensor import distribute_tensor

from muse.data import Counts
from muse.errors import ConfigError, RunError
from muse.models import build_model
from muse.processes.ranks import (
    all_gathered,
    all_reduced_max,
    all_reduced_sum,
    broadcast,
    on_first_rank,
    rank,
    ranks,
)
from muse.runs.checkpoints import find_checkpoint, find_damage
from muse.training import trainer
from muse.training.evaluate import evaluate
from muse.training.optim import ModelOptimizer, first_non_finite
from muse.training.parallel import ParallelLoss
from muse.training.step import training_step


def told() -> dict[str, Any]:
    return {
        "rank": (rank(), ranks()),
        "same": broadcast(f"from rank {rank()}"),
        "gathered": all_gathered({"rank": rank()}),
        "first": on_first_rank(lambda: os.getpid()) == broadcast(os.getpid()),
        "summed": all_reduced_sum(torch.tensor([1.0, rank()])).tolist(),
        "largest": all_reduced_max(torch.tensor([rank(), -rank()])).tolist(),
    }


def test_three_ranks_know_the_same():
    found = run_ranks(3, told)
    assert [values.pop("rank") for values in found] == [(0, 3), (1, 3), (2, 3)]
    everywhere = {
        "same": "from rank 0",
        "gathered": [{"rank": 0}, {"rank": 1}, {"rank": 2}],
        "first": True,
        "summed": [3.0, 3.0],
        "largest": [2, 0],
    }
    assert found == [everywhere] * 3


def test_a_process_without_torchrun_is_the_only_rank():
    (found,) = run_ranks(1, told)
    assert found == {
        "rank": (0, 1),
        "same": "from rank 0",
        "gathered": [{"rank": 0}],
        "first": True,
        "summed": [1.0, 0.0],
        "largest": [0, 0],
    }


def first_rank_fails(kind: type[Exception]) -> tuple[str, bool, int, list[int]]:
    acted = []

    def act() -> None:
        acted.append(rank())
        raise kind("it cannot be done")

    try:
        on_first_rank(act)
    except (ConfigError, RunError) as error:
        return str(error), error.of_all_ranks, len(acted), all_gathered(rank())
    return "", False, len(acted), []


@pytest.mark.parametrize("kind", [ConfigError, RunError])
def test_an_error_of_the_first_rank_is_raised_on_every_rank(kind):
    first, second = run_ranks(2, first_rank_fails, kind)
    assert first == ("it cannot be done", True, 1, [0, 1])
    assert second == ("it cannot be done", True, 0, [0, 1])


def first_rank_works_long() -> str:
    dist.distributed_c10d._set_pg_timeout(timedelta(milliseconds=100))
    return on_first_rank(lambda: time.sleep(2) or "done")


def test_the_others_wait_for_the_first_rank_longer_than_for_a_collective():
    assert run_ranks(2, first_rank_works_long) == ["done", "done"]


def stopped(folder: Path, together: str) -> tuple[int, int | None, list[float]]:
    """Train until the second rank gets a signal after its second step."""

    def react(step: int) -> None:
        if rank() == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    training = run_train(run_config(stage_config(), together, steps=8), folder, react=react)
    assert training.result is not None
    return training.result.step, training.result.signal, training.series("train/loss")


@pytest.mark.parametrize("together", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_ends_all_after_the_same_step(tmp_path, together):
    first, second = run_ranks(2, stopped, tmp_path, together)
    assert first == second
    assert first[:2] == (3, signal.SIGTERM)
    assert len(first[2]) == 3
    assert find_checkpoint(tmp_path).name == "step_00000003"


def exchanges(together: str) -> list[dict[str, int]]:
    """How often a step of one micro-batch exchanges gradients, and one of three, by name of the operation."""
    return [exchanges_of(together, pieces) for pieces in (1, 3)]


def exchanges_of(together: str, pieces: int) -> dict[str, int]:
    config, data = run_config(stage_config(), together, {"accumulation": pieces}), token_data()
    step = training_step(config, build_model(config.stage, config.model, VOCAB))
    # The first backward pass of DDP arranges its buckets.
    step.gradients(trainer._batches(config, data, 0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step.gradients(trainer._batches(config, data, 1))
    names = [event.name for event in profile.events()]
    return dict(Counter(name for name in names if "reduce" in name and name.startswith("c10d::")))


@pytest.mark.parametrize("together", ["ddp", "fsdp"])
def test_accumulation_exchanges_gradients_after_its_last_micro_batch_alone(together):
    for whole, accumulated in run_ranks(2, exchanges, together):
        assert whole
        assert accumulated == whole


def spoiled(together: str, places: list[tuple[str, bool, int]]) -> tuple[str | None, float, float]:
    """Names of what is not finite, and the norm of the gradients before, of a model with such values.

    Args:
        together: how the model is shared by the ranks.
        places: name of a parameter, whether the bad value is in its gradient, and where.
    """
    config = run_config(stage_config("2"))
    model = build_model(config.stage, config.model, VOCAB)
    values = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    bad = {name: value.clone() for name, value in values.items()}
    for name, in_gradient, index in places:
        target = bad[name] if in_gradient else dict(model.named_parameters())[name].detach()
        target.view(-1)[index] = float("nan")
    ParallelLoss(model, together)
    optimizer = ModelOptimizer(model, config.optim)
    norms = []
    for gradients in (values, bad):
        set_gradients(model, gradients)
        norms.append(optimizer.gradient_norm().item())
    return first_non_finite(model), *norms


def set_gradients(model: nn.Module, gradients: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        whole = gradients[name]
        mesh = getattr(parameter, "device_mesh", None)
        parameter.grad = whole if mesh is None else distribute_tensor(whole, mesh, parameter.placements)


GRADIENT, VALUE = True, False


SPOILED: list[tuple[list[tuple[str, bool, int]], str | None]] = [
    ([], None),
    ([("blocks.1.attention_norm.gain", GRADIENT, -1)], "the gradient of blocks.1.attention_norm.gain"),
    ([("norm.gain", VALUE, -1)], "norm.gain"),
    # A bad value of the last rank makes gradients of all ranks bad.
    ([("norm.gain", VALUE, -1), ("embedding.weight", GRADIENT, 0)], "norm.gain"),
    # The first in the order of the model, whichever rank has it.
    ([("norm.gain", GRADIENT, 0), ("embedding.weight", GRADIENT, -1)], "the gradient of embedding.weight"),
]


def all_spoiled(together: str) -> list[tuple[str | None, float, float]]:
    found = []
    for places, _ in SPOILED:
        torch.manual_seed(0)
        found.append(spoiled(together, places))
    return found


@pytest.fixture(scope="module")
def one_rank() -> Callable[[Callable[[str], Any]], Any]:
    """What one rank finds by itself."""

    @functools.cache
    def find(function: Callable[[str], Any]) -> Any:
        return run_ranks(1, function, "none")[0]

    return find


WAYS = [(2, "ddp"), (2, "fsdp"), (3, "fsdp")]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "together"), WAYS)
def test_ranks_find_the_norm_and_the_bad_value_that_one_rank_finds(one_rank, count, together):
    one = one_rank(all_spoiled)
    assert [name for name, *_ in one] == [told for _, told in SPOILED]
    for found in run_ranks(count, all_spoiled, together):
        for (name, *norms), (expected, *expected_norms) in zip(found, one, strict=True):
            assert name == expected
            assert norms == pytest.approx(expected_norms, rel=1e-6, nan_ok=True)


# Tokens of a split: one window of 8, a last batch of 6 with one window or two, a full one, and one cut short.
SIZES = [2, 9, 57, 65, 97, 103]


def evaluated(together: str) -> tuple[list[float], list[str | None]]:
    """What evaluations find, and why some find no perplexity per word."""
    config = run_config(stage_config("2", dropout=0.5))
    model = build_model(config.stage, config.model, VOCAB).double()
    ParallelLoss(model, together)
    found: list[float] = []
    reasons: list[str | None] = []
    for size in SIZES:
        tokens = (np.arange(size) ** 2 % VOCAB).astype(np.uint16)
        for limit, stride in ((0, None), (7, None), (0, 3), (7, 3)):
            counts = Counts(size, size // 3 + 1, 2 * size)
            result = evaluate(model, tokens, counts, SEQ_LEN, 6, stride, limit)
            *values, reason = astuple(result)
            found += [float("nan") if value is None else value for value in values]
            reasons.append(reason)
    assert model.training
    return found, reasons


@pytest.mark.slow
@pytest.mark.parametrize(("count", "together"), WAYS)
def test_ranks_evaluate_as_one_rank_does(one_rank, count, together):
    one, why = one_rank(evaluated)
    for found, reasons in run_ranks(count, evaluated, together):
        assert found == pytest.approx(one, rel=1e-12, nan_ok=True)
        assert reasons == why


def full_disk(folder: Path, together: str, asynchronous: bool) -> tuple[str, bool]:
    """Train until the disk of the second rank is full: its second checkpoint fails."""
    write, calls = FileSystemWriter.write_data, []

    def failing(self: FileSystemWriter, *arguments: Any) -> Any:
        calls.append(1)
        if rank() == 1 and len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *arguments)

    FileSystemWriter.write_data = failing
    config = run_config(stage_config(), together, steps=8, checkpoint_every=2, async_checkpoint=asynchronous)
    try:
        run_train(config, folder)
    except RunError as error:
        return str(error), error.of_all_ranks
    return "", False


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("together", ["ddp", "fsdp"])
def test_a_checkpoint_that_one_rank_cannot_write_ends_all_and_leaves_the_one_before(
    tmp_path, together, asynchronous
):
    first, second = run_ranks(2, full_disk, tmp_path, together, asynchronous)
    assert first == second
    message, everywhere = first
    assert everywhere
    assert "the checkpoint of step 4 could not be written" in message
    assert "no space is left on the disk" in message
    assert "\n" not in message
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step_00000002"]
    assert find_damage(find_checkpoint(tmp_path)) is None
