"""Where a kernel runs, with which pinned configuration, and its launch."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.triton_import import INTERPRETED, triton

log = logging.getLogger(__name__)

Options = Mapping[str, int]


@dataclass(frozen=True)
class Target:
    """An architecture with pinned configurations.

    Attributes:
        name: as in the tables of configurations.
        backend: Triton's backend, ``cuda`` or ``hip``.
        arch: Triton's name of the architecture.
        warp_size: threads that run together.
        shared_limit: bytes of shared memory that one program may use.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS = (
    Target("sm_80", "cuda", 80, 32, 166912),
    Target("sm_86", "cuda", 86, 32, 101376),
    Target("sm_89", "cuda", 89, 32, 101376),
    Target("sm_90", "cuda", 90, 32, 232448),
    Target("gfx942", "hip", "gfx942", 64, 65536),
)
# Pinned configurations of Triton's interpreter; blocks stay small there.
INTERPRETER = "interpreter"
TUNING = os.environ.get("MUSE_TUNE_KERNELS") == "1"

_compiler: tuple[Target, Callable[..., None]] | None = None
_forced_eager = False


def use_eager(chosen: bool) -> None:
    """Switch the Triton kernels off, or on again, for this process."""
    global _forced_eager
    _forced_eager = chosen


@contextmanager
def eager() -> Iterator[None]:
    """Inside, every operation runs its eager implementation, on a GPU too."""
    before = _forced_eager
    use_eager(True)
    try:
        yield
    finally:
        use_eager(before)


@contextmanager
def compiling_for(target: Target, compiler: Callable[..., None]) -> Iterator[None]:
    """Inside, launches call ``compiler(kernel, arguments, options)`` instead; tensors may be on ``meta``."""
    global _compiler
    before, _compiler = _compiler, (target, compiler)
    try:
        yield
    finally:
        _compiler = before


def use_triton(x: Tensor) -> bool:
    """Whether an operation on ``x`` runs its Triton kernel: on a GPU, in the interpreter, when compiling."""
    if _compiler is not None:
        return True
    if triton is None or _forced_eager or x.dtype == torch.float64:
        return False
    return INTERPRETED or x.is_cuda


def target_name(x: Tensor) -> str:
    """The architecture whose pinned configurations fit the device of ``x``."""
    if _compiler is not None:
        return _compiler[0].name
    if INTERPRETED:
        return INTERPRETER
    if torch.version.hip:
        return "gfx942"
    return _cuda_target(x.device.index or 0)


# torch.compile cannot look into the driver.
@torch.compiler.assume_constant_result
def _cuda_target(device: int) -> str:
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise RuntimeError(
            f"the Triton kernels need compute capability 8.0, this GPU has {capability[0]}.{capability[1]}; "
            "choose hardware.kernels=eager"
        )
    # Consumer cards have 100 KB of shared memory an SM, data-centre cards more.
    known = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_80", (8, 9): "sm_89"}
    return known.get(capability, "sm_89" if capability[0] >= 12 else "sm_90")


