"""What a card is asked, in what order, and what the answers are held against."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import muse
from muse.files import find_files, read_json
from muse.measure.timing import quantile
from muse.runs.folder import RESULT_FILE
from muse.training.profile import FILE as PROFILE_FILE

ROOT = Path(muse.__file__).parents[1]
FIGURES_FILE, TESTS_FILE = "figures.json", "tests.xml"

# What was found by part.
Figures = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Part:
    """One question: a process of its own.

    Attributes:
        name: of its folder.
        command: of Python; ``{folder}`` stands for that folder.
        seconds: that it may take, of eight minutes.
        read: of its folder, what it found.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    read: Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class Goal:
    """What a figure is held against.

    Attributes:
        title: of the table's row.
        target: of the figure.
        at_least: whether more is better.
        figure: of all that was found; raises KeyError or TypeError where it is missing.
    """

    title: str
    target: float
    at_least: bool
    figure: Callable[[Figures], float | None]


@dataclass(frozen=True)
class Sizes:
    """What the parts are asked at: options of bench.py and train.py.

    Attributes:
        model: of every part.
        kernels: of kernels beside what one would use instead.
        long: of attention alone.
        seeds: of the product and the flow of the seeds.
        step: of stage 2's step by gradient mode.
        training: of a profiled training.
        memory: of peak memory, twice.
    """

    model: str
    kernels: str
    long: str
    seeds: str
    step: str
    training: str
    memory: tuple[str, str]


FULL = Sizes(
    model="seed",
    kernels="benchmark.batch_size=2 benchmark.seq_len=4096 benchmark.hidden=2048 benchmark.ode_steps=10",
    long="benchmark.batch_size=1 benchmark.seq_len=8192 benchmark.head_dim=128",
    seeds="benchmark.batch_size=16 benchmark.seq_len=512 benchmark.width=512 benchmark.hidden=512 "
    "benchmark.ode_steps=100",
    step="benchmark.batch_size=2 benchmark.seq_len=2048 benchmark.repeats=3",
    training="train.batch_size=8 model.seq_len=1024",
    memory=(
        "benchmark.batch_size=2 benchmark.seq_len=2048",
        "benchmark.batch_size=1 benchmark.seq_len=8192",
    ),
)
_TOY = "benchmark.batch_size=2 benchmark.seq_len=16"
QUICK = Sizes(
    model="tiny",
    kernels=f"{_TOY} benchmark.ode_steps=2 benchmark.compile=false benchmark.repeats=2",
    long=f"{_TOY} benchmark.head_dim=8 benchmark.repeats=2",
    seeds=f"{_TOY} benchmark.width=32 benchmark.hidden=32 benchmark.ode_steps=2 benchmark.repeats=2",
    step=f"{_TOY} benchmark.repeats=1",
    training="train.batch_size=2 model.seq_len=16",
    memory=(_TOY, _TOY),
)


