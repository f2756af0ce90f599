from __future__ import annotations

import copy
import os
from dataclasses import asdict, fields
from itertools import product

import pytest
import torch
from support.acceleration import batch, build

from muse.acceleration import Execution, KernelOptimizer, kernel_optimizer
from muse.acceleration.kernel_optimizer import COMPILE_SECONDS, NOISE, Decision
from muse.config import OptimConfig

OPTIONS = OptimConfig()
CANDIDATES = ["attention", "optimizer", "threads", "products", "loss", "compile"]
BY_LEVEL = {0: [], 1: [*CANDIDATES[:3], "loss"], 2: CANDIDATES[:5], 3: CANDIDATES}


def field(decision):
    return decision.name.partition("=")[0]


def choose(level, model=None, batches=10, **options):
    optimizer = KernelOptimizer(level, **options)
    execution, decisions = optimizer.choose(model or build(), OPTIONS, *batch(2, 9), batches)
    return optimizer, execution, decisions


@pytest.fixture(autouse=True)
def two_processors(monkeypatch, threads):
    """One more than PyTorch uses, so that the number of threads is always a candidate.

    What is chosen is kept and read, but nothing runs on it: threads would wait for a processor that is busy.
    """
    chosen, processors = [threads], set(range(threads + 1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: chosen.__setitem__(0, count))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: processors, raising=False)


