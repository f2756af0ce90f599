"""What a benchmark is measured at where the options leave it open: a batch, and in stages 2 and 3 a flow."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from muse.config import BenchConfig
from muse.errors import ConfigError
from muse.options import changed

DT = 0.1
FLOW = ("ode_steps", "dt", "integrator")


@dataclass(frozen=True)
class Workload:
    """A batch and a flow; those of the benchmarks are the seeds'.

    Attributes:
        batch_size: windows.
        seq_len: tokens in a window; None for ``model.seq_len``.
        ode_steps: steps of the flow.
        integrator: its scheme; None for that of the stage.
        of_model: whether the flow is the model's in the benchmark, in place of that of the stage.
    """

    batch_size: int = 2
    seq_len: int | None = None
    ode_steps: int = 10
    integrator: str | None = None
    of_model: bool = False


def settle(config: BenchConfig, workload: Workload) -> BenchConfig:
    """Fill in what the options leave open, and give the model the flow of the benchmark if it has one."""
    chosen = config.benchmark
    chosen = dataclasses.replace(
        chosen,
        batch_size=chosen.batch_size or workload.batch_size,
        seq_len=chosen.seq_len or workload.seq_len or config.model.seq_len,
        ode_steps=chosen.ode_steps or workload.ode_steps,
        dt=chosen.dt or DT,
        integrator=chosen.integrator or workload.integrator or config.stage.integrator,
    )
    flow = {option: getattr(chosen, option) for option in FLOW} if workload.of_model else {}
    return changed(dataclasses.replace(config, benchmark=chosen), stage=flow)


def beside_backpropagation(config: BenchConfig) -> Workload:
    """That of memory and speed, where flows are compared with full backpropagation at leapfrog's 11 forces.

    Schemes of higher order take more forces, all of which full backpropagation would keep, and the comparison
    would flatter.
    """
    return Workload(2, 2048, integrator="leapfrog", of_model=True) if config.stage.flowing else Workload()


def check_flow(config: BenchConfig, given: Collection[str], name: str, workload: Workload) -> None:
    """See that every option of the stage's flow that was ``given`` changes what the benchmark measures.

    Raises:
        ConfigError: one does not; names the one that does.
    """
    for option in FLOW if workload.of_model else ():
        # An integrator that the benchmark leaves open is the stage's.
        of_stage = option == "integrator" and workload.integrator is None
        if f"stage.{option}" in given and not of_stage and getattr(config.benchmark, option) is None:
            raise ConfigError(
                f"stage.{option} changes nothing in benchmark={name}, whose flow has "
                f"benchmark.{option}; give that one"
            )


def refuse_flow(config: BenchConfig, where: str, instead: str) -> None:
    """Refuse the options of a flow of the benchmark's own.

    Args:
        config: of the benchmark.
        where: they change nothing, and why.
        instead: what to do, with braces for the name of the option.

    Raises:
        ConfigError: one is given.
    """
    for option in FLOW:
        if getattr(config.benchmark, option) is not None:
            raise ConfigError(f"benchmark.{option} changes nothing in {where}; {instead.format(option)}")


def flow_of(config: BenchConfig) -> dict[str, Any]:
    """Steps and integrator of the flow of a settled benchmark, for its result; none without flows."""
    return {option: getattr(config.stage, option) for option in FLOW} if config.stage.flowing else {}


def batch_shape(config: BenchConfig) -> tuple[int, int]:
    """Windows of a settled benchmark, and the tokens in each."""
    batch, length = config.benchmark.batch_size, config.benchmark.seq_len
    assert batch is not None
    assert length is not None
    return batch, length
