from __future__ import annotations

import json

import pytest
import torch

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


def test_tables_cover_every_target():
    names = {INTERPRETER, *(target.name for target in TARGETS)}
    for path in launch.Path(launch.__file__).parent.glob("*.json"):
        if path.stem != "resources":
            for kernel, table in json.loads(path.read_text()).items():
                assert table.keys() == names, (path.stem, kernel)


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
