"""Ranks for the tests of this folder, very small trainings for them, and train.py on several ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from waiting import PATIENCE, wait_until

from muse.config import (
    DataConfig,
    HardwareConfig,
    LoggerConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    StageConfig,
    TokenizerConfig,
    TrainConfig,
    WidthConfig,
)
from muse.data import Counts, TokenData
from muse.files import find_files
from muse.processes.ranks import joined_ranks
from muse.report.metrics import read_metrics
from muse.runs.checkpoints import load_tensors, stored_tensors
from muse.training import parallel, trainer

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 13
SEQ_LEN = 8

# What happens after a step.
React = Callable[[int], None]


def go_on(step: int) -> None:
    """Let a training go on."""


class CrashError(Exception):
    """Stands for the end of a process."""


class Ranks:
    """Processes with the environment that torchrun gives its own, and their output in files.

    They are copies of one process that has imported everything already.

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
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        multiprocessing.set_forkserver_preload(["muse.training.run", "muse.launch.cli", "matplotlib.pyplot"])
        context = multiprocessing.get_context("forkserver")
        # The ranks find each other through it.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self._store.port
        environments = [_environment(rank, count, port, folder) if torchrun else {} for rank in range(count)]
        self.processes: list[BaseProcess] = [
            context.Process(
                target=_be_rank,
                args=(folder / str(rank), environment, function, arguments),
                daemon=True,
            )
            for rank, environment in enumerate(environments)
        ]
        for rank, process in enumerate(self.processes):
            # One that is ended very early has printed nothing.
            for ending in ("out", "err"):
                (folder / f"{rank}.{ending}").touch()
            (folder / "errors" / str(rank)).mkdir(parents=True, exist_ok=True)
            process.start()

    def wait(self, watched: bool = False) -> list[int]:
        """Exit statuses; nothing is left running.

        Args:
            watched: whether the first rank that fails ends the others, as torchrun does.
        """
        try:
            deadline = time.monotonic() + PATIENCE
            while watched and not any(process.exitcode for process in self.processes):
                running = [process.sentinel for process in self.processes if process.is_alive()]
                if not wait(running, max(0.0, deadline - time.monotonic())):
                    break
            for process in self.processes:
                if watched:
                    process.terminate()
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in self.processes:
                process.kill()
                process.join()
        return [process.exitcode or 0 for process in self.processes]

    def out(self) -> list[str]:
        """What each rank printed."""
        return [(self.folder / f"{rank}.out").read_text() for rank in range(len(self.processes))]

    def err(self) -> list[str]:
        """What each rank printed on standard error."""
        return [(self.folder / f"{rank}.err").read_text() for rank in range(len(self.processes))]


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


def _be_rank(
    output: Path, environment: dict[str, str], function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    for ending, stream in (("out", 1), ("err", 2)):
        file = os.open(output.with_suffix(f".{ending}"), os.O_CREAT | os.O_WRONLY)
        os.dup2(file, stream)
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)


