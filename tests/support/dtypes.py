"""What the Triton code is tested in: bfloat16 on a GPU only, because Triton's interpreter has none."""

from __future__ import annotations

from typing import Any

import torch

ON_GPU = torch.cuda.is_available()
HALVES = [torch.float16, *([torch.bfloat16] if ON_GPU else [])]
DTYPES = [torch.float32, *HALVES]


def in_each_half(cases: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Cases, of which those in float16 run in bfloat16, too, where there is one."""
    return [
        tuple(half if part is torch.float16 else part for part in case)
        for case in cases
        for half in (HALVES if torch.float16 in case else HALVES[:1])
    ]
