from __future__ import annotations

import functools
import os
import random
import sys
import time
from collections.abc import Callable, Iterator

# Deterministic cuBLAS, where there is a GPU; read when the first product runs.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import pytest
import torch
from torch import Tensor

# Tests run side by side already; threads beyond the processors would wait for each other most of the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Seed every generator, and make torch.empty and its like return NaN instead of whatever was there.

    The filling is part of torch's deterministic mode (torch.utils.deterministic). It only warns about
    operations without a deterministic form, because none of the tests is about them.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    mode, filled = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(2).isnan().all(), "uninitialised memory is no longer filled"
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.set_deterministic_debug_mode(mode)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Forget compiled code after a test: torch refuses to compile one function more than eight times."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def assert_as_accurate() -> Callable[..., None]:
    """Check that a result is about as accurate as plain PyTorch in the same dtype.

    Called with the result, the same maths in plain PyTorch in the same dtype, and in float64. Both the root
    mean square of the error over the elements and the largest error may be twice that of plain PyTorch, plus
    one and four units in the last place of the largest value (or of ``scale``, where values cancel to
    something small): the first sees what all elements share, the second a single wrong one.
    """

    def check(result: Tensor, plain: Tensor, exact: Tensor, scale: float = 0.0) -> None:
        assert result.dtype == plain.dtype
        assert result.shape == exact.shape
        if not exact.numel():
            return
        unit = torch.finfo(result.dtype).eps * max(exact.abs().max().item(), scale)
        errors, others = ((x.double() - exact).abs() for x in (result, plain))
        for name, error, other, units in (
            ("root mean square", errors.square().mean().sqrt(), others.square().mean().sqrt(), 1),
            ("largest", errors.max(), others.max(), 4),
        ):
            allowed = 2 * other + units * unit
            assert error <= allowed, f"{name} error {error:.3e}, allowed {allowed:.3e}"

    return check


@pytest.fixture
def timed_calls(monkeypatch):
    """Functions that take given seconds, call after call, on a clock of their own; and the order of calls."""

    def build(durations):
        now, order = [0.0], []
        monkeypatch.setattr(time, "perf_counter", lambda: now[0])

        def call(name):
            now[0] += durations[name][order.count(name)]
            order.append(name)

        return [functools.partial(call, name) for name in durations], order

    return build