def run_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returns on each rank; a single one is an ordinary process."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        ranks = Ranks(count, folder, _save_result, folder, function, arguments, torchrun=count > 1)
        statuses = ranks.wait()
        assert not any(statuses), "\n".join(ranks.err())
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _save_result(folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with joined_ranks(torch.device("cpu")):
        torch.save(function(*arguments), folder / f"{os.environ.get('RANK', '0')}.pt")


def options(place: Path, root: str, together: str, *more: str, stage: str = "2") -> list[str]:
    """A very small run of train.py that logs every step."""
    width = "{d_model:16,layers:2,heads:2,kv_heads:2,d_ff:32}"
    return [
        f"stage={stage}",
        "stage.precision=fp32",
        "stage.dropout=0.1",
        "data=text",
        f"data.path={place / 'text.txt'}",
        f"data.cache={place / 'cache'}",
        f"output_root={place / root}",
        "tokenizer.vocab_size=300",
        "model.seq_len=16",
        f"model.complex={width}",
        "train.batch_size=2",
        "train.sample_tokens=4",
        "logger=none",
        "logger.log_every=1",
        "hardware=cpu",
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
    return Ranks(count, folder, be_train_py, arguments, place, prepare, torchrun=torchrun)


def be_train_py(arguments: list[str], place: Path, prepare: Callable[[], None] | None) -> None:
    """Become train.py in the folder ``place``."""
    if prepare is not None:
        prepare()
    os.chdir(place)
    sys.argv = [str(ROOT / "train.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def script(place: Path, prepare: Callable[[], None], *arguments: Any) -> Path:
    """A train.py that first calls ``prepare``, a function of a test module, with plain values."""
    folders = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "distributed")]
    module, name = prepare.__module__, prepare.__name__
    path = place / f"{name}_{'_'.join(map(str, arguments))}.py"
    path.write_text(
        f"""import sys
sys.path[:0] = {folders}
from functools import partial
from pathlib import Path
from distributed_helpers import be_train_py
from {module} import {name}
be_train_py(sys.argv[1:], Path.cwd(), partial({name}, *{arguments}))
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


def run_folders(root: Path) -> list[Path]:
    """Folders of the runs below ``root``, the oldest first."""
    files = find_files(root, "run.json")
    return [path.parent for path in sorted(files, key=lambda path: path.stat().st_mtime_ns)]


def logged(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run without the speed, which is never the same twice."""
    return [{key: value for key, value in line.items() if "second" not in key} for line in read_metrics(run)]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def stage_config(number: str = "1", **options: Any) -> StageConfig:
    activation = "gelu" if number in ("0", "3a") else "split_gelu"
    return StageConfig(**{"number": number, "precision": "fp32", "activation": activation, **options})


def run_config(
    stage: StageConfig, together: str = "none", optim: dict[str, Any] | None = None, **train: Any
) -> RunConfig:
    """A run of a model with some thousand parameters; every step is logged.

    A large eps, as AdamW would turn a rounding error of a gradient near zero into a whole step; and no
    clipping, because norms are float32.
    """
    width = WidthConfig(d_model=8, layers=2, heads=2, kv_heads=2, d_ff=16)
    defaults = {"steps": 4, "batch_size": 6, "eval_every": 0, "checkpoint_every": 0, "sample_tokens": 0}
    optim = {"lr": 0.02, "warmup": 2, "accumulation": 2, "eps": 1e-3, "clip": 0.0, **(optim or {})}
    return RunConfig(
        stage=stage,
        model=ModelConfig("nano", VOCAB, SEQ_LEN, real=width, complex=width),
        data=DataConfig(name="stdlib"),
        tokenizer=TokenizerConfig(name="word"),
        optim=OptimConfig(**optim),
        hardware=HardwareConfig(device="cpu", parallel=together),
        logger=LoggerConfig(mode="disabled", log_every=1),
        train=TrainConfig(**{**defaults, **train}),
    )


def token_data() -> TokenData:
    """Tokens of a noisy cycle, so that there is something to learn."""
    generator = np.random.default_rng(0)

    def split(size: int) -> np.ndarray:
        return ((np.arange(size) * 5 + generator.integers(2, size=size)) % VOCAB).astype(np.uint16)

    tokens = {"train": split(405), "valid": split(61), "test": split(40)}
    counts = {name: Counts(len(values), len(values) // 3, 2 * len(values)) for name, values in tokens.items()}
    return TokenData(**tokens, vocab_size=VOCAB, tokenizer=None, counts=counts)


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

    with built(double, prepare):
        try:
            model, training.result = trainer.train(
                config, token_data(), torch.device("cpu"), run, log, resume_from, progress=False
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


def crash_at(step: int) -> React:
    """End a training after a step as if its process had ended."""
    return partial(_crash, step)


def _crash(step: int, reached: int) -> None:
    if reached == step:
        raise CrashError


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor, gathered from all ranks."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def stored(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint: of the model and the optimiser."""
    tensors, groups = {}, {"model": {}, "optimizer": {}}
    for name, (size, dtype) in stored_tensors(checkpoint).items():
        group, _, rest = name.partition(".")
        tensors[name] = groups[group][rest] = torch.empty(size, dtype=dtype)
    load_tensors(checkpoint, groups)
    return tensors


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
