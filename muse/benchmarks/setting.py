"""What each benchmark is measured at where the options leave it open: the settings of the seeds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from muse.config import BenchConfig


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

# Of stage 3a; windows as long as the model's.
SPEEDUP = Setting(16)


def settle(config: BenchConfig, benchmark: str) -> BenchConfig:
    """Fill in what the options leave open, and give the flow of stage 2 the steps of the benchmark.

    ``energy`` follows the flow for its steps without changing what the model computes.
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
    stage = config.stage
    assert chosen.ode_steps is not None
    assert chosen.dt is not None
    assert chosen.integrator is not None
    if benchmark in of_stage_2 and benchmark != "energy":
        stage = dataclasses.replace(
            stage, ode_steps=chosen.ode_steps, dt=chosen.dt, integrator=chosen.integrator
        )
    elif benchmark == "energy":
        stage = dataclasses.replace(stage, integrator=chosen.integrator)
    return dataclasses.replace(config, stage=stage, benchmark=chosen)


def batch_shape(config: BenchConfig) -> tuple[int, int]:
    """Windows of a settled benchmark, and the tokens in each."""
    batch, length = config.benchmark.batch_size, config.benchmark.seq_len
    assert batch is not None
    assert length is not None
    return batch, length
