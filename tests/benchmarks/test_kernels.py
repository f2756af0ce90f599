import dataclasses
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from support.commands import default_stage

from kernels.complex_attention import complex_attention_forward
from muse.benchmarks import kernels, suite
from muse.benchmarks.kernel_cases import (
    FAMILIES,
    Case,
    largest_deviation,
    measure_case,
    measure_kernels,
    memory_of,
    normal_leaves,
    sizes_of,
)
from muse.benchmarks.suite import settled
from muse.errors import RunError
from muse.measure.passes import Passes, outputs

CPU = torch.device("cpu")
PEAK = 1e12


@pytest.fixture
def cases(bench_config):
    """Every case in a dtype, small."""

    def build(dtype=torch.float32):
        config = bench_config(name="kernels", ode_steps=3, compile=False)
        normal = normal_leaves(0, dtype, CPU)
        return {
            case.name: case for build in FAMILIES.values() for case in build(sizes_of(config), dtype, normal)
        }

    return build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_operation_is_right(cases, dtype):
    deviations = {name: largest_deviation(case) for name, case in cases(dtype).items()}
    # AdamW is for bfloat16 alone.
    assert len(deviations) == 18 + (dtype == torch.bfloat16)
    assert {name: found for name, found in deviations.items() if not found[0] <= 1} == {}


def test_every_alternative_computes_the_same(cases):
    compared = 0
    for name, case in cases().items():
        exact = outputs(case.plain(*(x.detach().double() for x in case.inputs)))
        for other, (function, inputs) in case.others.items():
            for out, expected in zip(outputs(function(*inputs)), exact, strict=True):
                # A loss may be a mean of those of the tokens.
                expected = expected if out.ndim else expected.mean()
                planes = torch.stack((out.real, out.imag), -2) if out.is_complex() else out
                assert torch.allclose(planes.double(), expected, atol=1e-4), (name, other)
            compared += 1
    assert compared == 1 + 3 + 2 * 3 + 2 * 2 + 2 + hasattr(torch.nn, "LinearCrossEntropyOptions")


def off_forward(z, gain):
    # The gradient is right.
    return z + 1e-4 * z.detach()


class OffBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, gain):
        return z.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 1e-4), torch.zeros(2, 5)


def plain_copy(z, gain):
    return z + 0 * gain


def not_a_number(z, gain):
    return z * math.nan * gain


@pytest.mark.parametrize(
    ("wrong", "where"),
    [(off_forward, "output 0"), (OffBackward.apply, "the gradient of input 0"), (not_a_number, "output 0")],
)
def test_a_wrong_operation_has_no_speed(bench_config, wrong, where):
    inputs = (torch.randn(3, 2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True))

    def wronged(*leaves):
        # Both leaves are in the graph.
        return wrong(*leaves) + 0 * leaves[1]

    row = measure_case(Case("wrong", inputs, wronged, plain_copy), bench_config(), CPU, PEAK)
    assert row["correct"] is False
    assert row["deviation"] > 1
    assert row["deviation_of"] == where
    assert where in row["error"]
    assert not [key for key in row if "ms" in key or "share" in key or key == "alternatives"]


@pytest.mark.parametrize("fault", [None, 0.03])
def test_an_update_is_measured_without_a_backward_pass(bench_config, fault):
    config = settled(bench_config(name="kernels", repeats=2, compile=False), "kernels")
    (case,) = FAMILIES["adamw"](sizes_of(config), torch.bfloat16, normal_leaves(0, torch.bfloat16, CPU))
    if fault:
        ours = case.ours
        case = dataclasses.replace(case, ours=lambda w, *rest: ours(w.add_(fault), *rest))
    row = measure_case(case, config, CPU, PEAK)
    assert row["correct"] is not bool(fault)
    if not fault:
        assert row["alternatives"].keys() == {"ours", "eager", "rounded", "fused float32", "fused bfloat16"}
        assert row["backward_gflop"] is None


