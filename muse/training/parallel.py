"""One model trained by all ranks together: DDP or FSDP2.

Every rank works on its share of the windows of each micro-batch, so that a step is the same on any number of
ranks, up to the rounding of sums.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from muse.layers.packing import Packing
from muse.models import LanguageModel
from muse.models.language_model import Select
from muse.processes.ranks import ranks

# Renamed in torch 2.13.
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"


class ModelLoss(nn.Module):
    """The loss of a model as a forward pass: DDP sums the gradients of what takes part in one."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, targets: Tensor, select: Select | None, packing: Packing | None
    ) -> Tensor:
        return self.model.loss(tokens, targets, select=select, packing=packing)


class ParallelLoss:
    """Mean loss of a rank's windows, whose gradients become the mean over all ranks.

    Args:
        model: on its device. ``fsdp`` shards its parameters, which are DTensors from then on.
        parallel: ``none``, ``ddp`` or ``fsdp``.
    """

    def __init__(self, model: LanguageModel, parallel: str) -> None:
        self.model = model
        self.replicas: DistributedDataParallel | None = None
        self.sharded = parallel == "fsdp"
        if parallel == "ddp":
            # Buffers are where layers count their fallbacks; ``agree_on_fallbacks`` keeps them equal.
            options: dict[str, Any] = {_SYNC_BUFFERS: False}
            self.replicas = DistributedDataParallel(ModelLoss(model), gradient_as_bucket_view=True, **options)
        elif self.sharded:
            shard(model)

    def __call__(
        self,
        tokens: Tensor,
        targets: Tensor,
        select: Select | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        if self.replicas is not None:
            return self.replicas(tokens, targets, select, packing)
        return self.model.loss(tokens, targets, select=select, packing=packing)

    @contextmanager
    def gradients_summed(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: ranks exchange gradients after the ``last`` alone."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        if self.replicas is None or last:
            yield
            return
        with self.replicas.no_sync():
            yield


def shard(model: LanguageModel) -> None:
    """Shard the parameters over all ranks by FSDP2, block by block.

    The planes of a complex parameter stay together where another axis can be divided by the number of ranks.
    Gradients are summed in float32.
    """
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy, shard_placement_fn=_placement)
    fully_shard(model, mp_policy=policy, shard_placement_fn=_placement)
    for name in ("loss", "next_logits", "continue_logits"):
        register_fsdp_forward_method(model, name)


def _placement(parameter: nn.Parameter) -> Shard | None:
    # Two planes would leave all ranks but two without work, and FSDP2 would pad each rank's part to a plane.
    if parameter.shape[0] != 2:
        return None
    return next(
        (Shard(axis) for axis in range(1, parameter.dim()) if parameter.shape[axis] % ranks() == 0), None
    )
