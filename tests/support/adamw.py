"""Parameters in bfloat16 with gradients and moments, as the tests of AdamW step them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.adamw import Coefficients, Part, coefficients, key_of

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "updates": 3}


@dataclass
class Held:
    """A part, its gradient and its key."""

    part: Part
    gradient: Tensor
    key: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.part.parameter, self.part.exp_avg, self.part.exp_avg_sq


def held(
    shape: tuple[int, ...],
    starts: tuple[int, ...] = (0,),
    plane: int = 0,
    decays: bool = True,
    shift: int = 0,
    seed: int = 0,
) -> Held:
    """Normal numbers, a hundredth of them 0; tensors begin ``shift`` elements after an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()

    def normal(scale: float) -> Tensor:
        values = torch.randn(count + shift, generator=generator).mul_(scale).bfloat16()
        values[torch.rand(count + shift, generator=generator) < 0.01] = 0
        return values[shift:].view(shape)

    part = Part(normal(1.0), normal(0.1), normal(0.1).square_(), decays, starts, plane)
    return Held(part, normal(1.0), key_of(seed, 1, "weight"))


def copied(those: list[Held]) -> list[Held]:
    """With tensors of their own, as far from an aligned address."""

    def copy_of(x: Tensor) -> Tensor:
        offset = x.storage_offset()
        room = x.new_empty(x.numel() + offset)
        return room[offset:].view(x.shape).copy_(x)

    result = []
    for one in those:
        w, m, v = map(copy_of, one.tensors())
        part = Part(w, m, v, one.part.decays, one.part.starts, one.part.plane)
        result.append(Held(part, copy_of(one.gradient), one.key))
    return result


def numbers(factor: float = 1.0, **changes: object) -> Coefficients:
    """The coefficients of ``OPTIONS``."""
    return coefficients(**{**OPTIONS, **changes}, factor=factor)  # type: ignore[arg-type]


def bits(those: list[Held]) -> list[Tensor]:
    """Parameters and moments as whole numbers, for comparisons."""
    return [x.view(torch.int16) for one in those for x in one.tensors()]


def arguments(those: list[Held]) -> tuple[list[Part], list[Tensor], list[int]]:
    """What a step takes."""
    return [one.part for one in those], [one.gradient for one in those], [one.key for one in those]
