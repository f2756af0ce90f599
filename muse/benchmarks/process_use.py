"""Memory and processor time of another process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Use:
    """Of a process with all its threads.

    Attributes:
        memory: bytes that are in memory.
        seconds: of processors, since it began.
    """

    memory: int
    seconds: float


def use_of(process: int) -> Use | None:
    """What a process has used; None where the system does not tell, or it has ended.

    Linux tells in /proc, others the package psutil if it is there.
    """
    place = Path("/proc") / str(process)
    if not Path("/proc/self/stat").exists():
        return _told_by_psutil(process)
    try:
        pages = int((place / "statm").read_text().split()[1])
        # After the name of the command, which may have spaces in it.
        fields = (place / "stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return None
    ticks = int(fields[11]) + int(fields[12])
    return Use(pages * os.sysconf("SC_PAGE_SIZE"), ticks / os.sysconf("SC_CLK_TCK"))


def _told_by_psutil(process: int) -> Use | None:
    try:
        import psutil
    except ImportError:
        return None
    try:
        found = psutil.Process(process)
        times = found.cpu_times()
        return Use(found.memory_info().rss, times.user + times.system)
    except psutil.Error:
        return None
