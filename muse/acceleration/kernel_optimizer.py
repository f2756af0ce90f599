"""Which way to execute a training step is the fastest on this machine: measured, part by part."""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muse.acceleration.execution import Execution
from muse.config import OptimConfig
from muse.measure.timing import times_in_turns
from muse.models import LanguageModel

# Two equal ways timed in turns differ by up to so much.
NOISE = 0.03
# What compiling a block, forward and backward, took on two CPU cores.
COMPILE_SECONDS = 20.0
# Of the time outside matrix products, what compiled code may be hoped to save.
COMPILE_SHARE = 0.5


@dataclass
class Decision:
    """What was found about one way to execute a part of the step.

    Attributes:
        name: the field of Execution.
        kept: whether it is used.
        before_ms: median time of the part without it; None where it was not timed.
        after_ms: median time with it.
        why: one sentence.
    """

    name: str
    kept: bool
    before_ms: float | None
    after_ms: float | None
    why: str


class KernelOptimizer:
    """Finds the execution of a stage-3a model's training step; the maths stays what it is.

    Each candidate is timed beside what it would replace, in turns, on the real shapes: attention, products
    and threads in one block forward and backward, the loss with the head, the optimiser on one block's
    parameters. What is not at least 3 % faster is left off. The model is not changed.

    Args:
        level: 0 changes nothing; 1 tries fused attention, loss and optimiser, and the number of threads;
            2 bf16 products, too; 3 compilation, too.
        repeats: timed calls of each of two ways, after one untimed.
    """

    def __init__(self, level: int = 3, repeats: int = 3) -> None:
        self.level = level
        self.repeats = repeats
        self.seconds = self.compile_seconds = 0.0

    def choose(
        self, model: LanguageModel, options: OptimConfig, tokens: Tensor, targets: Tensor, batches: int
    ) -> tuple[Execution, list[Decision]]:
        """The fastest execution found, and what was found about every candidate.

        Args:
            model: of stage 3a.
            options: of the optimiser.
            tokens: (B, S), a batch of the training.
            targets: (B, S).
            batches: how many the training has; compilation must pay within them.
        """
        began = time.perf_counter()
        threads = torch.get_num_threads()
        execution, decisions = Execution(threads=threads), list[Decision]()
        model = copy.deepcopy(model)
        candidates: list[tuple[str, Any, Callable[[Execution], Callable[[], object]]]] = []
        block = _block_call(model, tokens)
        if self.level >= 1:
            candidates += [("attention", True, block), ("optimizer", True, _optimizer_call(model, options))]
            candidates += [("threads", count, block) for count in _other_threads(tokens.device)]
        if self.level >= 2:
            candidates.append(("products", True, block))
        if self.level >= 1:
            # Which loss is faster depends on the products.
            candidates.append(("loss", True, _loss_call(model, tokens, targets)))
        for name, value, call in candidates:
            changed = dataclasses.replace(execution, **{name: value})
            before, after = self._in_turns([call(execution), call(changed)], tokens.device)
            kept = after < (1 - NOISE) * before
            what = f"{name}={value}" if name == "threads" else name
            why = f"{'kept: ' if kept else 'left off: '}{before / after:.2f} times as fast"
            decisions.append(Decision(what, kept, before * 1e3, after * 1e3, why))
            if kept:
                execution = changed
            torch.set_num_threads(execution.threads)
        if self.level >= 3:
            execution = self._try_compilation(model, execution, block, tokens, batches, decisions)
        # The caller applies what was found.
        torch.set_num_threads(threads)
        self.seconds = time.perf_counter() - began
        return execution, decisions

    def _in_turns(self, calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
        """Median seconds of each call, after one untimed round."""
        return [median(own) for own in times_in_turns(calls, 1, self.repeats, device)]

    def _try_compilation(
        self,
        model: LanguageModel,
        execution: Execution,
        block: Callable[[Execution], Callable[[], object]],
        tokens: Tensor,
        batches: int,
        decisions: list[Decision],
    ) -> Execution:
        """Compile one block, unless what it may save is less than compiling costs."""
        whole, products = self._in_turns(
            [block(execution), _products_call(model, tokens, execution)], tokens.device
        )
        blocks = len(model.blocks) * batches
        most = COMPILE_SHARE * (whole - products) * blocks
        if most < COMPILE_SECONDS:
            why = f"not tried: it may save {most:.0f} s and costs about {COMPILE_SECONDS:.0f} s"
            decisions.append(Decision("compile", False, whole * 1e3, None, why))
            return execution
        compiled = dataclasses.replace(execution, compile=True)
        start = time.perf_counter()
        try:
            call = block(compiled)
            call()
        except Exception as error:  # noqa: BLE001 - whatever the compiler lacks, training goes on without it
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            decisions.append(
                Decision(
                    "compile", False, whole * 1e3, None, f"left off: cannot compile here: {reason[:120]}"
                )
            )
            return execution
        finally:
            self.compile_seconds = time.perf_counter() - start
        before, after = self._in_turns([block(execution), call], tokens.device)
        saved = (before - after) * blocks
        kept = after < (1 - NOISE) * before and saved > self.compile_seconds
        why = (
            f"{'kept' if kept else 'left off'}: {before / after:.2f} times as fast, "
            f"{self.compile_seconds:.0f} s to compile, {saved:.0f} s saved in the run"
        )
        decisions.append(Decision("compile", kept, before * 1e3, after * 1e3, why))
        return compiled if kept else execution


def _other_threads(device: torch.device) -> list[int]:
    """All logical processors, where PyTorch by itself takes fewer: its default is the physical ones."""
    if "OMP_NUM_THREADS" in os.environ:
        return []
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [available] if device.type == "cpu" and available != torch.get_num_threads() else []


def _block_call(model: LanguageModel, tokens: Tensor) -> Callable[[Execution], Callable[[], object]]:
    """A block forward and backward on states of the real shape."""
    with torch.no_grad():
        states = model.embedding(tokens)

    def prepare(execution: Execution) -> Callable[[], object]:
        block = copy.deepcopy(model.blocks[0])
        execution.apply_to_block(block)
        x = states.clone().requires_grad_()

        def call() -> None:
            torch.set_num_threads(execution.threads)
            with execution.autocast(x.device):
                out = block(x)
            out.sum().backward()

        return call

    return prepare


def _products_call(model: LanguageModel, tokens: Tensor, execution: Execution) -> Callable[[], object]:
    """The matrix products of a block's maps, forward and backward, as bare calls."""
    dtype = torch.bfloat16 if execution.products else torch.float32
    weights = [
        m.weight.detach().to(dtype) for m in model.blocks[0].modules() if isinstance(m, torch.nn.Linear)
    ]
    inputs = [torch.ones(tokens.numel(), w.shape[1], dtype=dtype, device=tokens.device) for w in weights]

    def call() -> None:
        for weight, x in zip(weights, inputs, strict=True):
            out = F.linear(x, weight)
            out @ weight
            out.t() @ x

    return call


def _loss_call(
    model: LanguageModel, tokens: Tensor, targets: Tensor
) -> Callable[[Execution], Callable[[], object]]:
    """Head and loss, forward and backward, on features of the real shape."""
    with torch.no_grad():
        features = model.norm(model.embedding(tokens))

    def prepare(execution: Execution) -> Callable[[], object]:
        x = features.clone().requires_grad_()

        def call() -> None:
            with execution.autocast(x.device):
                loss = execution.head_loss(model, x, targets)
            loss.backward()

        return call

    return prepare


def _optimizer_call(
    model: LanguageModel, options: OptimConfig
) -> Callable[[Execution], Callable[[], object]]:
    """An update of the parameters of one block."""

    def prepare(execution: Execution) -> Callable[[], object]:
        block = copy.deepcopy(model.blocks[0])
        for parameter in block.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        return execution.build_optimizer(block, options).step

    return prepare
