from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from kernels import complex_attention, complex_linear, launch
from kernels.launch import (
    INTERPRETER,
    TARGETS,
    Pinned,
    compiling_for,
    fastest,
    target_name,
    use_eager,
    use_triton,
)
from kernels.resources import operations
from kernels.triton_import import triton


@pytest.fixture
def pinned():
    widths = {"16": {"BLOCK": 1}, "64": {"BLOCK": 2}}
    table = {target.name: {"16": widths, "32": {"64": {"BLOCK": 3}}} for target in TARGETS}
    return Pinned("operation", {"forward": table})


@pytest.mark.parametrize(("width", "block"), [(1, 1), (16, 1), (17, 2), (64, 2)])
def test_the_smallest_pinned_width_that_is_enough(pinned, width, block):
    with compiling_for(TARGETS[0], print):
        assert pinned.options("forward", torch.empty(1).bfloat16(), width) == {"BLOCK": block}
        assert pinned.options("forward", torch.empty(1), width) == {"BLOCK": 3}


def test_a_width_that_is_too_large(pinned):
    with (
        compiling_for(TARGETS[0], print),
        pytest.raises(ValueError, match="operation: width 65 is too large; at most 64"),
    ):
        pinned.options("forward", torch.empty(1), 65)


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_90"),
        ((12, 0), "sm_89"),
    ],
)
def test_configurations_of_a_gpu(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert target_name(torch.empty(1)) == name


def test_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(RuntimeError, match=r"this GPU has 7\.5; choose hardware\.kernels=eager"):
        target_name(torch.empty(1))


def test_where_triton_runs():
    x = torch.empty(1)
    assert not use_triton(x)
    with compiling_for(TARGETS[0], print):
        assert use_triton(x)
    use_eager(True)
    try:
        assert not use_triton(x)
    finally:
        use_eager(False)


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_the_fastest_is_measured_once_and_logged(monkeypatch, caplog):
    calls, times = [], {"a": 2.0, "b": 1.0}

    def run(name):
        if name == "c":
            raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")
        calls.append(name)

    def do_bench(function, return_mode):
        function()
        return times[calls[-1]]

    monkeypatch.setattr(launch, "_fastest", {})
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    candidates = {name: lambda name=name: run(name) for name in ("c", "a", "b")}
    with caplog.at_level("INFO"):
        assert fastest(("product", 32), candidates) == "b"
    assert "product 32: b of {'a': 2.0, 'b': 1.0} ms" in caplog.text
    times["b"] = 3.0
    assert fastest(("product", 32), candidates) == "b"
    assert fastest(("product", 16), candidates) == "a"
    assert calls == ["a", "b"] * 2


@pytest.fixture
def timer(monkeypatch):
    """A GPU in name, on which runs take the milliseconds that they return."""
    monkeypatch.setattr(launch, "_fastest", {})
    monkeypatch.setattr(launch, "TUNING", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    triton = SimpleNamespace(
        testing=SimpleNamespace(do_bench=lambda run, return_mode: run()),
        runtime=SimpleNamespace(errors=SimpleNamespace(OutOfResources=MemoryError)),
    )
    monkeypatch.setattr(launch, "triton", triton)


class OnGPU(SimpleNamespace):
    """As much of a tensor as the choice of a configuration looks at."""

    dtype, is_cuda, device = torch.bfloat16, True, torch.device("cuda", 0)

    def element_size(self):
        return 2


@pytest.fixture
def different():
    """A table with another block for each target, 80 to 942."""
    widths = {t.name: {"16": {"64": {"BLOCK": int(t.name[-2:])}}} for t in TARGETS}
    return Pinned("operation", {"forward": widths, "backward": widths})


def test_tuning_takes_the_fastest_configuration_of_all_targets(timer, different, monkeypatch):
    measured = []

    def run(options):
        measured.append(options["BLOCK"])
        return abs(options["BLOCK"] - 85)

    def choose(kernel="forward", width=64, *more):
        measured.clear()
        return different.choose(kernel, OnGPU(), width, run, *more)["BLOCK"]

    assert choose() == 86
    assert measured == [80, 86, 89, 90, 42]
    assert choose() == 86
    assert measured == []
    # Whatever decides is measured anew: sizes by the next power of two.
    for key in (("backward",), ("forward", 32), ("forward", 64, 100), ("forward", 64, 100, "phase")):
        assert choose(*key) == 86
        assert len(measured) == 5
    choose("forward", 64, 128)
    assert measured == []
    choose("forward", 64, 129)
    assert len(measured) == 5
    monkeypatch.setattr(launch, "TUNING", False)
    assert choose("forward", 64, 500) == 90
    assert measured == []


def test_one_configuration_is_not_measured(timer, pinned):
    assert pinned.choose("forward", OnGPU(), 16, pytest.fail) == {"BLOCK": 1}


def test_nothing_that_fits_the_gpu(timer):
    def run():
        raise MemoryError

    with pytest.raises(RuntimeError, match="forward 64: none of a, b fits this GPU"):
        fastest(("forward", 64), {"a": run, "b": run})


def test_all_ranks_take_one_choice(timer, monkeypatch):
    """That of the rank that comes first; here a rank is a process without choices, beside the same store."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert fastest(("forward", 64), {"a": lambda: 2.0, "b": lambda: 1.0}) == "b"
        monkeypatch.setattr(launch, "_fastest", {})
        assert fastest(("forward", 64), {"a": pytest.fail, "b": pytest.fail}) == "b"
        # Two that measure at the same time.
        monkeypatch.setattr(launch, "_fastest", {})

        def meanwhile():
            with monkeypatch.context() as other:
                other.setattr(launch, "_fastest", {})
                assert fastest(("forward", 32), {"a": lambda: 1.0, "b": lambda: 2.0}) == "a"
            return 2.0

        assert fastest(("forward", 32), {"a": meanwhile, "b": lambda: 1.0}) == "a"
        assert fastest(("forward", 16), {"a": lambda: 2.0, "b": lambda: 1.0}) == "b"
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("choice", ["sdpa", "triton"])
def test_tuning_of_real_attention(monkeypatch, choice):
    seen = []

    def fake(key, candidates):
        seen.append((key, *candidates))
        for run in candidates.values():
            run()
        return choice

    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(complex_attention, "use_triton", lambda _: True)
    monkeypatch.setattr(complex_attention, "tuning", lambda _: True)
    monkeypatch.setattr(complex_attention, "fastest", fake)
    monkeypatch.setattr(
        complex_attention,
        "complex_attention_forward",
        lambda q, k, v, score, causal: (
            complex_attention.eager.held(
                q, k, v, score, complex_attention.eager.future_keys(q, k) if causal else None
            ),
        ),
    )
    q, k = torch.randn(3, 4, 5, 2, 16), torch.randn(3, 2, 5, 2, 16)
    assert complex_attention._takes_sdpa(q, k, k, True) == (choice == "sdpa")
    key = ("complex_attention real", 3, 4, 5, 2, 16, 2, 5, torch.float32, True)
    assert seen == [(key, "sdpa", "triton")]


@pytest.mark.parametrize("choice", ["library", "triton"])
def test_tuning_of_the_complex_product(monkeypatch, choice):
    seen, runs = [], []
    monkeypatch.setattr(complex_linear, "use_triton", lambda _: True)
    monkeypatch.setattr(complex_linear, "tuning", lambda _: True)

    def fake(key, candidates):
        seen.append(key)
        assert runs == [True]
        for run in candidates.values():
            run()
        return choice

    monkeypatch.setattr(complex_linear, "fastest", fake)
    x = torch.empty(3, 5, 2, 32)
    taken = complex_linear._runs_triton("product", x, (2, 64, 32), runs.append)
    assert taken == (choice == "triton")
    assert seen == [("complex_linear product", torch.float32, 15, 2, 64, 32)]
    assert runs == [True, False, True]


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("operation", [name for name in operations() if name != "symplectic"])
def test_every_launch_takes_the_options_chosen(operation, monkeypatch):
    """So that all of them obey MUSE_TUNE_KERNELS."""
    chosen, launched = [], []
    choose = Pinned.choose

    def spy(self, kernel, *arguments):
        chosen.append(kernel)
        return choose(self, kernel, *arguments)

    monkeypatch.setattr(Pinned, "choose", spy)
    with compiling_for(TARGETS[0], lambda kernel, *_: launched.append(kernel)), torch.device("meta"):
        for case in operations()[operation]().values():
            case()
    assert len(chosen) == len(launched) > 0


def test_tables_cover_every_target():
    names = {INTERPRETER, *(target.name for target in TARGETS)}
    for path in launch.Path(launch.__file__).parent.rglob("*.json"):
        if path.stem not in ("resources", "instructions"):
            for kernel, table in json.loads(path.read_text()).items():
                assert table.keys() == names, (path, kernel)


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_choice_of_a_backend_is_traced_as_a_constant(monkeypatch, deterministic):
    """As torch.compile(fullgraph=True) meets it on a GPU, whose driver it cannot look into."""
    torch.use_deterministic_algorithms(deterministic)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(complex_attention, "use_triton", lambda _: True)
    monkeypatch.setattr(complex_linear, "use_triton", lambda _: True)
    x, weight = torch.randn(3, 2, 16).bfloat16(), torch.randn(2, 32, 16).bfloat16()
    q, k, v = torch.randn(3, 1, 2, 5, 2, 16)

    def function(x, q, k, v):
        _, hidden = complex_linear.complex_linear_activated(x, weight, activation="split_gelu")
        assert not complex_linear._runs_triton("product", x, (2, 32, 16), print)
        return hidden, complex_attention._takes_sdpa(q, k, v, True)

    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.code))
        return lambda *_: (x,)

    _, sdpa = torch.compile(function, fullgraph=True, backend=backend)(x, q, k, v)
    assert sdpa != deterministic
    assert "complex_product_activated" in graphs[0]
