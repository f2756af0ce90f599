"""What every decoder and every mixer of tokens must keep."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor


@torch.no_grad()
def assert_causal(
    mixer: Callable[[Tensor], Tensor],
    x: Tensor,
    other: Tensor,
    positions: Collection[int] = (1, 33, 65),
    reach: int = 1,
) -> None:
    """See that where a token changes no bit before it does, and each of ``reach`` tokens from it on.

    Args:
        mixer: from x to what is of as many tokens.
        x: (B, S, ...).
        other: likewise; has other tokens.
        positions: of the tokens that change, one at a time.
        reach: tokens that surely see it, itself among them.
    """
    before = mixer(x)
    for position in positions:
        changed = x.clone()
        changed[:, position] = other[:, position]
        after = mixer(changed)
        assert torch.equal(after[:, :position], before[:, :position])
        for later in range(position, min(position + reach, x.shape[1])):
            assert not torch.equal(after[:, later], before[:, later])
