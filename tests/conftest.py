from __future__ import annotations

import functools
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator

# Deterministic cuBLAS, where there is a GPU; read when the first product runs.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Read by GNU's OpenMP when torch loads it: threads that wait sleep soon (docs/measurements.md). Tests run
# beside each other and beside other work, and commands that they start have threads of their own.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# torch.compile would take code for other vectors from the cache that runs share (muse/compiler.py).
if vectors := os.environ.get("ATEN_CPU_CAPABILITY"):
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor-{vectors}")

import numpy as np
import pytest
import torch

# For devices that are not there torch.manual_seed would note, test by test, where it was called from.
seed_torch = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed

# Tests run side by side already; threads beyond the processors would wait for each other most of the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Seed every generator, by MUSE_TEST_SEED, and make torch.empty and its like return NaN.

    The filling is part of torch's deterministic mode (torch.utils.deterministic). It only warns about
    operations without a deterministic form, because none of the tests is about them.
    """
    seed = int(os.environ.get("MUSE_TEST_SEED", "0"))
    random.seed(seed)
    np.random.seed(seed)
    seed_torch(seed)
    mode, filled = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(2).isnan().all(), "uninitialised memory is no longer filled"
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.set_deterministic_debug_mode(mode)


@pytest.fixture(autouse=True)
def loggers_as_without_hydra() -> None:
    """Undo what a command in this process did to logging: Hydra switches loggers off and adds handlers."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    root.handlers[:] = [own for own in root.handlers if type(own).__module__.startswith("_pytest.")]
    for logger in root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Forget compiled code after a test: torch refuses to compile one function more than eight times."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def nothing_drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pictures be a single point where nobody looks at them: to draw one takes as long as a small run."""
    if {"kernels", "report"}.isdisjoint(request.path.parts):
        from matplotlib.figure import Figure
        from support.pictures import save_blank

        monkeypatch.setattr(Figure, "savefig", save_blank)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text, and room for the cache of its tokens and for runs."""
    # Only here, because tests of Triton code choose how that runs before they import it.
    from support.configs import write_text

    return write_text(tmp_path_factory.mktemp("place")).parent


@pytest.fixture
def told_by(capsys):
    """Runs a command of muse in this process: its status, standard output and standard error."""
    from support.commands import run_here

    def run(module, *arguments):
        status = run_here(module, list(map(str, arguments)))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


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
