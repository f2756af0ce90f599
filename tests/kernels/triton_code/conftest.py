"""Tests of the Triton code itself: on a GPU where there is one, else in Triton's interpreter.

The interpreter is chosen when the kernels are decorated, so tests/kernels/test_interpreter.py runs these
files in processes of their own; collected without a GPU and without TRITON_INTERPRET=1 they have nothing to
run on.
"""

from __future__ import annotations

import pytest
import torch

from kernels.triton_import import INTERPRETED

collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        for item in items:
            if item.path.parent.name == "triton_code":
                item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")
