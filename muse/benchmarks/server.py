"""The server as a process of its own, and a model for it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from muse.benchmarks.model import benchmark_model
from muse.config import BenchConfig, RunConfig
from muse.data import load_tokens
from muse.errors import RunError
from muse.export import write_exported
from muse.options import changed

# Seconds in which a server must be ready, and have ended.
START, END = 600.0, 60.0
# Between two looks at it.
LOOK = 0.05


def model_to_serve(config: BenchConfig, folder: Path) -> Path:
    """``benchmark.checkpoint``, or without one a file in ``folder`` with an untrained model and a tokenizer.

    Raises:
        ConfigError: there is no text for the tokenizer.
        RunError: the file cannot be written.
    """
    if config.benchmark.checkpoint is not None:
        return Path(config.benchmark.checkpoint)
    tokenizer = load_tokens(config.data, config.tokenizer, config.model.vocab_size).tokenizer
    assert tokenizer is not None
    config = changed(config, model={"vocab_size": tokenizer.vocab_size})
    model = benchmark_model(config, torch.device("cpu"))
    # Those of a run that could have trained it.
    known = {field.name for field in fields(RunConfig)}
    options = {name: value for name, value in asdict(config).items() if name in known}
    file = folder / "untrained.safetensors"
    write_exported(file, model, options, 0, tokenizer)
    return file


@dataclass(frozen=True)
class RunningServer:
    """``python -m muse.serve`` that is ready.

    Attributes:
        process: of the server.
        address: ``http://127.0.0.1:PORT``.
        output: file with what it printed, errors included.
    """

    process: subprocess.Popen[bytes]
    address: str
    output: Path

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal; its status when it has ended.

        Raises:
            RunError: it has not within a minute.
        """
        self.process.send_signal(number)
        try:
            return self.process.wait(END)
        except subprocess.TimeoutExpired as error:
            raise RunError(
                f"the server had not ended {END:g} s after {signal.Signals(number).name}"
            ) from error


@contextmanager
def running_server(
    model: Path, folder: Path, *options: object, environment: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    """The command on a free port of 127.0.0.1 while the block lasts, in a process group of its own.

    Args:
        model: run folder or exported file.
        folder: for what it prints.
        options: of the command.
        environment: beside that of this process, without its API keys.

    Raises:
        RunError: it ended, or was not ready within ten minutes.
    """
    command = [sys.executable, "-m", "muse.serve", str(model), "--port", "0", *map(str, options)]
    output = folder / "server.log"
    variables = {**os.environ, "MUSE_API_KEY": "", **(environment or {})}
    with output.open("wb") as opened:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=opened,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )
    try:
        yield RunningServer(process, _address_of(process, output), output)
    finally:
        # A stopped process takes no other signal.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _address_of(process: subprocess.Popen[bytes], output: Path) -> str:
    deadline = time.monotonic() + START
    while True:
        status = process.poll()
        printed = output.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"is served at (\S+);", printed):
            return found[1]
        if status is not None:
            last = (printed.strip().splitlines() or ["it said nothing"])[-1]
            raise RunError(f"the server ended with status {status} before it was ready: {last}")
        if time.monotonic() > deadline:
            raise RunError(f"the server was not ready within {START:g} s")
        time.sleep(LOOK)
