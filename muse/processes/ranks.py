"""Ranks: the processes that torchrun started, and what they tell each other; without it there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from muse.errors import ConfigError, RunError
from muse.processes.torchrun import launched_ranks

T = TypeVar("T")
# The first rank may read data or a checkpoint for hours while the others wait; other collectives give up
# after half an hour, as torch has it.
FIRST_RANK_TIMEOUT = timedelta(days=1)
_first_rank_group: dist.ProcessGroup | None = None


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Let the processes that torchrun started know each other; without torchrun nothing happens.

    Collectives run over gloo on the CPU and over NCCL between GPUs.
    """
    if not launched_ranks():
        yield
        return
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    global _first_rank_group
    _first_rank_group = dist.new_group(backend="gloo", timeout=FIRST_RANK_TIMEOUT)
    yield
    # Not after an error: the other ranks wait in a collective that this one will never reach.
    dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast(value: T) -> T:
    """The value of rank 0, on every rank; it must be possible to pickle it."""
    if ranks() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=_first_rank_group)
    return box[0]


def on_first_rank(act: Callable[[], T]) -> T:
    """What ``act`` returns on rank 0, on every rank; it must be possible to pickle it.

    Raises:
        ConfigError, RunError: where ``act`` did, on every rank.
    """
    found: tuple[T | None, ConfigError | RunError | None] = (None, None)
    if rank() == 0:
        try:
            found = act(), None
        except (ConfigError, RunError) as error:
            found = None, error
    value, failure = broadcast(found)
    if failure is not None:
        failure.of_all_ranks = True
        raise failure
    return cast(T, value)


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which ranks may hold parts; all of them must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_gathered(value: T) -> list[T]:
    """The values of all ranks, on every rank."""
    if ranks() == 1:
        return [value]
    values: list[Any] = [None] * ranks()
    dist.all_gather_object(values, value)
    return values


def all_reduced_sum(values: Tensor) -> Tensor:
    """Sum over the ranks, in place."""
    if ranks() > 1:
        dist.all_reduce(values)
    return values


def all_reduced_max(values: Tensor) -> Tensor:
    """Maximum over the ranks, in place."""
    if ranks() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def run_starts(tensor: Tensor) -> tuple[int, ...]:
    """Where this rank's part of a tensor lies in the whole one, the elements of each counted in order.

    The part is one or more runs of equal length, each contiguous in the whole tensor. Returned is, for each
    run, the position there of its first element.
    """
    if not isinstance(tensor, DTensor):
        return (0,)
    (place,) = tensor.placements
    if not isinstance(place, Shard):
        return (0,)
    axis, inner = place.dim, tensor.shape[place.dim + 1 :].numel()
    length = tensor.shape[axis]
    # FSDP2 shards as torch.chunk does.
    first = min(length, tensor.device_mesh.get_local_rank() * -(-length // tensor.device_mesh.size()))
    return tuple((run * length + first) * inner for run in range(tensor.shape[:axis].numel()))


def distributed_like(tensor: Tensor, part: Tensor) -> Tensor:
    """``part``, this rank's part, as a tensor that is distributed as ``tensor`` is."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    )
