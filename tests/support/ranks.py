"""Ranks, which need no torchrun."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from support.processes import Copies


class Ranks(Copies):
    """Processes with the environment that torchrun gives its own.

    Args:
        count: ranks; one with ``torchrun=False`` is an ordinary process.
        folder: for their output.
        function: called with ``arguments`` in each of them.
    """

    def __init__(
        self,
        count: int,
        folder: Path,
        function: Callable[..., None],
        *arguments: Any,
        torchrun: bool = True,
    ) -> None:
        # The ranks find each other through it.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self._store.port
        for rank in range(count):
            (folder / "errors" / str(rank)).mkdir(parents=True, exist_ok=True)
        environments = [_environment(rank, count, port, folder) if torchrun else {} for rank in range(count)]
        super().__init__(folder, environments, function, *arguments)


def _environment(rank: int, count: int, port: int, folder: Path) -> dict[str, str]:
    return {
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_ERROR_FILE": str(folder / "errors" / str(rank) / "error.json"),
    }
