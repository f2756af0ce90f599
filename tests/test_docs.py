"""Every command in README.md and docs/ works: composed as it is written, and run in small."""

from __future__ import annotations

import itertools
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from torch.distributed.run import get_args_parser

import muse.cli
from muse.benchmarks import suite
from muse.benchmarks.cell import MEASUREMENTS
from muse.config import BenchConfig, build_config, quote_stage, register_schemas
from muse.hardware import describe, use_hardware

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = ("python train.py", "python bench.py", "python -m muse.", "torchrun ")
# Only these are composed and not run, and why.
COMPOSED_ONLY = {
    "benchmark=speedup": "measures for a minute at any size; tests/test_bench_cli.py runs it",
    "benchmark=kernels": "measures thirty cases; tests/test_bench_cli.py runs it",
    "stage=3a": "chooses what is faster on this machine for half a minute; tests/test_bench_cli.py runs it",
    "tokenizer=gpt2": "needs its files or the network",
    "logger.mode=online": "needs an account",
    "muse.report.dashboard": "needs an account; tests/report/test_dashboard.py builds it",
    "hydra/launcher=": "starts workers for each cell; tests/test_sweep_cli.py runs it",
    "hydra/sweeper=": "trains several times; tests/test_sweep_cli.py runs it",
    "train.py -m": "starts a process for each cell; tests/test_sweep_cli.py runs it",
}
# What a reader puts in place of, by what stands there.
PLACEHOLDERS = {
    # First, because the folder of a run has such a name.
    r"outputs/(train|bench)/\S+": "{run}",
    r"<run folder>": "{run}",
    r"data\.path=(<[^>]*>|\.\.\.)": "data.path={corpus}",
    r"=<n>": "=1",
    r"=<s>": "=0",
    r" \.\.\.(?= |$)": "",
    r"=<user[^>]*>": "=someone",
    r"<\w*>?\.safetensors": "{place}/weights.safetensors",
}
WIDTH = "{d_model:16,layers:2,heads:2,kv_heads:2,d_ff:32}"
# Put before a command's own options: what makes any of them small.
DEFAULTS = {
    "model.vocab_size": "300",
    "model.seq_len": "16",
    "model.real": WIDTH,
    "model.complex": WIDTH,
    "train.steps": "4",
    "train.batch_size": "2",
    "train.eval_every": "2",
    "train.checkpoint_every": "2",
    "train.sample_tokens": "4",
}
BENCH_DEFAULTS = {
    "benchmark.batch_size": "2",
    "benchmark.seq_len": "16",
    "benchmark.ode_steps": "2",
    "benchmark.train_steps": "2",
    "benchmark.warmup": "0",
    "benchmark.repeats": "1",
    "benchmark.inputs": "2",
}
# The largest values that run, and what a sweep over several becomes.
LARGEST = {
    "train.steps": (12, (2, 4)),
    "train.batch_size": (4, (2, 4)),
    "benchmark.batch_size": (2, (1, 2)),
    "benchmark.seq_len": (16, (8, 16)),
    "benchmark.ode_steps": (4, (2, 4)),
    "benchmark.train_steps": (2, (1, 2)),
    "benchmark.repeats": (1, (1, 2)),
    "benchmark.inputs": (2, (1, 2)),
    "benchmark.hidden": (32, (16, 32)),
    "model.seq_len": (16, (8, 16)),
    "model.vocab_size": (300, (300, 310)),
    "model.complex.d_model": (16, (8, 16)),
    "model.complex.layers": (2, (1, 2)),
    "model.real.d_model": (16, (8, 16)),
    "model.real.layers": (2, (1, 2)),
    "optim.accumulation": (2, (1, 2)),
}
# Groups whose choice does not matter for whether a command works, and what runs here.
GROUPS = {"hardware": "cpu", "logger": "none", "data": "text"}


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        where: file and line.
        text: as it is written, without its comment.
        fenced: whether it stands in a block of its own, so that a reader copies it.
    """

    where: str
    text: str
    fenced: bool


def commands_of(page: Path) -> list[Command]:
    found = []
    text = page.read_text(encoding="utf-8")

    def add(start: int, piece: str, fenced: bool) -> None:
        piece = piece.strip().replace(".venv/bin/", "").replace("python3 ", "python ")
        command = re.sub(r"^(\w+=\S+ )+", "", piece)
        if command.startswith(COMMANDS):
            line = text.count("\n", 0, start) + 1
            found.append(Command(f"{page.name}:{line}", piece, fenced))

    blocks = list(re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    for block in blocks:
        if block[1] not in ("", "bash", "sh", "console"):
            continue
        start = block.start(2)
        for line in block[2].replace("\\\n", "  ").split("\n"):
            for piece in re.sub(r"(^|\s)#.*", "", line).split("&&"):
                add(start, piece.removeprefix("$ "), True)
            start += len(line) + 1
    inline = re.sub(
        r"^```.*?^```", lambda b: re.sub(r"[^\n]", " ", b[0]), text, flags=re.MULTILINE | re.DOTALL
    )
    for span in re.finditer(r"`([^`]+)`", inline):
        add(span.start(), " ".join(span[1].split()), False)
    return found


ALL = [command for page in PAGES for command in commands_of(page)]
UNIQUE = list({command.text: command for command in reversed(ALL)}.values())[::-1]
RUN = [c for c in UNIQUE if c.fenced and not any(part in c.text for part in COMPOSED_ONLY)]


def named(commands: list[Command]) -> dict:
    return {"argvalues": commands, "ids": [command.where for command in commands]}


def filled_in(text: str, **values: object) -> list[str]:
    """The words of a command with something real in place of each placeholder, environment left out."""
    text = re.sub(r"^(\w+=\S+ )+", "", text)
    for pattern, real in PLACEHOLDERS.items():
        text = re.sub(pattern, real.format(**values), text)
    words = shlex.split(text)
    left = [word for word in words if re.search(r"<\w|\.\.\.", word)]
    assert not left, f"what stands for {left[0]}? add it to PLACEHOLDERS"
    return words


def split(words: list[str]) -> tuple[list[str], str, list[str]]:
    """torchrun's own options, the script or module, and its arguments."""
    if words[0] == "torchrun":
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        return words[1:at], words[at], words[at + 1 :]
    if words[1] == "-m":
        return [], words[2], words[3:]
    return [], words[1], words[2:]


