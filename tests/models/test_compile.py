from __future__ import annotations

import shutil

import pytest
import torch
import torch._inductor.config
from support.marks import needs_vectors

# Every activation, norm and kind of score once; compiling costs seconds, so not every combination.
OPTIONS = [
    {"number": 0, "activation": "swiglu"},
    {"activation": "split_gelu", "norm": "rms", "score": "real"},
    {"activation": "mod_relu", "norm": "layer", "score": "magnitude"},
    {"activation": "mod_swish", "norm": "rms", "score": "phase"},
    {"activation": "cardioid"},
    {"activation": "z_relu"},
    {"mixer": "none"},
]


def label(options):
    return "-".join(str(value) for value in options.values())


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results(model, features, tokens, cotangent):
    out = features(tokens)
    parameters = [p for name, p in model.named_parameters() if not name.startswith("head")]
    return [out.detach(), *torch.autograd.grad(out, parameters, cotangent.to(out.dtype))]


def compare(model, compiled, **tolerance):
    tokens = torch.randint(61, (2, 9))
    cotangent = torch.randn_like(model.features(tokens))
    expected = results(model, model.features, tokens, cotangent)
    for actual, wanted in zip(results(model, compiled, tokens, cotangent), expected, strict=True):
        torch.testing.assert_close(actual, wanted, **tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_the_whole_graph_is_captured_and_means_the_same(build, options):
    model = build(**options, layers=1)
    compare(model, torch.compile(model.features, fullgraph=True, backend="aot_eager"), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"number": 2}, {"number": 3, "koopman": "add", "mera": "add", "mera_every": 1}], ids=label
)
def test_a_flow_breaks_the_graph_and_means_the_same(build, options):
    model = build(**options, layers=1)
    compare(model, torch.compile(model.features, backend="aot_eager"), atol=1e-5, rtol=1e-4)


@needs_vectors
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="the compiler needs gcc")
def test_compiled_code_means_the_same(build):
    model = build(1, layers=1)
    # One process and no precompiled headers: what they save over many kernels, they cost over a few.
    with torch._inductor.config.patch({"compile_threads": 1, "cpp_cache_precompile_headers": False}):
        compare(model, torch.compile(model.features, fullgraph=True), atol=1e-5, rtol=1e-4)


def test_compiling_keeps_the_names_of_parameters(build):
    model = build(1)
    names = list(model.state_dict())
    model.compile_features()
    assert list(model.state_dict()) == names