def test_a_right_operation_has_figures_that_fit_together(bench_config):
    config = settled(bench_config(name="kernels", repeats=3, compile=False, dtypes=["float32"]), "kernels")
    row = measure_kernels("attention", config, CPU)["cases"]["attention real, float32"]
    assert row["correct"] is True
    assert row["error"] is None
    for name in ("ours", "eager", "SDPA", "complex64"):
        figures = row["alternatives"][name]
        for part in ("forward", "training"):
            assert 0 < figures[f"{part}_ms_p20"] <= figures[f"{part}_ms_p50"] <= figures[f"{part}_ms_p80"]
            assert (name == "ours") == (f"{part}_ratio" not in figures)
        assert figures["peak_gb"] > 0
    # Two products forward and five backward over half of the keys, 2 x 2 heads, width 2 x 8.
    assert row["forward_gflop"] == pytest.approx(2 * 2 * 4 * 16 * 8 * 16 / 1e9)
    assert row["backward_gflop"] == pytest.approx(5 * 2 * 4 * 16 * 8 * 16 / 1e9)
    forward, training = (
        row["alternatives"]["ours"][f"{part}_ms_p50"] / 1e3 for part in ("forward", "training")
    )
    for part, seconds in (("forward", forward), ("backward", training - forward)):
        share = row[f"{part}_gflop"] / seconds / (1e3 * row["peak_tflops"])
        assert row[f"{part}_share_of_peak"] == pytest.approx(share)


def test_an_operation_that_raises_is_an_error_and_hides_no_other(bench_config, monkeypatch):
    def build(sizes, dtype, normal):
        def broken(z):
            raise RuntimeError("no such kernel\nmore")

        z = normal(2, 3)
        yield Case("broken", (z,), broken, torch.sin)
        yield Case("sound", (z,), torch.sin, torch.sin)

    monkeypatch.setitem(FAMILIES, "pointwise", build)
    config = settled(bench_config(compile=False, dtypes=["float32"]), "kernels")
    rows = measure_kernels("pointwise", config, CPU)["cases"]
    assert rows["broken, float32"]["correct"] is False
    assert rows["broken, float32"]["error"] == "failed: no such kernel"
    assert rows["sound, float32"]["correct"] is True


def test_memory_counts_what_an_operation_allocates_inside(monkeypatch):
    q, k, v = (torch.randn(1, 2, 64, 2, 8, requires_grad=True) for _ in range(3))
    call = Passes(lambda *x: complex_attention_forward(*x, "phase", True)[0], (q, k, v))
    measured = memory_of(call.training, CPU)
    results = 4 * q.nbytes
    # A matrix of the scores alone is 32 KiB; it lives inside the operation only.
    scores = 4 * 2 * 64 * 64
    assert measured > results + scores
    monkeypatch.setattr("muse.measure.peak_memory.InsideOperations", nullcontext)
    assert memory_of(call.training, CPU) < results + scores


def test_memory_is_what_comes_on_top_of_what_there_is():
    x = torch.randn(1000, requires_grad=True)
    call = Passes(torch.sin, (x,))
    # The output and the gradient, and the cosine on the way to it.
    assert 2 * x.nbytes <= memory_of(call.training, CPU) <= 4 * x.nbytes


