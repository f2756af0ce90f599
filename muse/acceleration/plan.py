"""What the stack of stage 3a does on this machine: measured once, and kept for reruns."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from muse.acceleration.execution import Execution
from muse.acceleration.kernel_optimizer import Decision, KernelOptimizer
from muse.acceleration.training import StackTraining, batch_of
from muse.compiler import find_compiler
from muse.config import BenchConfig
from muse.data import TokenData
from muse.files import write_json
from muse.hardware import describe, restored_threads
from muse.measure.peak_memory import peak_memory
from muse.models import LanguageModel
from muse.models.language_model import model_device
from muse.runs.provenance import source_hash

MB = 1e6


@dataclass
class Plan:
    """What the stack does in a training on this machine.

    Attributes:
        execution: the choices of KernelOptimizer.
        compress: whether SemanticCompressor is used.
        decisions: what was found about each candidate.
        seconds: what finding out took, compilation included.
        compile_seconds: of which compilation.
    """

    execution: Execution = field(default_factory=Execution)
    compress: bool = False
    decisions: list[Decision] = field(default_factory=list)
    seconds: float = 0.0
    compile_seconds: float = 0.0


@restored_threads()
def find_plan(config: BenchConfig, data: TokenData, model: LanguageModel) -> Plan:
    """What the stack of ``config`` does here, found by measuring or by an earlier run of the same setting.

    Measured choices differ by chance where two ways are equally fast, and with them the last bits of the
    losses. So that a rerun has the losses of the run, choices are kept in ``data.cache``;
    ``benchmark.rerun=true`` measures again. The time that measuring took counts in every run.
    """
    path = Path(config.data.cache) / "plans" / f"{_digest(config, model)}.json"
    if not config.benchmark.rerun:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            return Plan(
                **kept
                | {
                    "execution": Execution(**kept["execution"]),
                    "decisions": [Decision(**decision) for decision in kept["decisions"]],
                }
            )
        except (OSError, ValueError, TypeError, KeyError):
            pass
    plan = _measured_plan(config, data, model)
    write_json(path, dataclasses.asdict(plan))
    return plan


def _digest(config: BenchConfig, model: LanguageModel) -> str:
    """Hash of all that a choice may depend on."""
    device = model_device(model)
    machine = (
        platform.machine(),
        describe(device),
        os.cpu_count(),
        torch.get_num_threads(),
        torch.__version__,
        # A plan that compiles is of no use without a compiler, nor one that had none where there is one.
        find_compiler(device) if config.stack.level >= 3 else None,
    )
    parts = (config.stage, config.model, config.optim, config.stack, config.benchmark.train_steps)
    options = [part if isinstance(part, int) else dataclasses.asdict(part) for part in parts]
    batch = config.benchmark.batch_size, config.benchmark.seq_len
    text = json.dumps([machine, options, batch, config.data.name, source_hash()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _measured_plan(config: BenchConfig, data: TokenData, model: LanguageModel) -> Plan:
    stack = config.stack
    forced = stack.compression == "on"
    # Compiled code decides by itself what it saves, so compression and compilation exclude each other.
    optimizer = KernelOptimizer(min(stack.level, 2) if forced else stack.level)
    device = model_device(model)
    tokens, targets = batch_of(config, data, 0)
    execution, decisions = optimizer.choose(
        model, config.optim, tokens.to(device), targets.to(device), config.benchmark.train_steps
    )
    seconds = optimizer.seconds
    if forced:
        decisions.append(Decision("compression", True, None, None, "on by request"))
    if stack.compression == "auto":
        began = time.perf_counter()
        counted = countable(execution, device)
        peak = memory_of_update(config, data, copy.deepcopy(model), Plan(counted)) / MB
        forced = peak > stack.memory_mb
        verdict = "kept" if forced else "left off, it only costs time"
        why = f"{verdict}: a step takes {peak:.0f} MB without it, stack.memory_mb={stack.memory_mb:.0f}"
        if counted != execution:
            why += "; counted without compilation"
        if forced and execution.compile:
            execution = dataclasses.replace(execution, compile=False)
            why += "; compilation is left off for it"
        decisions.append(Decision("compression", forced, None, None, why))
        seconds += time.perf_counter() - began
    return Plan(execution, forced, decisions, seconds, optimizer.compile_seconds)


def countable(execution: Execution, device: torch.device) -> Execution:
    """As much of an execution as can be counted: on a CPU nothing sees into compiled code."""
    return execution if device.type == "cuda" else dataclasses.replace(execution, compile=False)


def memory_of_update(config: BenchConfig, data: TokenData, model: LanguageModel, plan: Plan) -> float:
    """Bytes at the peak of the second update: parameters, gradients, optimiser, activations.

    An update from many batches needs no more than one from two, whose gradients are there while the second
    runs forward.
    """
    device = model_device(model)
    batches = min(2, config.optim.accumulation)
    training = StackTraining(config, data, model, plan.execution, plan.compress)
    training.take(range(batches))
    model.zero_grad(set_to_none=True)
    with peak_memory(device, model, training.optimizer.state_tensors()) as meter:
        training.take(range(batches, 2 * batches))
        return float(meter.peak())
