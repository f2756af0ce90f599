from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.acceleration import CountingCompiler


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    """The number of threads, which a test may change."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.fixture
def compiler(monkeypatch) -> CountingCompiler:
    """Takes the place of torch.compile."""
    counting = CountingCompiler()
    monkeypatch.setattr(torch, "compile", counting)
    return counting