@dataclass(frozen=True)
class Pinned:
    """The pinned launch configurations of an operation: kernel, target, bits of the dtype, width.

    A width is what decides about registers and shared memory: the head size, or the number of channels. The
    smallest pinned width that is not less than the wanted one is taken.

    Attributes:
        name: of the operation.
        table: what the JSON file holds.
    """

    name: str
    table: dict[str, dict[str, dict[str, dict[str, Options]]]]

    def options(self, kernel: str, x: Tensor, width: int) -> Options:
        """The pinned constants, warps and stages of a kernel for tensors like ``x``.

        Raises:
            ValueError: the width is larger than any pinned one.
        """
        return self._of(target_name(x), kernel, x, width)

    def covers(self, kernel: str, x: Tensor, width: int) -> bool:
        """Whether a pinned width is not less than the wanted one, for tensors like ``x``."""
        widths = self.table[kernel][target_name(x)][str(8 * x.element_size())]
        return width <= max(map(int, widths))

    def choose(
        self, kernel: str, x: Tensor, width: int, run: Callable[[Options], object], *more: object
    ) -> Options:
        """The pinned options; with MUSE_TUNE_KERNELS=1 on a GPU the fastest of those of all targets.

        ``run`` launches with the given options and must be repeatable. The choice is logged and kept for the
        rest of the process, for equal ``more``: what else decides about the time.
        """
        pinned = self.options(kernel, x, width)
        if not tuning(x):
            return pinned
        targets = (target.name for target in TARGETS)
        candidates = {str(options): options for options in (self._of(t, kernel, x, width) for t in targets)}
        if len(candidates) == 1:
            return pinned
        runs = {name: partial(run, options) for name, options in candidates.items()}
        return candidates[fastest((self.name, kernel, x.dtype, width, *more), runs)]

    def _of(self, target: str, kernel: str, x: Tensor, width: int) -> Options:
        widths = self.table[kernel][target][str(8 * x.element_size())]
        fitting = [int(key) for key in widths if int(key) >= width]
        if not fitting:
            raise ValueError(
                f"{self.name}: width {width} is too large; at most {max(map(int, widths))}, or choose "
                "hardware.kernels=eager"
            )
        return widths[str(min(fitting))]


def tuning(x: Tensor) -> bool:
    """Whether alternatives are measured on ``x``: on a GPU, on request, not while torch.compile traces."""
    return TUNING and _compiler is None and x.is_cuda and not torch.compiler.is_compiling()


_fastest: dict[str, str] = {}


def fastest(key: tuple[object, ...], candidates: Mapping[str, Callable[[], object]]) -> str:
    """Name of the fastest candidate, measured once for each ``key``, logged, and the same on all ranks.

    Sizes in the key count to the next power of two, so that a growing text is not measured at every length.
    A candidate that needs more of the GPU's resources than there are is passed over.

    Raises:
        RuntimeError: no candidate fits the GPU.
    """
    name = " ".join(str(next_power_of_2(part) if type(part) is int else part) for part in key)
    if name not in _fastest:
        _fastest[name] = _agreed(name, partial(_measured, name, candidates))
    return _fastest[name]


def _measured(name: str, candidates: Mapping[str, Callable[[], object]]) -> str:
    times: dict[str, float] = {}
    for candidate, run in candidates.items():
        try:
            times[candidate] = triton.testing.do_bench(run, return_mode="median")
        except triton.runtime.errors.OutOfResources:
            continue
    if not times:
        raise RuntimeError(f"{name}: none of {', '.join(candidates)} fits this GPU")
    choice = min(times, key=times.__getitem__)
    log.info("%s: %s of %s ms", name, choice, times)
    return choice


def _agreed(name: str, measure: Callable[[], str]) -> str:
    """What the first of the ranks measured: kernels that sum in another order would let ranks drift apart.

    Nobody waits for anybody, because ranks need not come to the same kernels in the same order.
    """
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return measure()
    store = distributed.distributed_c10d._get_default_store()
    key = f"muse kernels: {name}"
    if store.check([key]):
        return str(store.get(key).decode())
    return str(store.compare_set(key, "", measure()).decode())


def pinned_beside(file: str) -> Pinned:
    """The table of configurations beside the file of Triton code ``file``, by the name of their folder."""
    path = Path(file).with_name("pinned.json")
    return Pinned(path.parent.name, json.loads(path.read_text(encoding="utf-8")))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    """Run a Triton kernel on a grid that may be empty, or hand it to the compiler of ``compiling_for``."""
    if _compiler is not None:
        _compiler[1](kernel, arguments, options)
    elif all(grid):
        with _device_of(arguments):
            kernel[grid](*arguments, **options)


@contextmanager
def _device_of(arguments: tuple[object, ...]) -> Iterator[None]:
    first = next(a for a in arguments if isinstance(a, Tensor))
    if first.is_cuda:
        with torch.cuda.device(first.device):
            yield
    else:
        yield


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def contiguous(x: Tensor | None) -> Tensor | None:
    """x in the order of its axes, if it is there."""
    return None if x is None else x.contiguous()
