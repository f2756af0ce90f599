"""Peak memory of what runs: the allocator's on CUDA, the bytes of all tensors on a CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed._tools.mod_tracker import ModTracker

from muse.hardware import synchronize
from muse.measure.operations import InsideOperations

# In bytes.
GB = 1e9


class MemoryMeter:
    """What ``peak_memory`` counts; bytes.

    Attributes:
        before: when the block began.
    """

    def __init__(self, device: torch.device, tracker: MemTracker | None) -> None:
        self._device, self._tracker = device, tracker
        self.before = self.current()

    def current(self) -> int:
        """Bytes in use now, within the block."""
        if self._tracker is None:
            return torch.cuda.memory_allocated(self._device)
        return sum(self.kinds("current").values())

    def peak(self) -> int:
        """The most that was in use within the block so far."""
        if self._tracker is None:
            return torch.cuda.max_memory_allocated(self._device)
        return sum(self.kinds("peak").values())

    def kinds(self, when: str) -> dict[str, int]:
        """On a CPU the bytes by MemTracker's kinds, ``current`` or at the ``peak``."""
        assert self._tracker is not None
        total: Counter[str] = Counter()
        for kinds in self._tracker.get_tracker_snapshot(when).values():
            for kind, size in kinds.items():
                # Beside the kinds stands their sum.
                if name := getattr(kind, "value", ""):
                    total[name] += size
        return dict(total)


@contextmanager
def peak_memory(
    device: torch.device, model: nn.Module | None = None, state: Iterable[Tensor] = ()
) -> Iterator[MemoryMeter]:
    """Count the memory of what runs inside, whose numbers stay the same.

    On CUDA the peak is the allocator's ``max_memory_allocated``; on a CPU MemTracker counts the bytes of all
    tensors exactly, but for those that compiled code holds.

    Args:
        device: where it runs.
        model: whose parameters and gradients are there already.
        state: other tensors that are, such as the optimiser's.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield MemoryMeter(device, None)
        return
    tracker = MemTracker()
    # It would hook itself to what each module takes and gives, and so hold the graph of a sub-layer that a
    # reversible trunk has dropped.
    tracker._mod_tracker = _NoModules()
    if model is not None:
        # What it would do where it meets the module: that gradients are told from other tensors.
        tracker._track_module_params_and_buffers(model, install_grad_hooks=True)
    tracker.track_external(*state)
    with tracker, InsideOperations():
        yield MemoryMeter(device, tracker)


class _NoModules(ModTracker):
    """Follows no module, but knows whether this is the backward pass."""

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: object) -> None:
        pass