@pytest.fixture
def pass_through(monkeypatch):
    """A compiler that has nothing to do, and a training long enough for it."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(kernel_optimizer, "COMPILE_SECONDS", -1.0)


@pytest.fixture
def timings(monkeypatch):
    """Gives what is timed, pair by pair, fixed times, and runs each call once."""

    def set_to(pairs):
        pairs = iter(pairs)

        def in_turns(_, calls, __):
            for call in calls:
                call()
            return list(next(pairs))

        monkeypatch.setattr(KernelOptimizer, "_in_turns", in_turns)

    return set_to


@pytest.fixture
def costs(monkeypatch, threads):
    """Times that follow from the executions alone, and the pairs of them that were compared.

    Set to how many times as fast each candidate makes whatever is timed.
    """
    factors, pairs = dict.fromkeys(CANDIDATES, 1.0), []

    def prepare(execution):
        def call():
            pass

        call.execution = execution
        return call

    def cost(call):
        if not hasattr(call, "execution"):
            return 0.0
        seconds = 1.0
        for name, value in asdict(call.execution).items():
            changed = value > threads if name == "threads" else value
            seconds /= factors[name] if changed else 1
        return seconds

    def in_turns(_, calls, __):
        pairs.append([getattr(call, "execution", None) for call in calls])
        return [cost(call) for call in calls]

    for name in ("_block_call", "_loss_call", "_optimizer_call"):
        monkeypatch.setattr(kernel_optimizer, name, lambda *_: prepare)
    monkeypatch.setattr(KernelOptimizer, "_in_turns", in_turns)
    return factors, pairs


# ---- What is tried and kept


@pytest.mark.parametrize("level", BY_LEVEL)
@pytest.mark.usefixtures("pass_through")
def test_what_each_level_tries(level, timings):
    timings([(1.0, 0.5)] * 7)
    _, execution, decisions = choose(level)
    assert [field(decision) for decision in decisions] == BY_LEVEL[level]
    plain = Execution(threads=torch.get_num_threads())
    changed = [f.name for f in fields(Execution) if getattr(execution, f.name) != getattr(plain, f.name)]
    assert changed == [name for name in (f.name for f in fields(Execution)) if name in BY_LEVEL[level]]


def test_level_0_runs_nothing(monkeypatch):
    def run(*_):
        raise AssertionError("something was timed")

    monkeypatch.setattr(KernelOptimizer, "_in_turns", run)
    _, execution, decisions = choose(0)
    assert execution == Execution(threads=torch.get_num_threads())
    assert decisions == []


@pytest.mark.usefixtures("pass_through")
def test_what_is_faster_is_kept_and_nothing_else(costs, threads):
    factors, pairs = costs
    for kept in product([False, True], repeat=len(CANDIDATES)):
        pairs.clear()
        factors.update(zip(CANDIDATES, (1.5 if keep else 0.9 for keep in kept), strict=True))
        _, execution, decisions = choose(3)
        wanted = dict(zip(CANDIDATES, kept, strict=True))
        assert execution == Execution(**wanted | {"threads": threads + wanted["threads"]})
        assert {field(decision): decision.kept for decision in decisions} == wanted
        for decision in decisions:
            factor = factors[field(decision)]
            assert decision.before_ms / decision.after_ms == pytest.approx(factor)
            assert f"{factor:.2f} times as fast" in decision.why
        # Each candidate is timed beside the best so far, from which it differs in nothing else.
        current, compared = Execution(threads=threads), [pair for pair in pairs if pair[1] is not None]
        for name, (before, after) in zip(CANDIDATES, compared, strict=True):
            assert before == current
            assert asdict(after) == asdict(before) | {name: threads + 1 if name == "threads" else True}
            current = after if wanted[name] else current


@pytest.mark.parametrize(("after", "kept"), [(1 - 1.1 * NOISE, True), (1 - 0.9 * NOISE, False), (1.0, False)])
@pytest.mark.usefixtures("pass_through")
def test_what_is_not_faster_than_noise_is_left_off(after, kept, timings):
    # The last pair but one bounds what compilation can save.
    timings([(1.0, after)] * 5 + [(1.0, 0.0), (1.0, after)])
    _, _, decisions = choose(3)
    assert [decision.kept for decision in decisions] == 6 * [kept]
    assert {(decision.before_ms, decision.after_ms) for decision in decisions} == {(1e3, after * 1e3)}
    assert all(decision.why.startswith("kept" if kept else "left off") for decision in decisions)


@pytest.mark.parametrize("reason", ["all processors are in use", "the user has chosen"])
def test_threads_that_are_not_tried(reason, monkeypatch, timings, threads):
    if reason == "the user has chosen":
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    else:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(threads)))
    timings([(1.0, 0.5)] * 4)
    _, execution, decisions = choose(2)
    assert [decision.name for decision in decisions] == ["attention", "optimizer", "products", "loss"]
    assert execution.threads == threads


def test_timing_takes_turns_and_the_median_and_leaves_the_first_round_out(timed_calls):
    calls, order = timed_calls({"a": [100.0, 3.0, 1.0, 50.0], "b": [200.0, 2.0, 80.0, 7.0]})
    found = KernelOptimizer(repeats=3)._in_turns(calls, torch.device("cpu"))
    assert order == ["a", "b"] * 4
    assert found == [3.0, 7.0]


# ---- What is not changed


@pytest.mark.parametrize(("level", "training"), [(1, False), (3, True)])
@pytest.mark.usefixtures("pass_through")
def test_the_model_and_the_number_of_threads_are_not_changed(level, training, timings, threads):
    timings([(1.0, 0.5)] * 7)
    model, random_state = build().train(training), torch.get_rng_state()
    model.loss(*batch()).backward()
    before = copy.deepcopy(model)
    gradients = [p.grad.clone() for p in model.parameters()]
    torch.set_rng_state(random_state)
    optimizer = KernelOptimizer(level)
    tokens, targets = (torch.arange(18).view(2, 9) + i for i in range(2))
    optimizer.choose(model, OPTIONS, tokens, targets, 10)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training is training
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert torch.equal(parameter, before.get_parameter(name))
        assert torch.equal(parameter.grad, gradient)
    for block in model.blocks:
        assert not block.attention.fused
        assert block._compiled_call_impl is None
    assert torch.equal(tokens, torch.arange(18).view(2, 9))


# ---- Compilation


def failing(message):
    def fail(*_, **__):
        raise RuntimeError(message)

    return fail


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("no compiler found", "no compiler found"),
        ("\n\n  \nInvalidCxxCompiler: gcc\nand ten pages\n", "InvalidCxxCompiler: gcc"),
        ("", "RuntimeError"),
        ("x" * 5000, "x" * 100),
    ],
    ids=["one line", "many lines", "no message", "a long line"],
)
def test_a_compiler_that_fails_is_left_alone(message, reason, monkeypatch, timings):
    monkeypatch.setattr(kernel_optimizer, "COMPILE_SECONDS", -1.0)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: failing(message))
    timings([(1.0, 0.5)] * 6)
    model = build()
    optimizer, execution, decisions = choose(3, model)
    assert execution.attention
    assert not execution.compile
    last = decisions[-1]
    assert (last.name, last.kept, last.before_ms, last.after_ms) == ("compile", False, 1e3, None)
    assert last.why.startswith("left off: cannot compile here: ")
    assert reason in last.why
    assert "\n" not in last.why
    assert len(last.why) < 200
    assert 0 <= optimizer.compile_seconds <= optimizer.seconds
    # The training goes on with what was found.
    execution.apply(model)
    assert execution.training_loss(model, *batch()).isfinite()


def test_a_machine_without_a_compiler_is_left_uncompiled(monkeypatch, timings):
    """torch.compile itself refuses to work, as it does on a Python that it does not support."""
    monkeypatch.setattr(kernel_optimizer, "COMPILE_SECONDS", -1.0)
    monkeypatch.setattr(torch, "compile", failing("not supported on this Python"))
    timings([(1.0, 0.5)] * 6)
    _, execution, decisions = choose(3)
    assert not execution.compile
    assert decisions[-1].why == "left off: cannot compile here: not supported on this Python"


@pytest.mark.parametrize("batches", [1, 1000, 3999])
def test_compilation_is_not_tried_where_it_cannot_pay(batches, monkeypatch, timings):
    monkeypatch.setattr(torch, "compile", failing("something was compiled"))
    # Two blocks of 15 ms, of which products take 10 ms, and half of the rest may be saved: 5 ms a batch.
    timings([(1.0, 0.5)] * 5 + [(0.015, 0.010)])
    assert batches * 0.005 < COMPILE_SECONDS
    optimizer, execution, decisions = choose(3, batches=batches)
    assert not execution.compile
    assert optimizer.compile_seconds == 0
    why = f"not tried: it may save {batches / 200:.0f} s and costs about {COMPILE_SECONDS:.0f} s"
    assert decisions[-1] == Decision("compile", False, 15.0, None, why)


def test_compilation_is_tried_where_it_can_pay(compiler, timings):
    timings([(1.0, 0.5)] * 5 + [(0.015, 0.010), (0.015, 0.012)])
    _, execution, decisions = choose(3, batches=4001)
    assert execution.compile
    assert compiler.calls > 0
    assert (decisions[-1].before_ms, decisions[-1].after_ms) == (15.0, 12.0)
    assert f"{2 * 4001 * 0.003:.0f} s saved" in decisions[-1].why


# ---- On this machine


@pytest.mark.parametrize("options", [{}, {"tied": True, "dropout": 0.2, "layers": 1}], ids=str)
def test_a_real_choice_can_be_trained_with(options, threads):
    model, data = build(**options), batch()
    optimizer = KernelOptimizer(repeats=2)
    execution, decisions = optimizer.choose(model, OPTIONS, *data, 5)
    assert [field(decision) for decision in decisions] == CANDIDATES
    for decision in decisions:
        value = getattr(execution, field(decision))
        assert (value == threads + 1 if field(decision) == "threads" else value) is decision.kept
        assert decision.before_ms > 0
        assert (decision.after_ms is None) is decision.why.startswith("not tried")
        if decision.after_ms is not None:
            assert decision.kept is (decision.after_ms < (1 - NOISE) * decision.before_ms)
    assert execution.threads in (threads, threads + 1)
    assert torch.get_num_threads() == threads
    assert optimizer.seconds > 0
    before = copy.deepcopy(model)
    execution.apply(model)
    update = execution.build_optimizer(model, OPTIONS)
    execution.training_loss(model, *data).backward()
    update.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.embedding.weight, before.embedding.weight)
