"""AdamW over parameters, gradients and moments in bfloat16: the whole step in one pass over memory.

Maths is float32 and every operation of it is rounded by itself, in one order, so that the Triton code and the
eager implementation on a CPU agree in every bit. A parameter is rounded stochastically, which keeps the
expectation of an update that is smaller than half a unit in its last place (Gupta et al., "Deep Learning with
Limited Numerical Precision", 2015).

The random numbers are counted, not drawn: those of an element follow from a key, made of seed, step and name
of the parameter, and from the element's position in the whole parameter. So they depend neither on the launch
nor on how ranks share a parameter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.adamw import eager, triton_code
from kernels.adamw.eager import round_stochastically
from kernels.launch import use_triton

__all__ = ["Coefficients", "Part", "adamw", "coefficients", "key_of", "round_stochastically"]


@dataclass(frozen=True, eq=False)
class Part:
    """What is held of a parameter: all of it, or the part of a rank.

    Attributes:
        parameter: bfloat16, contiguous.
        exp_avg: first moment, as the parameter.
        exp_avg_sq: second moment, as the parameter.
        decays: whether weight decay applies.
        starts: the part is this many runs of equal length, each contiguous in the whole parameter; the
            position there of the first element of each.
        plane: elements of one plane before those of the other, if both planes of a number are to have the
            second moment |g|^2; else 0.
    """

    parameter: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    decays: bool
    starts: tuple[int, ...] = (0,)
    plane: int = 0


class Coefficients(NamedTuple):
    """The numbers of a step; the kernels take them in float32.

    With them m <- keep_m m + gain_m g, v <- keep_v v + (gain_v g)^2 and
    w <- shrink w - rate m / (sqrt(v) + offset), where shrink is 1 without weight decay.
    """

    keep_m: float
    gain_m: float
    keep_v: float
    gain_v: float
    offset: float
    rate: float
    shrink: float


def coefficients(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, updates: int, factor: float = 1.0
) -> Coefficients:
    """The numbers of an update of AdamW (Loshchilov and Hutter, 2019).

    Args:
        lr: learning rate.
        betas: decays of the moments.
        eps: offset of the denominator.
        weight_decay: decoupled.
        updates: number of the update, from 1.
        factor: of the gradients, for example a clipping coefficient.
    """
    first, second = betas
    # The correction of the second moment moves from sqrt(v) to what it is added to and divides.
    correction = math.sqrt(1 - second**updates)
    return Coefficients(
        keep_m=first,
        gain_m=(1 - first) * factor,
        keep_v=second,
        gain_v=math.sqrt(1 - second) * factor,
        offset=eps * correction,
        rate=lr * correction / (1 - first**updates),
        shrink=1 - lr * weight_decay,
    )


def key_of(seed: int, step: int, name: str) -> int:
    """The 64-bit key of the random numbers of a parameter in a step."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {name}".encode(), digest_size=8).digest(), "little")


def adamw(
    parts: Sequence[Part],
    gradients: Sequence[Tensor],
    keys: Sequence[int],
    numbers: Coefficients,
    round_moments: bool = False,
) -> None:
    """Update parameters and moments in place.

    The same bits from Triton's interpreter and on a CPU. A CUDA GPU executes the same operations, compiled
    without contraction to FMA and rounded to nearest. An eager step on a GPU has the same random numbers, but
    PyTorch's kernels may contract there.

    Args:
        parts: on one device.
        gradients: of each part, of its shape, bfloat16.
        keys: of each part, from ``key_of``.
        numbers: of this update.
        round_moments: whether moments are rounded stochastically, too, by the random numbers of their
            parameter; else to nearest.

    Raises:
        ValueError: a tensor is not bfloat16, not contiguous or of another size than its parameter, or the
            runs are not of equal length.
    """
    for part, gradient in zip(parts, gradients, strict=True):
        count = part.parameter.numel()
        for tensor in (part.parameter, part.exp_avg, part.exp_avg_sq, gradient):
            if tensor.dtype != torch.bfloat16 or tensor.numel() != count or not tensor.is_contiguous():
                raise ValueError(
                    f"a tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype} is not a contiguous "
                    f"bfloat16 tensor like its parameter {tuple(part.parameter.shape)}"
                )
        if count % len(part.starts):
            raise ValueError(f"{count} elements are not {len(part.starts)} runs of equal length")
    filled = [index for index, part in enumerate(parts) if part.parameter.numel()]
    if filled:
        code = triton_code if use_triton(parts[0].parameter) else eager
        code.step(
            [parts[n] for n in filled],
            [gradients[n] for n in filled],
            [keys[n] for n in filled],
            numbers,
            round_moments,
        )
