"""What each benchmark is measured at where the options leave it open: the settings of the seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from muse.config import BenchConfig
from muse.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    """A batch, and the flow of stage 2.

    Attributes:
        batch_size: windows.
        seq_len: tokens in a window; None for ``model.seq_len``.
        ode_steps: steps of the flow.
        integrator: its scheme; None for that of the stage.
    """

    batch_size: int = 2
    seq_len: int | None = None
    ode_steps: int = 10
    integrator: str | None = None


DT = 0.1
# Memory and speed are compared with full backpropagation at leapfrog's eleven forces: schemes of higher order
# take more forces, all of which full backpropagation would keep, and the comparison would flatter.
OF_STAGE_2 = {
    "energy": Setting(4, 512, ode_steps=100),
    "vram": Setting(2, 2048, integrator="leapfrog"),
    "throughput": Setting(2, 2048, integrator="leapfrog"),
    "perplexity": Setting(4, 1024),
    "adjoint": Setting(2, 512),
}

FLOW = ("ode_steps", "dt", "integrator")

# Of stage 3a; windows as long as the model's.
SPEEDUP = Setting(16)


def settle(config: BenchConfig, benchmark: str) -> BenchConfig:
    """Fill in what the options leave open, and give the flow of stage 2 the steps of the benchmark.

    ``energy`` follows the flow for its steps without changing what the model computes, and the perplexity of
    a checkpoint is that of the flow it was trained with.
    """
    chosen = config.benchmark
    of_stage_2 = OF_STAGE_2 if config.stage.number == "2" else {}
    own = SPEEDUP if benchmark == "speedup" else of_stage_2.get(benchmark, Setting())
    chosen = dataclasses.replace(
        chosen,
        batch_size=chosen.batch_size or own.batch_size,
        seq_len=chosen.seq_len or own.seq_len or config.model.seq_len,
        ode_steps=chosen.ode_steps or own.ode_steps,
        dt=chosen.dt or DT,
        integrator=chosen.integrator or own.integrator or config.stage.integrator,
    )
    replaced = {option: getattr(chosen, option) for option in _replaced(config, benchmark)}
    stage = dataclasses.replace(config.stage, **replaced)
    return dataclasses.replace(config, stage=stage, benchmark=chosen)


def _replaced(config: BenchConfig, benchmark: str) -> tuple[str, ...]:
    """Options of the stage's flow that a benchmark has of its own."""
    trained = benchmark == "perplexity" and config.benchmark.checkpoint is not None
    own = benchmark in OF_STAGE_2 and benchmark != "energy" and not trained
    return FLOW if own and config.stage.number == "2" else ()


def check_flow(config: BenchConfig, given: Collection[str]) -> None:
    """See that every option of the flow that was given, by its name in ``given``, changes what is measured.

    Raises:
        ConfigError: one does not; names the one that does.
    """
    name = config.benchmark.name
    for benchmark in ("vram", "throughput", "perplexity") if name == "all" else (name,):
        for option in _replaced(config, benchmark):
            # An integrator that the benchmark leaves open is the stage's.
            of_stage = option == "integrator" and OF_STAGE_2[benchmark].integrator is None
            if f"stage.{option}" in given and not of_stage and getattr(config.benchmark, option) is None:
                raise ConfigError(
                    f"stage.{option} changes nothing in benchmark={benchmark}, whose flow has "
                    f"benchmark.{option}; give that one"
                )
    if name == "perplexity" and config.benchmark.checkpoint is not None:
        for option in FLOW:
            if getattr(config.benchmark, option) is not None:
                raise ConfigError(
                    f"benchmark.{option} changes nothing in the perplexity of a checkpoint, which has the "
                    "flow that it was trained with; leave it out"
                )


def check_updates(config: BenchConfig) -> None:
    """See that the trainings of ``speedup`` update the parameters at least once.

    Raises:
        ConfigError: there are fewer batches than one update takes.
    """
    needed = config.optim.accumulation
    measured = config.stage.number == "3a" and config.benchmark.name in ("speedup", "all")
    if measured and config.benchmark.train_steps < needed:
        raise ConfigError(
            f"benchmark.train_steps={config.benchmark.train_steps} is too small for benchmark=speedup; it "
            f"must be at least optim.accumulation={needed}, the batches of one update"
        )


def flow_of(config: BenchConfig) -> dict[str, Any]:
    """Steps and integrator of the flow of a settled benchmark, for its result; none but in stage 2."""
    return {option: getattr(config.stage, option) for option in FLOW} if config.stage.number == "2" else {}


def batch_shape(config: BenchConfig) -> tuple[int, int]:
    """Windows of a settled benchmark, and the tokens in each."""
    batch, length = config.benchmark.batch_size, config.benchmark.seq_len
    assert batch is not None
    assert length is not None
    return batch, length
