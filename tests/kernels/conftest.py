from __future__ import annotations

import pytest

from kernels.triton_import import INTERPRETED, triton


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if triton is None:
        for item in items:
            names = {"triton_code", "test_interpreter.py", "test_resources.py"}
            if names & set(item.path.parts):
                item.add_marker(pytest.mark.skip(reason="Triton is not installed"))
    assert not (INTERPRETED and any("triton_code" not in item.path.parts for item in items)), (
        "TRITON_INTERPRET=1 is for tests/kernels/triton_code only"
    )