def overrides(arguments: list[str]) -> list[Override]:
    options = [argument for argument in quote_stage(arguments) if "=" in argument and argument[0] != "-"]
    return OverridesParser.create().parse_overrides(options)


def swept(override: Override) -> list[str]:
    """The values that a sweep gives an option, or its ends."""
    if not override.is_sweep_override():
        return [override.input_line]
    key = override.get_key_element()
    if override.is_interval_sweep():
        ends = override.value()
        return [f"{key}={ends.start}", f"{key}={ends.end}"]
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


@pytest.mark.parametrize("command", **named(UNIQUE))
def test_options_of_a_command_exist_and_are_allowed(command):
    """Every combination of a sweep composes, and its values are allowed."""
    launcher, script, arguments = split(filled_in(command.text, run="run", corpus="corpus", place="place"))
    get_args_parser().parse_args([*launcher, script])
    if script not in ("train.py", "bench.py"):
        assert (ROOT / script.replace(".", "/")).with_suffix(".py").exists() or (
            ROOT / script.replace(".", "/") / "__main__.py"
        ).exists()
        return
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for options in itertools.product(*map(swept, overrides(arguments))):
            build_config(compose(script.removesuffix(".py"), list(options)))


def smaller(override: Override, values_of_a_sweep: int) -> str:
    """A command's own option with the largest value that runs here."""
    key, line = override.get_key_element(), override.input_line
    if override.is_sweep_override():
        values = swept(override)
        if key in LARGEST and len(values) > 1:
            values = [f"{key}={value}" for value in LARGEST[key][1]]
        return f"{key}=" + ",".join(value.partition("=")[2] for value in values[:values_of_a_sweep])
    value = override.value()
    if key in LARGEST and isinstance(value, int | float) and value > LARGEST[key][0]:
        return f"{key}={LARGEST[key][0]}"
    return line


