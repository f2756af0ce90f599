"""Very small trainings for ranks, train.py on several of them, and torchrun itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from muse.config import RunConfig, StageConfig
from muse.data import TokenData
from muse.processes.ranks import process_group
from muse.runs.checkpoints import load_state
from muse.training import parallel, trainer
from support import configs
from support.configs import run_options
from support.processes import ROOT, be_command
from support.ranks import Ranks
from support.runs import CrashError, logged, run_folders
from support.waiting import PATIENCE, wait_until

# What happens after a step.
React = Callable[[int], None]


def go_on(step: int) -> None:
    """Let a training go on."""


def run_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returns on each rank; a single one is an ordinary process."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        ranks = Ranks(count, folder, _save_result, folder, function, arguments, torchrun=count > 1)
        statuses = ranks.wait()
        assert not any(statuses), "\n".join(ranks.err())
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _save_result(folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with process_group(torch.device("cpu")):
        torch.save(function(*arguments), folder / f"{os.environ.get('RANK', '0')}.pt")


def options(place: Path, root: str, together: str, *more: str, stage: str = "2") -> list[str]:
    """A very small run of train.py that logs every step."""
    return [
        f"stage={stage}",
        *run_options(place, root),
        "stage.precision=fp32",
        "train.sample_tokens=4",
        f"hardware.parallel={together}",
        *more,
    ]


def train_py(
    count: int,
    place: Path,
    arguments: list[str],
    torchrun: bool = True,
    prepare: Callable[[], None] | None = None,
) -> Ranks:
    """Start train.py on ranks that nobody watches; ``prepare`` is called in each of them before."""
    folder = place / "output" / str(time.monotonic_ns())
    return Ranks(count, folder, be_command, "train.py", arguments, place, prepare, torchrun=torchrun)


def script(place: Path, prepare: Callable[[], None], *arguments: Any) -> Path:
    """A train.py that first calls ``prepare``, a function of a test module, with plain values."""
    folders = [str(ROOT), str(ROOT / "tests")]
    module, name = prepare.__module__, prepare.__name__
    path = place / f"{name}_{'_'.join(map(str, arguments))}.py"
    path.write_text(
        f"""import sys
sys.path[:0] = {folders}
from functools import partial
from pathlib import Path
from support.processes import be_command
from {module} import {name}
be_command("train.py", sys.argv[1:], Path.cwd(), partial({name}, *{arguments}))
""",
        encoding="utf-8",
    )
    return path


class Job:
    """A torchrun with two ranks in sessions of their own, all of which can be found and killed."""

    def __init__(
        self,
        place: Path,
        arguments: list[str],
        script: Path = ROOT / "train.py",
        torchrun: str = "torch.distributed.run",
    ) -> None:
        self.mark = f"MUSE_TEST_JOB={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        (place / "temporary").mkdir(exist_ok=True)
        environment = {
            **os.environ,
            name: value,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TMPDIR": str(place / "temporary"),
            "PYTHONPATH": str(ROOT),
            # A rank that is slow to save is not killed; torch 2.13 is the first to read this.
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(PATIENCE),
        }
        launch = ["-m", torchrun, "--standalone", "--nproc-per-node=2"]
        self.process = subprocess.Popen(
            [sys.executable, *launch, str(script), *arguments],
            cwd=place,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def alive(self) -> bool:
        """Whether torchrun has not ended."""
        return self.process.poll() is None

    def processes(self, variable: str = "") -> list[int]:
        """Ids of the job's processes, of those with some environment variable, as ``RANK=1``, alone."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if {self.mark.encode(), variable.encode()} <= {*environment, b""}:
                found.append(int(folder.name))
        return found

    def kill(self, variable: str = "") -> None:
        """End the processes, once they are there, at once, as when a machine goes down."""
        wait_until(lambda: not self.alive() or self.processes(variable))
        while found := self.processes(variable):
            for process in found:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self.process.poll()

    def finish(self) -> tuple[int, str, str]:
        """Exit status, standard output and standard error; nothing is left running."""
        try:
            out, err = self.process.communicate(timeout=PATIENCE)
        finally:
            left = self.processes()
            self.kill()
            self.process.communicate()
        assert not left, f"processes outlived torchrun: {err}"
        return self.process.returncode, out, err


def wait_for_steps(alive: Callable[[], bool], root: Path, steps: int) -> Path:
    """Wait until a run below ``root`` has logged so many steps; its folder."""

    def found() -> list[Path]:
        runs = [run for run in run_folders(root) if (run / "metrics.jsonl").exists()]
        return [run for run in runs if len(logged(run)) >= steps]

    return wait_until(found, alive)[-1]


def run_config(
    stage: StageConfig, together: str = "none", optim: dict[str, Any] | None = None, **train: Any
) -> RunConfig:
    """A run whose steps are of several micro-batches, which ranks can share.

    A large eps, as AdamW would turn a rounding error of a gradient near zero into a whole step; and no
    clipping, because norms are float32.
    """
    optim = {"accumulation": 2, "eps": 1e-3, "clip": 0.0, **(optim or {})}
    config = configs.run_config(stage, optim, **{"steps": 4, "batch_size": 6, **train})
    config.hardware.parallel = together
    # Stage 3a has no grouped queries.
    config.model = configs.small_sizes(kv_heads=2)
    return config


def token_data() -> TokenData:
    return configs.token_data(train_tokens=405)


@dataclass
class Training:
    """What a rank knows of a training: everything that its log was told, and the weights of all ranks."""

    lines: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    result: trainer.TrainResult | None = None

    def series(self, name: str) -> list[float]:
        """The values of a metric."""
        return [line[name] for line in self.lines if name in line]

    def flat(self) -> Tensor:
        """All weights in a row, float64."""
        return torch.cat([weight.double().flatten() for weight in self.weights.values()])


def run_train(
    config: RunConfig,
    run: Path,
    resume_from: Path | None = None,
    react: React = go_on,
    double: bool = False,
    prepare: Callable[[nn.Module], None] = lambda model: None,
) -> Training:
    """Train on the ranks there are; ``react`` is called after a step, and may end the training."""
    training = Training()

    def log(step: int, metrics: dict[str, float]) -> None:
        training.lines.append({"step": step, **metrics})
        react(step)

    resumed = (resume_from, load_state(resume_from)) if resume_from is not None else None
    with built(double, prepare):
        try:
            model, training.result = trainer.train(
                config, token_data(), torch.device("cpu"), run, log, resumed, progress=False
            )
        except CrashError:
            return training
    training.weights = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
    return training


@contextmanager
def built(double: bool, prepare: Callable[[nn.Module], None] = lambda model: None) -> Iterator[None]:
    """Let the trainer's models be float64, with gradients summed in float64, and changed by ``prepare``."""
    build, policy = trainer.build_model, parallel.MixedPrecisionPolicy

    def build_and_prepare(*arguments: Any) -> nn.Module:
        model = build(*arguments)
        model = model.double() if double else model
        prepare(model)
        return model

    trainer.build_model = build_and_prepare
    if double:
        parallel.MixedPrecisionPolicy = lambda reduce_dtype: policy(reduce_dtype=torch.float64)
    try:
        yield
    finally:
        trainer.build_model, parallel.MixedPrecisionPolicy = build, policy


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor, gathered from all ranks."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
