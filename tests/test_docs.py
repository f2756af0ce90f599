"""Every command in README.md and docs/ works: composed as it is written, and run in small. So does Python."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
import wandb_workspaces.workspaces as workspaces
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from support.commands import WITHOUT_LOG, keep_here, measured_here, run_here
from support.configs import write_text
from support.processes import ROOT, be_command, environment_apart
from support.ranks import Ranks
from support.serving import server_process
from torch.distributed.run import get_args_parser

import muse
from muse.benchmarks import suite
from muse.config import BenchConfig, build_config
from muse.export import export_run
from muse.files import find_files
from muse.launch.composition import prepare_hydra

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = ("python ", "torchrun ", "wandb ", "pip ")
# Where a server is, in commands that ask one.
SERVER = "http://127.0.0.1:8000"
# Commands that start the processes of another one, and what they are here.
TORCHRUNS = {"torchrun": "torch.distributed.run", "python -m muse.torchrun": "muse.torchrun"}
# Only these are not run, and why.
NOT_RUN = {
    "python -m venv": "the gate does it (.ci/run)",
    'pip install -e ".[ray]"': "nothing installs Ray, which is large; test_sweep.py plays its launcher",
    "pip install": "the gate installs .[dev] (.ci/run), which has the other extras",
    "python -m pytest": "the gate does it (.ci/run)",
    "python -m pdoc": "test_the_reference_has_every_name_and_no_warning does it",
    "python tests/random_kills.py": "takes minutes; test_random_kills.py does it in small",
    "python -m muse.card": "asks for minutes; test_real_parts_answer_and_are_told asks in small",
    "python -m kernels.resources": "writes kernels/resources.json, which tests hold against the source",
    "python -m kernels.instructions": "prints docs/instructions.md, which test_instructions.py compares",
    "wandb login": "needs an account",
    "wandb sync": "needs an account",
}
# What a reader puts in place of, by what stands there.
PLACEHOLDERS = {
    # First, because the folder of a run has such a name.
    r"outputs/(train|bench)/\S+": "{run}",
    r"<run folder>": "{run}",
    r"data\.path=(<[^>]*>|\.\.\.)": "data.path={corpus}",
    r"(?<=path:)\.\.\.": "{corpus}",
    r"=<n>": "=1",
    r"=<s>": "=0",
    r" \.\.\.(?= |$)": "",
    r"=<user[^>]*>": "=someone",
    r"\w+\.safetensors": "{place}/weights.safetensors",
    r"docs/figures docs/pictures": f"{ROOT}/docs/figures {{place}}/pictures",
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
    "benchmark.seeds": "1",
    "benchmark.learning_rates": "[1]",
    "benchmark.loops": "[]",
    "benchmark.flow_steps": "[]",
    "benchmark.clients": "[2]",
    "benchmark.seconds": "0.1",
    "benchmark.minutes": "0.005",
    # The interpreter of Triton and the compiler of torch take longer than all the rest.
    "benchmark.compile": "false",
    "stack.level": "2",
    "stack.speculation_warmup": "2",
}
# What a command has that does not say so.
STANDARD = {"model": "tiny"}
# Put before options of a command that holds the first of the two.
DEFAULTS_WITH = {
    "profile=true": ["train.steps=12"],
    # At least one update within the steps.
    "benchmark=speedup": ["optim.accumulation=2"],
    # Whose flow is that of the stage.
    "benchmark=price": ["benchmark.ode_steps=null"],
    # A training for each.
    "benchmark=ablation": ["benchmark.ode_steps=null", "benchmark.variants=[stage 3,all parts]"],
    "experiment=price_smoke": ["benchmark.ode_steps=null"],
    "benchmark=serving": ["benchmark.ode_steps=null"],
    "hydra/sweeper=search": ["hydra.sweeper.n_trials=1"],
    "hydra/launcher=submitit_local": ["hydra.launcher.timeout_min=9"],
    # One at a time stays in this process; tests/launch/test_sweep_cli.py has the cells of a sweep side by
    # side, and a search here that says so has its own.
    "hydra/launcher=processes": ["hydra.launcher.n_jobs=1"],
}
# A launcher that is not here, and the same one without its cluster.
LAUNCHERS = {"hydra/launcher=slurm": "hydra/launcher=submitit_local"}
# The largest values that run, and what a sweep over several becomes.
LARGEST = {
    "train.steps": (12, (2, 4)),
    "train.batch_size": (4, (2, 4)),
    "benchmark.batch_size": (2, (1, 2)),
    "benchmark.seq_len": (16, (8, 16)),
    "benchmark.ode_steps": (4, (2, 4)),
    "benchmark.train_steps": (2, (1, 2)),
    "benchmark.repeats": (1, (1, 2)),
    "benchmark.minutes": (0.005, ()),
    "benchmark.inputs": (2, (1, 2)),
    "benchmark.hidden": (32, (16, 32)),
    "model.seq_len": (16, (8, 16)),
    "model.vocab_size": (300, (300, 310)),
    "model.complex.d_model": (16, (8, 16)),
    "model.complex.layers": (2, (1, 2)),
    "model.real.d_model": (16, (8, 16)),
    "model.real.layers": (2, (1, 2)),
    "optim.accumulation": (2, (1, 2)),
    "hydra.sweeper.n_trials": (2, ()),
    "hydra.sweeper.n_jobs": (2, ()),
    "hydra.launcher.n_jobs": (2, ()),
}
# Groups whose choice does not matter for whether a command works, and what runs here. Several loggers run.
GROUPS = {"hardware": "cpu", "logger": "none", "data": "text"}


@dataclass(frozen=True)
class Command:
    """A command of a page, or a block of Python.

    Attributes:
        where: file and line.
        text: as it is written, a command without its comment.
    """

    where: str
    text: str


def blocks_of(text: str) -> list[re.Match[str]]:
    """The blocks of code of a page: their language and their text."""
    return list(re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def python_of(page: Path) -> list[Command]:
    """The blocks of Python of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Command(f"{page.name}:{text.count(chr(10), 0, block.start(2)) + 1}", block[2])
        for block in blocks_of(text)
        if block[1] in ("python", "py")
    ]


