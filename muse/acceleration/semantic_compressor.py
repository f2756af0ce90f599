"""Activations saved for the backward pass, held in eight bits.

Blockwise quantisation of saved activations: Chen et al., "ActNN: Reducing Training Memory Footprint via 2-Bit
Activation Compressed Training" (2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# Statistics and the like; their size does not count.
SMALLEST_TENSOR = 4096
# From a saved weight to its parameter autograd takes only such steps.
_OF_WEIGHTS = ("TBackward", "TransposeBackward", "ToCopyBackward", "ViewBackward", "UnsafeViewBackward")


@dataclass
class _Compressed:
    """A tensor by its codes; ``shape`` is in the order ``axes`` in which its axes lie in memory."""

    codes: Tensor
    scales: Tensor
    block: int
    shape: torch.Size
    axes: list[int]
    dtype: torch.dtype


def block_length(ratio: float) -> int:
    """Elements that share a float32 scale, so that a byte each and the scales take ``ratio`` of float32.

    Raises:
        ValueError: for a ratio over 1, or so small that no block of 4096 elements or fewer has it.
    """
    # The last block of a tensor may be short.
    spare = ratio - 0.25 - 1 / SMALLEST_TENSOR
    if not spare >= 1 / SMALLEST_TENSOR or ratio > 1:
        raise ValueError(f"activations in eight bits cannot take {ratio} of float32, only 0.2505 to 1")
    return 2 ** math.ceil(math.log2(1 / spare))


def compress(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes int8 (numel,) and scales float32 (n, 1) of a floating-point tensor; the last block may be short.

    The error of an element is at most half a 127th of the largest magnitude of its block.
    """
    flat = x.detach().flatten()
    missing = -flat.numel() % block
    rows = F.pad(flat, (0, missing)).view(-1, block)
    largest = rows.abs().amax(1, keepdim=True).float()
    codes = (rows / torch.where(largest > 0, largest, 1)).mul_(127).round_().to(torch.int8).flatten()
    return codes[: flat.numel()].clone() if missing else codes, largest / 127


def decompress(codes: Tensor, scales: Tensor, block: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The tensor that ``compress`` has made codes of, up to their rounding."""
    rows = F.pad(codes, (0, -codes.numel() % block)).view(-1, block)
    return (rows * scales).flatten()[: codes.numel()].view(shape).to(dtype)


class SemanticCompressor:
    """Context in which autograd holds activations at no more than ``ratio`` of their float32 size.

    What autograd saves inside the context is turned into int8 with one float32 scale a block, and back when
    the backward pass asks for it. Trained parameters, their casts, integers and tensors under 4096 elements
    are left alone. A tensor saved twice is held once. The forward pass is not changed, the gradient by the
    rounding. Not for compiled code, in which a cast of a parameter cannot be told from an activation.

    Attributes:
        original: bytes that the activations compressed so far take in float32.
        held: bytes that they take as held.

    Raises:
        ValueError: for a ratio that is not between 0.2505 and 1.
    """

    def __init__(self, ratio: float = 0.3) -> None:
        self.block = block_length(ratio)
        self.original = self.held = 0
        self._hooks: Any = None
        self._seen: dict[tuple[Any, ...], tuple[StorageWeakRef, _Compressed]] = {}

    @property
    def ratio(self) -> float | None:
        """What the activations take, held, as a fraction of their float32 size; None before the first."""
        return self.held / self.original if self.original else None

    def __enter__(self) -> SemanticCompressor:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        self._seen.clear()

    def _pack(self, x: Tensor) -> Tensor | _Compressed:
        if not x.is_floating_point() or x.numel() < SMALLEST_TENSOR or _is_weight(x):
            return x
        storage = StorageWeakRef(x.untyped_storage())
        key = (storage.cdata, x.storage_offset(), x.shape, x.stride(), x.dtype, x._version)
        # The weak reference keeps the address from being given to another storage.
        if key in self._seen and not self._seen[key][0].expired():
            return self._seen[key][1]
        axes = sorted(range(x.dim()), key=lambda axis: -x.stride()[axis])
        in_memory = x.permute(axes)
        codes, scales = compress(in_memory, self.block)
        packed = _Compressed(codes, scales, self.block, in_memory.shape, axes, x.dtype)
        self.original += 4 * x.numel()
        self.held += codes.nbytes + scales.nbytes
        self._seen[key] = (storage, packed)
        return packed


def _unpack(packed: Tensor | _Compressed) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    in_memory = decompress(packed.codes, packed.scales, packed.block, packed.shape, packed.dtype)
    return in_memory.permute([packed.axes.index(axis) for axis in range(len(packed.axes))])


def _is_weight(x: Tensor) -> bool:
    """Whether x is a parameter, or only a view or a cast of one."""
    if isinstance(x, torch.nn.Parameter) or isinstance(x._base, torch.nn.Parameter):
        return True
    node = x.grad_fn
    while node is not None and node.name().startswith(_OF_WEIGHTS):
        node = node.next_functions[0][0]
    return node is not None and hasattr(node, "variable")
