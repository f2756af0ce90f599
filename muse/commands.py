"""What the commands for trained models share: ``python -m muse.generate`` and its like."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

import torch

from muse.config import HardwareConfig
from muse.errors import ConfigError, RunError
from muse.hardware import use_hardware


class Parser(argparse.ArgumentParser):
    """Tells a wrong argument in one sentence, with status 1, as every other error.

    Args:
        module: that the command runs.
        description: its docstring, shown as it is written.
    """

    def __init__(self, module: str, description: str | None) -> None:
        super().__init__(
            prog=f"python -m {module}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """End the command."""
        sys.exit(f"error: {message}; {self.prog} --help says what there is")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add which model a command uses, and where it runs."""
    parser.add_argument("model", metavar="RUN|FILE", help="folder of a run, or a file of muse.export")
    parser.add_argument(
        "--which", choices=("best", "last"), default="best", help="checkpoint of a run (best)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")


def device_of(name: str) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        ConfigError: there is no such device.
    """
    return use_hardware(HardwareConfig(device=name))


def run_command(command: Callable[[], object]) -> None:
    """Run a command, and tell its errors and warnings in one sentence each."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        command()
    except (ConfigError, RunError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the text has seen enough; Python would complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