def commands_of(page: Path, commands: tuple[str, ...] = COMMANDS) -> list[Command]:
    found = []
    text = page.read_text(encoding="utf-8")

    def add(start: int, piece: str) -> None:
        piece = piece.strip().replace(".venv/bin/", "").replace("python3 ", "python ")
        command = re.sub(r"^(\w+=\S+ )+", "", piece)
        if command.startswith(commands):
            line = text.count("\n", 0, start) + 1
            found.append(Command(f"{page.name}:{line}", piece))

    for block in blocks_of(text):
        if block[1] not in ("", "bash", "sh", "console"):
            continue
        start = block.start(2)
        for line in block[2].replace("\\\n", "  ").split("\n"):
            for piece in re.sub(r"(^|\s)#.*", "", line).split("&&"):
                add(start, piece.removeprefix("$ "))
            start += len(line) + 1
    inline = re.sub(
        r"^```.*?^```", lambda b: re.sub(r"[^\n]", " ", b[0]), text, flags=re.MULTILINE | re.DOTALL
    )
    for span in re.finditer(r"`([^`]+)`", inline):
        add(span.start(), " ".join(span[1].split()))
    return found


ALL = [command for page in PAGES for command in commands_of(page)]
UNIQUE = list({command.text: command for command in reversed(ALL)}.values())[::-1]
CURL = [command for page in PAGES for command in commands_of(page, ("curl ",))]
PYTHON = [block for page in PAGES for block in python_of(page)]
RUN = [c for c in UNIQUE if not any(part in c.text for part in NOT_RUN)]


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


def launcher_of(text: str) -> str | None:
    """The module that starts the processes of a command."""
    return next((module for name, module in TORCHRUNS.items() if text.startswith(f"{name} ")), None)


def split(words: list[str]) -> tuple[list[str], str, list[str]]:
    """torchrun's own options, the script or module, and its arguments."""
    if launcher_of(" ".join(words)):
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        options = next(i for i, word in enumerate(words) if word.startswith("--"))
        return words[options:at], words[at], words[at + 1 :]
    if words[1] == "-m":
        return [], words[2], words[3:]
    return [], words[1], words[2:]