def test_a_missing_compiler_is_one_sentence(bench_config, monkeypatch):
    def no_compiler(*arguments, **options):
        raise RuntimeError("No working C++ compiler found\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: no_compiler)
    x = torch.randn(4, requires_grad=True)
    row = measure_case(Case("sine", (x,), torch.sin, torch.sin), bench_config(), CPU, PEAK)
    assert row["correct"] is True
    assert row["alternatives"]["compiled"] == {"note": "torch.compile failed: No working C++ compiler found"}
    row |= {"family": "pointwise", "operation": "sine", "dtype": "float32"}
    tables = "\n".join(kernels.text({"sine, float32": row}))
    assert "sine, float32: torch.compile failed: No working C++ compiler found" in tables


def measured(ratio=1.2, correct=True, operation="attention real", other="eager", **row):
    label = f"{operation}, float32"
    if not correct:
        return {label: {"family": "attention", "operation": operation, "correct": correct, "error": "wrong"}}
    figures = {"forward_ratio": ratio, "training_ratio": 2.0}
    alternatives = {"ours": {}, "eager": figures, "SDPA": figures | {"forward_ratio": 1.1}}
    return {
        label: {
            "family": "attention",
            "operation": operation,
            "correct": True,
            "error": None,
            "alternatives": alternatives,
        }
    }


def run(monkeypatch, config, answers):
    def measure_isolated(name, config):
        answer = answers.get(name.removeprefix("kernels "), {})
        if isinstance(answer, str):
            raise RunError(answer)
        return {"cases": answer, "device": "a device"}

    monkeypatch.setattr(suite, "measure_isolated", measure_isolated)
    return suite.run_suite(config, Path("unused"), default_stage)


@pytest.mark.parametrize(
    ("answers", "correct", "passes", "worst"),
    [
        ({"attention": measured()}, True, True, 1.2),
        ({"attention": measured(0.96)}, True, True, 0.96),
        ({"attention": measured(0.94)}, True, False, 0.94),
        ({"attention": measured(correct=False)}, False, False, None),
        ({"attention": measured(correct=None)}, None, None, None),
        ({"attention": measured(), "linear": measured(0.5, operation="linear")}, True, False, 0.5),
        ({"attention": measured(), "linear": "was killed"}, None, None, 1.2),
        ({"attention": "was killed"}, None, None, None),
    ],
)
def test_criteria(bench_config, monkeypatch, answers, correct, passes, worst):
    report = run(monkeypatch, bench_config(name="kernels"), answers)
    assert report.values["kernels_correct"] is correct
    assert report.values["all_pass"] is passes
    assert report.values["kernels_worst_ratio"] == worst
    assert len(report.criteria) == 3
    assert "kernels" in report.details
    assert report.failures == {f"kernels {k}": v for k, v in answers.items() if isinstance(v, str)}


def test_the_worst_case_is_named_and_ratios_are_flat(bench_config, monkeypatch):
    answers = {"attention": measured(0.94), "linear": measured(0.97, operation="linear + split_gelu")}
    report = run(monkeypatch, bench_config(name="kernels"), answers)
    assert report.values["kernels_worst_case"] == "attention real, float32, forward"
    assert "attention real, float32, forward" in report.criteria[1][0]
    assert report.values["attention_real_float32_eager_ratio"] == 2.0
    assert report.values["attention_real_float32_sdpa_ratio"] == 2.0
    assert report.values["linear_split_gelu_float32_eager_ratio"] == 2.0
    assert report.values["kernels_sdpa_ratio"] == 1.1


def test_all_leaves_the_kernels_out(bench_config, monkeypatch):
    asked = []

    def measure_isolated(name, config):
        asked.append(name)
        raise RunError("enough")

    monkeypatch.setattr(suite, "measure_isolated", measure_isolated)
    suite.run_suite(bench_config(name="all"), Path("unused"), default_stage)
    assert asked
    assert not [name for name in asked if "kernels" in name]


def test_sizes_follow_the_model_where_options_are_open(bench_config):
    sizes = sizes_of(settled(bench_config(), "kernels"))
    assert (sizes.width, sizes.heads, sizes.head_dim, sizes.hidden) == (16, 2, 8, 32)
    open_none = bench_config(width=6, heads=3, head_dim=5, hidden=7, ode_steps=4)
    sizes = sizes_of(settled(open_none, "kernels"))
    assert (sizes.width, sizes.heads, sizes.head_dim, sizes.hidden, sizes.steps) == (6, 3, 5, 7, 4)