def in_small(script: str, arguments: list[str], place: Path) -> list[str]:
    """The arguments of a command about the same, for seconds."""
    flags = [argument for argument in arguments if argument[0] == "-"]
    own = overrides([a for a in arguments if a[0] != "-"])
    kept = [o for o in own if o.get_key_element() not in GROUPS]
    # Two cells are a sweep.
    last_sweep = next((o for o in reversed(kept) if o.is_sweep_override()), None)
    chosen = {o.get_key_element(): o.value() for o in own if o.get_key_element() in GROUPS}
    groups = dict(GROUPS)
    path = place / "text.txt"
    if chosen.get("data") in ("wikitext2", "synthetic"):
        groups["data"] = chosen["data"]
        path = place / "corpus"
    values = {**DEFAULTS, **(BENCH_DEFAULTS if script == "bench.py" else {})}
    return [
        *flags,
        *(f"{key}={value}" for key, value in {**groups, **values}.items()),
        *(smaller(override, 2 if override is last_sweep else 1) for override in kept),
        f"data.path={path}",
        f"data.cache={place / 'cache'}",
        f"output_root={place / 'outputs'}",
        "hardware.compile=false",
        "logger.mode=disabled",
        # Handlers would outlive the test.
        "hydra/job_logging=disabled",
        "hydra/hydra_logging=disabled",
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a text, a corpus in three splits and a finished run."""
    folder = tmp_path_factory.mktemp("docs")
    lines = [f"Line {n} says\n    that {n * n} is the square of {n}.\n" for n in range(200)]
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "corpus").mkdir()
    for split_name in ("train", "valid", "test"):
        (folder / "corpus" / f"{split_name}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def run_here(script: str, arguments: list[str]) -> int:
    """The exit status of a script or module run in this process, which spares the import of torch."""
    muse.cli._statuses.clear()
    before = sys.argv, os.getcwd(), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        sys.argv = [script, *arguments]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
        signal.signal(signal.SIGTERM, before[2])
        signal.signal(signal.SIGINT, before[3])
    return 0


def measured_here(measurement: str, config: BenchConfig) -> dict:
    """As measure_apart, but in this process: nothing in these tests depends on what is measured."""
    device = use_hardware(config.hardware)
    return {**MEASUREMENTS[measurement](config, device), "device": describe(device)}


@pytest.fixture(scope="module")
def finished_run(place) -> Path:
    """A run of stage 1, for commands that need one."""
    assert run_here("train.py", in_small("train.py", ["stage=1"], place)) == 0
    # Other commands leave runs there, too.
    return max((place / "outputs" / "train").glob("stage1-*/*"), key=lambda run: run.stat().st_mtime_ns)


@pytest.mark.slow
@pytest.mark.parametrize("command", **named(RUN))
def test_a_command_runs(command, place, request, monkeypatch, capfd):
    monkeypatch.chdir(place)
    monkeypatch.setattr(suite, "measure_apart", measured_here)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    needs_run = "{run}" in filled_in(command.text, run="{run}", corpus="", place="")
    run = request.getfixturevalue("finished_run") if "run folder" in command.text or needs_run else None
    _, script, arguments = split(filled_in(command.text, run=run, corpus=place / "corpus", place=place))
    composed = script in ("train.py", "bench.py")
    if composed:
        arguments = in_small(script, arguments, place)
    if command.text.startswith("torchrun"):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
                *(str(ROOT / script), *arguments),
            ],
            cwd=place,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            check=False,
        )
        status = done.returncode
    else:
        status = run_here(script, arguments)
    printed = capfd.readouterr()
    assert status == 0, printed.err[-2000:]


def test_an_option_that_does_not_exist_is_found():
    command = Command("here:1", "python train.py train.stepz=3", True)
    with pytest.raises(Exception, match="stepz"):
        test_options_of_a_command_exist_and_are_allowed(command)


def test_commands_are_found():
    assert {Path(c.where.partition(":")[0]).name for c in ALL} >= {"README.md", "measurements.md"}
    assert any(c.text.startswith("python bench.py -m") for c in RUN)


@pytest.mark.parametrize("part", COMPOSED_ONLY)
def test_what_is_only_composed_is_there(part):
    """A reason for a command that is gone would excuse the next one."""
    assert part in ("tokenizer=gpt2", "logger.mode=online") or any(part in c.text for c in ALL)