def overrides(arguments: list[str]) -> list[Override]:
    options = [argument for argument in arguments if "=" in argument and argument[0] != "-"]
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


@pytest.mark.parametrize("command", **named(RUN))
def test_options_of_a_command_exist_and_are_allowed(command):
    """Every value of a sweep composes, and is allowed."""
    launcher, script, arguments = split(filled_in(command.text, run="run", corpus="corpus", place="place"))
    get_args_parser().parse_args([*launcher, script])
    if script not in ("train.py", "bench.py"):
        assert (ROOT / script.replace(".", "/")).with_suffix(".py").exists() or (
            ROOT / script.replace(".", "/") / "__main__.py"
        ).exists()
        return
    prepare_hydra()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        values = [swept(override) for override in overrides(arguments)]
        for cell in range(max(map(len, values), default=1)):
            options = [own[cell % len(own)] for own in values]
            build_config(compose(script.removesuffix(".py"), options))


def smaller(override: Override, values_of_a_sweep: int) -> str:
    """A command's own option with the largest value that runs here."""
    key, line = override.get_key_element(), override.input_line
    if override.is_interval_sweep():
        return line
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
    arguments = [LAUNCHERS.get(argument, argument) for argument in arguments]
    own = overrides([a for a in arguments if a[0] != "-"])
    kept = [o for o in own if o.get_key_element() not in GROUPS]
    # Two cells are a sweep.
    last_sweep = next((o for o in reversed(kept) if o.is_sweep_override()), None)
    chosen = {o.get_key_element(): o.value() for o in own if o.get_key_element() in GROUPS}
    groups = dict(GROUPS)
    path = place / "text.txt"
    if chosen.get("data") in ("wikitext2", "synthetic", "files", "mix"):
        groups["data"] = chosen["data"]
        path = place / "corpus"
    if isinstance(chosen.get("logger"), list):
        groups["logger"] = f"[{','.join(map(str, chosen['logger']))}]"
    values = {**STANDARD, **groups, **DEFAULTS, **(BENCH_DEFAULTS if script == "bench.py" else {})}
    given = [
        *(f"{key}={value}" for key, value in values.items()),
        *(line for option, lines in DEFAULTS_WITH.items() if option in arguments for line in lines),
        *(smaller(override, 2 if override is last_sweep else 1) for override in kept),
        *([] if groups["data"] == "mix" else [f"data.path={path}"]),
        f"data.cache={place / 'cache'}",
        f"output_root={place / 'outputs'}",
        "hardware.compile=false",
        "logger.mode=disabled",
        *WITHOUT_LOG,
    ]
    # The last value of an option holds; commands that differ in others alone are the same.
    return [*flags, *{line.partition("=")[0]: line for line in given}.values()]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a text, a corpus in three splits and a finished run."""
    folder = tmp_path_factory.mktemp("docs")
    text = write_text(folder).read_text(encoding="utf-8")
    (folder / "corpus").mkdir()
    # Whole splits are evaluated.
    for split_name, size in (("train", len(text)), ("valid", 1000), ("test", 1000)):
        (folder / "corpus" / f"{split_name}.txt").write_text(text[:size], encoding="utf-8")
    return folder


def without_sizes(value: Any) -> Any:
    """Options but for their whole numbers."""
    if isinstance(value, dict):
        return {name: without_sizes(own) for name, own in value.items()}
    return None if isinstance(value, int) and not isinstance(value, bool) else value


MEASURED: dict[str, dict[str, Any]] = {}


def measured_once(measurement: str, config: BenchConfig, *others: BenchConfig) -> dict[str, Any]:
    """A measurement, or what it found before, in other sizes: nothing in these tests depends on that."""
    options = dataclasses.asdict(config)
    if measurement in ("deployment", "serving"):
        # A server does not care whose weights it has; tests/benchmarks/test_serving.py has both kinds.
        options["benchmark"]["checkpoint"] = None
    groups = {group: without_sizes(options[group]) for group in ("stage", "benchmark", "stack")}
    key = json.dumps([measurement, groups], sort_keys=True)
    if key not in MEASURED:
        MEASURED[key] = measured_here(measurement, config, *others)
    return MEASURED[key]


@pytest.fixture(scope="module")
def finished_run(place) -> Callable[[str], Path]:
    """A run of a stage, for commands that need one."""

    @functools.cache
    def run(stage: str) -> Path:
        arguments = [*in_small("train.py", [f"stage={stage}"], place), f"output_root={place / stage}"]
        assert run_here("train.py", arguments) == 0
        return find_files(place / stage, "run.json")[0].parent

    return run


def in_window(text: str) -> str:
    """A request with a number of tokens that a small model has room for."""
    return re.sub(r"(max_tokens\W+)\d+", r"\g<1>2", text)


def stands_on_its_own(text: str, arguments: list[str]) -> bool:
    """Whether a command needs processes of its own, which others run in this one without."""
    several = {"hydra/launcher=submitit_local", "hydra.launcher.n_jobs=2"}
    return launcher_of(text) is not None or not several.isdisjoint(arguments)


def run_apart(text: str, script: str, arguments: list[str], place: Path, output: Path) -> int:
    """The exit status of a command in processes of its own, and of two ranks where torchrun starts them.

    tests/distributed/test_torchrun.py has torchrun itself.
    """
    if launcher_of(text):
        ranks = Ranks(2, output, be_command, script, arguments, place)
        statuses = ranks.wait()
        for told, stream in ((ranks.out(), sys.stdout), (ranks.err(), sys.stderr)):
            print(*told, sep="", end="", file=stream)
        return max(map(abs, statuses))
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], cwd=place, env=environment_apart(), check=False
    )
    return done.returncode


def environment_of(text: str) -> dict[str, str]:
    """What a command sets before it."""
    given = re.match(r"(\w+=\S+ )*", text)
    assert given is not None
    return dict(word.split("=", 1) for word in given[0].split())


def assert_serves(text: str, arguments: list[str], folder: Path) -> None:
    """A server begins, and ends when it is told to."""
    with server_process(folder, *arguments, environment=environment_of(text)) as server:
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def assert_left(script: str, arguments: list[str], folder: Path) -> None:
    """A command of Hydra has left its results below ``folder``."""
    if "--help" in arguments:
        assert find_files(folder, "run.json") == []
        return
    results = [json.loads(path.read_text()) for path in find_files(folder, "result.json")]
    assert results
    key = "valid" if script == "train.py" else "all_pass"
    assert all(key in result for result in results)
    if "logger=[csv,tensorboard]" in arguments:
        assert len(find_files(folder, "metrics.csv")) == len(results)
        assert len(list(folder.rglob("tensorboard/events.*"))) == len(results)
    if "profile=true" in arguments:
        assert find_files(folder, "profile.json")
    if "-m" in arguments:
        (summary,) = find_files(folder, "summary.json")
        cells = json.loads(summary.read_text())
        assert {cell["status"] for cell in cells} <= {"trained", "measured"}
        assert len(cells) == len(results)
        assert (summary.parent / "summary.csv").exists()


# What a command became in small, so that none runs twice.
HAS_RUN: set[tuple[str, ...]] = set()


@pytest.mark.slow
@pytest.mark.parametrize("command", **named(RUN))
def test_a_command_runs(command, place, tmp_path, finished_run, monkeypatch, capfd):
    monkeypatch.chdir(place)
    keep_here(monkeypatch)
    monkeypatch.setattr(suite, "measure_isolated", measured_once)
    monkeypatch.setattr("muse.measure.matrix_products.PEAK_SIDE", {"cpu": 64})
    monkeypatch.setattr("muse.benchmarks.speedup.EVALUATED_TOKENS", 128)
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(default_entity="someone"))
    monkeypatch.setattr(workspaces.Workspace, "save", lambda workspace: workspace)
    monkeypatch.setattr(workspaces.Workspace, "url", "https://there")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    of_flows = ("stage=2", "benchmark=energy", "muse.convert")
    stage = "2" if any(words in command.text for words in of_flows) else "1"
    run = finished_run(stage) if "run folder" in command.text or "outputs/" in command.text else None
    _, script, arguments = split(filled_in(command.text, run=run, corpus=place / "corpus", place=place))
    if script == "muse.serve":
        export_run(finished_run(stage), place / "weights.safetensors")
        assert_serves(command.text, arguments, tmp_path)
        return
    composed = script in ("train.py", "bench.py")
    if composed:
        arguments = in_small(script, arguments, place)
    # In any order.
    became = (command.text.split()[0], script, *sorted(arguments))
    if became in HAS_RUN:
        return
    HAS_RUN.add(became)
    if composed and "--help" not in arguments:
        arguments.append(f"output_root={tmp_path}")
    if stands_on_its_own(command.text, arguments):
        status = run_apart(command.text, script, arguments, place, tmp_path / "ranks")
    else:
        status = run_here(script, arguments)
    printed = capfd.readouterr()
    assert status == 0, printed.err[-2000:]
    if composed:
        assert_left(script, arguments, tmp_path)
    elif script == "muse.export":
        assert (place / "weights.safetensors").stat().st_size > 0
    assert printed.out


@pytest.mark.slow
@pytest.mark.parametrize("block", **named(PYTHON))
def test_python_runs(block, tmp_path, finished_run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for weights in re.findall(r"\w+\.safetensors", block.text):
        export_run(finished_run("2"), tmp_path / weights)
    if SERVER not in block.text:
        exec(compile(block.text, block.where, "exec"), {"__name__": "__main__"})
        return
    with server_process(tmp_path, finished_run("2")) as server:
        text = in_window(block.text.replace(SERVER, server.address))
        exec(compile(text, block.where, "exec"), {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_is_answered(tmp_path, finished_run):
    with server_process(tmp_path, finished_run("1")) as server:
        for command in CURL:
            words = shlex.split(in_window(command.text.replace(SERVER, server.address)))
            answer = subprocess.run([*words, "--silent", "--fail"], capture_output=True, text=True)
            assert answer.returncode == 0, f"{command.where}: {answer.stdout}"
            assert answer.stdout


@pytest.mark.slow
def test_the_reference_has_every_name_and_no_warning(tmp_path):
    (command,) = [command for command in UNIQUE if command.text.startswith("python -m pdoc")]
    options = shlex.split(command.text)[1:]
    options[options.index("outputs/api")] = str(tmp_path)
    built = subprocess.run(
        [sys.executable, *options],
        cwd=ROOT,
        env=environment_apart(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    page = (tmp_path / "muse.html").read_text(encoding="utf-8")
    entries = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.DOTALL))
    assert list(entries) == muse.__all__
    for name, entry in entries.items():
        # What comes first is of the name itself, not of a member.
        own = entry.partition('class="classattr"')[0]
        assert re.search(r'<div class="docstring"><p>', own), f"{name} has no docstring"
    front = page.partition("<section id=")[0]
    assert all(f'href="#{name}"' in front for name in muse.__all__)
    for module in (option for option in options if re.fullmatch(r"muse\.\w+|kernels", option)):
        file = f"{module.replace('.', '/')}.html"
        assert f'href="{file}"' in front
        assert (tmp_path / file).exists()
    assert "<h6>Options:</h6>" in entries["StageConfig"]
    assert "Initialize internal Module state" not in page


def test_an_option_that_does_not_exist_is_found():
    command = Command("here:1", "python train.py train.stepz=3")
    with pytest.raises(Exception, match="stepz"):
        test_options_of_a_command_exist_and_are_allowed(command)


def test_commands_are_found():
    assert {Path(c.where.partition(":")[0]).name for c in ALL} >= {"README.md", "measurements.md"}
    assert any(c.text.startswith("python bench.py -m") for c in RUN)
    assert {block.where.partition(":")[0] for block in PYTHON} >= {"README.md", "distributed.md"}


@pytest.mark.parametrize("part", NOT_RUN)
def test_what_is_not_run_is_there(part):
    """A reason for a command that is gone would excuse the next one."""
    assert any(part in command.text for command in ALL)