def parts_of(device: str, sizes: Sizes) -> list[Part]:
    """The parts in their order, on ``cuda`` or ``cpu``."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    common = f"hardware={device} data=synthetic logger=none output_root={{folder}} model={sizes.model}"
    kernels = f"benchmark=kernels benchmark.dtypes=[{dtype}]"
    # Of this there is nothing else.
    halves = "benchmark=kernels benchmark.dtypes=[bfloat16]"

    def bench(name: str, seconds: float, options: str) -> Part:
        command = (str(ROOT / "bench.py"), *common.split(), *options.split())
        return Part(name, command, seconds, read_benchmark)

    def family(name: str, seconds: float) -> Part:
        return bench(f"kernels_{name}", seconds, f"{kernels} {sizes.kernels} benchmark.families=[{name}]")

    def training(stage: str, seconds: float) -> Part:
        options = f"stage={stage} {sizes.training} profile=true train.steps=12 train.eval_every=0"
        # Random tokens are for benchmarks alone, and a text that is short is soon evaluated.
        text = common.replace("synthetic", f"text data.path={ROOT / 'docs'} data.cache={{folder}}/../cache")
        command = (str(ROOT / "train.py"), *text.split(), *options.split())
        return Part(f"training_{stage}", command, seconds, read_training)

    tests = ROOT / "tests" / "kernels"
    chosen = ["-m", "gpu", "-n", "8", str(tests)]
    if device == "cpu":
        chosen = ["-n", "1", str(tests / "test_complex_rotary.py")]
    pytest = ("-m", "pytest", "-q", *chosen, f"--junitxml={{folder}}/{TESTS_FILE}")
    machine = ("-m", "muse.card.machine", f"{{folder}}/{FIGURES_FILE}")
    return [
        Part("machine", machine, 30, read_machine),
        Part("tests", pytest, 90, read_tests),
        bench("exactness", 45, f"stage=2 benchmark=throughput {sizes.step}"),
        family("attention", 45),
        family("linear", 30),
        family("pointwise", 30),
        family("symplectic", 45),
        family("scan", 20),
        # Of as many features as the kernels are pinned for.
        bench("kernels_loss", 20, f"{kernels} {sizes.kernels} benchmark.width=128 benchmark.families=[loss]"),
        bench("kernels_adamw", 20, f"{halves} {sizes.kernels} benchmark.families=[adamw]"),
        bench(
            "kernels_long",
            25,
            f"{kernels} {sizes.long} benchmark.families=[attention] benchmark.compile=false",
        ),
        bench(
            "kernels_seeds",
            30,
            f"benchmark=kernels {sizes.seeds} benchmark.families=[linear,symplectic] "
            "benchmark.dtypes=[float32] benchmark.compile=false",
        ),
        training("0", 20),
        training("1", 20),
        training("2", 25),
        *(
            bench(f"memory_{number}", 40, f"stage=2 benchmark=vram {options}")
            for number, options in enumerate(sizes.memory, 1)
        ),
    ]


def command_of(part: Part, folder: Path) -> list[str]:
    """What starts a part whose files go into a folder."""
    return [sys.executable, *(word.replace("{folder}", str(folder)) for word in part.command)]


def read_machine(folder: Path) -> dict[str, Any]:
    """Of ``muse.card.machine``."""
    return dict(read_json(folder / FIGURES_FILE))


def read_benchmark(folder: Path) -> dict[str, Any]:
    """The values of a benchmark, and of kernels each case."""
    (file,) = find_files(folder, RESULT_FILE)[-1:]
    result = read_json(file)
    return {
        **result["values"],
        "failures": result["failures"],
        "criteria": result["criteria"],
        "kernels": result["details"].get("kernels", {}),
    }


def read_training(folder: Path) -> dict[str, Any]:
    """The steps of a profiled training."""
    (file,) = find_files(folder, PROFILE_FILE)[-1:]
    profile = read_json(file)
    options = read_json(file.parent / "run.json")
    options = options.get("config", options)
    step = quantile(profile["step_seconds"], 0.5)
    tokens = options["train"]["batch_size"] * options["model"]["seq_len"]
    used = profile["utilisation"]
    return {
        "step_ms": 1e3 * step,
        "tokens_per_second": tokens / step,
        "mfu_of_measured_peak": used["mfu_of_measured_peak"],
        "mfu_of_data_sheet": used["mfu_of_data_sheet"],
        "device_idle": profile["device_idle"],
        "operations": {one["name"]: one["share"] for one in profile["operations"]},
    }


def read_tests(folder: Path) -> dict[str, Any]:
    """How many tests passed, and which did not."""
    cases = list(ElementTree.parse(folder / TESTS_FILE).getroot().iter("testcase"))
    failed = [case.get("name") for case in cases if {"failure", "error"} & {child.tag for child in case}]
    skipped = sum("skipped" in {child.tag for child in case} for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": failed}


def _ratio(part: str, case: str, other: str, when: str = "training") -> Callable[[Figures], float | None]:
    def figure(found: Figures) -> float | None:
        ratio: float | None = found[part]["kernels"][case]["alternatives"][other][f"{when}_ratio"]
        return ratio

    return figure


def _share(part: str, case: str, when: str) -> Callable[[Figures], float | None]:
    def figure(found: Figures) -> float | None:
        share: float | None = found[part]["kernels"][case][f"{when}_share_of_peak"]
        return share

    return figure


def _value(part: str, key: str) -> Callable[[Figures], float | None]:
    def figure(found: Figures) -> float | None:
        value: float | None = found[part][key]
        return value

    return figure


HALF, SINGLE = "bfloat16", "float32"
GOALS = (
    Goal("failed kernel tests", 0, False, lambda found: len(found["tests"]["failed"])),
    Goal("`real` attention against SDPA on concatenated planes", 1.0, True,
         _ratio("kernels_attention", f"attention real, {HALF}", "SDPA")),
    Goal("`phase` attention, head 128, length 8192: share of the measured matrix peak, forward", 0.55, True,
         _share("kernels_long", f"attention phase, {HALF}", "forward")),
    Goal("the same, backward", 0.40, True, _share("kernels_long", f"attention phase, {HALF}", "backward")),
    Goal("complex linear against a real product of the same shape", 1.0, True,
         _ratio("kernels_linear", f"linear, {HALF}", "bare")),
    Goal("the same with epilogue", 1.15, True,
         _ratio("kernels_linear", f"linear + split_gelu, {HALF}", "bare")),
    Goal("complex product of 16 x 512^3 against torch's complex64", 1.25, True,
         _ratio("kernels_seeds", f"linear, {SINGLE}", "complex64")),
    Goal("flow of 16 x 512 tokens over 100 steps against the same maths in plain code", 1.20, True,
         _ratio("kernels_seeds", f"symplectic flow, {SINGLE}", "fixed point")),
    Goal("flow against torch.compile of the eager flow", 2.0, True,
         _ratio("kernels_symplectic", f"symplectic flow, {HALF}", "compiled")),
    Goal("loss of a head with 256 features, its gradients included, against chunks of logits", 1.0, True,
         _ratio("kernels_loss", f"head loss, {HALF}", "chunks")),
    Goal("AdamW with rounding against torch's fused AdamW in float32", 1.5, True,
         _ratio("kernels_adamw", f"adamw, {HALF}", "fused float32")),
    Goal("stage 1, tokens a second", 1e6, True, _value("training_1", "tokens_per_second")),
    Goal("stage 1, MFU of the data sheet", 0.40, True, _value("training_1", "mfu_of_data_sheet")),
    Goal("stage 2, exact against full backpropagation, time", 1.3, False,
         _value("exactness", "step_ratio_backprop")),
    *(Goal(f"stage {stage}, device idle in a step", 0.03, False, _value(f"training_{stage}", "device_idle"))
      for stage in "012"),
)  # fmt: skip
