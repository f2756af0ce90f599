"""Tests of the Triton code itself: on a GPU where there is one, else in Triton's interpreter.

The interpreter is chosen when the kernels are decorated, so tests/kernels/test_interpreter.py runs these
files in processes of their own; collected without a GPU and without TRITON_INTERPRET=1 they have nothing to
run on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

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


@pytest.fixture(scope="session", autouse=True)
def language_patched_once() -> Iterator[None]:
    """Triton's interpreter patches its language anew in every launch and every call of a device function."""
    with pytest.MonkeyPatch.context() as context:
        if INTERPRETED:
            from triton.runtime import interpreter

            patch = interpreter._patch_lang

            @functools.cache
            def patch_once(kernel):
                patch(kernel)
                return SimpleNamespace(restore=lambda: None)

            context.setattr(interpreter, "_patch_lang", patch_once)
        yield


def extent(x: Tensor) -> tuple[int, int]:
    """The addresses from the first to behind the last element."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size() * bool(x.numel())


@pytest.fixture(autouse=True)
def no_access_outside_of_the_operands(monkeypatch: pytest.MonkeyPatch) -> list[Tensor] | None:
    """What a kernel reads without a mask need not change a result, so that comparisons do not tell.

    Returns:
        A list for operands that a kernel knows by their addresses; None where nothing is checked.
    """
    if not INTERPRETED:
        return None
    from triton.runtime import interpreter

    builder, call = interpreter.interpreter_builder, interpreter.GridExecutor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store
    extents: list[tuple[int, int]] = []
    by_address: list[Tensor] = []

    def check(pointers, mask):
        addresses = pointers.data[mask.data]
        if addresses.size:
            low, high = int(addresses.min()), int(addresses.max())
            assert any(first <= low and high < end for first, end in extents), "outside of every operand"

    def checked_call(self, *arguments, **options):
        extents[:] = [extent(x) for x in (*arguments, *by_address) if isinstance(x, Tensor)]
        return call(self, *arguments, **options)

    def checked_load(pointers, mask, *rest, **more):
        check(pointers, mask)
        return load(pointers, mask, *rest, **more)

    def checked_store(pointers, value, mask, *rest):
        check(pointers, mask)
        return store(pointers, value, mask, *rest)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", checked_call)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    return by_address
