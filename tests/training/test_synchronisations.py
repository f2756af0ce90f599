"""A step of training and an evaluation wait for the device once each, whatever they hold."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.configs import VOCAB, run_config, stage_config
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from muse.data import evaluation_batches, training_batch
from muse.dynamics import flows_of
from muse.errors import RunError
from muse.models import build_model
from muse.training.evaluate import evaluate
from muse.training.optim import ModelOptimizer
from muse.training.step import NotFinite, TrainingStep, training_step

aten = torch.ops.aten
# What waits for a GPU, as far as it reaches the dispatcher; a copy to the CPU does not where all is there.
WAITING = (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero, aten.masked_select)
COPYING = (Tensor.tolist, Tensor.cpu, Tensor.numpy)


class Dispatched(TorchDispatchMode):
    """Notes what waits, but for what runs inside MUSE's own operations: on a GPU those launch kernels."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in WAITING:
            self.waits.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in COPYING:
            self.waits.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def noted_waits() -> Iterator[list[str]]:
    waits: list[str] = []
    with Dispatched(waits), Called(waits):
        yield waits


def build(stage: int = 2, optimizer: str = "adamw", **options: Any) -> TrainingStep[ModelOptimizer]:
    config = run_config(stage_config(stage, **options), {"name": optimizer})
    return training_step(config, build_model(config.stage, config.model, VOCAB).train())


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    tokens = torch.randint(VOCAB, (1000,), generator=torch.Generator().manual_seed(0)).numpy()
    return [training_batch(tokens, number, 2, 9, 0) for number in range(count)]


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (0, {}),
        (1, {}),
        (2, {}),
        (2, {"precision": "bf16", "optimizer": "muon"}),
        (2, {"potential": "duffing"}),
        (2, {"gradient": "checkpoint"}),
        (2, {"gradient": "backprop"}),
        (1, {"trunk": "reversible"}),
        (2, {"trunk": "reversible"}),
    ],
)
def test_a_step_waits_once(stage, options):
    step, given = build(stage, **options), batches()
    with noted_waits() as waits:
        step.take(0, given)
    assert waits == ["tolist"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_evaluation_waits_once(stage):
    model = build(stage).model
    tokens = torch.randint(VOCAB, (100,)).numpy()
    # Windows are cut, and what they predict is counted, on the host.
    with noted_waits() as on_host:
        for _, _, mask in evaluation_batches(tokens, 9, 2):
            int(mask.sum())
    with noted_waits() as waits:
        evaluate(model, tokens, None, 9, 2)
    assert waits == [*on_host, "_local_scalar_dense"]


def test_what_waits_is_seen():
    step = build()
    flow = flows_of(step.model)[0]
    forward = flow.potential.advance

    def looking(*arguments: Any) -> Any:
        end = forward(*arguments)
        end[2].item()
        return end

    flow.potential.advance = looking
    given = batches(3)
    with noted_waits() as waits:
        step.take(0, given)
    assert waits == ["_local_scalar_dense"] * 3 + ["tolist"]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_step_that_overflows_is_taken_again(dropout):
    """The result is that of a step whose flow was on checkpointing from the start, dropout and all."""
    found, expected = (build(dropout=dropout) for _ in range(2))
    expected.model.load_state_dict(found.model.state_dict())
    for step in (found, expected):
        flow = flows_of(step.model)[1]
        flow.scale = 2.0**30
    flow.fallen_back = True
    results = []
    for step in (found, expected):
        torch.manual_seed(5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(step.take(0, batches()))
        told = [str(warning.message) for warning in caught if "left the range" in str(warning.message)]
        assert len(told) == (step is found)
    assert results[0] == results[1]
    assert [flow.fallen_back for flow in flows_of(found.model)].count(True) == 1
    for x, y in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(x, y)


def test_an_evaluation_that_overflows_is_repeated():
    model, exact = (build().model for _ in range(2))
    model.load_state_dict(exact.state_dict())
    tokens = torch.randint(VOCAB, (100,)).numpy()
    flows_of(model)[1].scale = 2.0**30
    with pytest.warns(UserWarning, match="left the range"):
        found = evaluate(model, tokens, None, 9, 2)
    assert found.loss == pytest.approx(evaluate(exact, tokens, None, 9, 2).loss, rel=1e-5)


def test_a_lost_state_is_told_and_nothing_is_updated():
    step = build()
    flows_of(step.model)[2].potential.w1.data[0, 0] = math.nan
    before = [x.clone() for x in step.model.parameters()]
    with pytest.raises(RunError, match=r"^blocks\.1\.flow\.0: .* not finite after step") as caught:
        step.take(0, batches())
    assert not isinstance(caught.value, NotFinite)
    for x, y in zip(step.model.parameters(), before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
