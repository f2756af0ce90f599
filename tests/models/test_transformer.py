from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.causality import assert_causal
from support.models import model_config, stage_config

from muse.config import ModelConfig, StageConfig, WidthConfig
from muse.models import build_model, count_parameters, transformer
from muse.models.transformer import sinusoids

VOCAB = 97
WIDTH = WidthConfig(d_model=32, layers=2, heads=4, kv_heads=4, d_ff=48)
both_attentions = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


def build(width=WIDTH, seed=0, fused=False, vocab=VOCAB, **options):
    options = {"precision": "fp32", "activation": "gelu", "tied": False} | options
    model = ModelConfig(name="test", vocab_size=vocab, seq_len=32, real=width)
    built = build_model(StageConfig(number="3a", **options), model, vocab, seed)
    for block in built.blocks:
        block.attention.fused = fused
    return built


def trained(**options):
    """With biases and norms that are not those of the initialisation."""
    model = build(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(length=20, batch=2):
    return torch.randint(VOCAB, (batch, length))


def relative_error(x, exact):
    return ((x.double() - exact).norm() / exact.norm()).item()


def reference(model, x):
    """Logits in float64 by the formulas, with each head and token on its own."""
    p = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
    d = p["embedding.weight"].shape[1]

    def norm(h, name):
        centred = h - h.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / (variance + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(h, name):
        return h @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def attention(h, name, heads):
        q, k, v = linear(h, f"{name}.projection").split(d, -1)
        rows = []
        for t in range(h.shape[1]):
            parts = []
            for head in range(heads):
                c = slice(head * d // heads, (head + 1) * d // heads)
                scores = torch.einsum("bc,bsc->bs", q[:, t, c], k[:, : t + 1, c]) / math.sqrt(d / heads)
                weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
                parts.append(torch.einsum("bs,bsc->bc", weights, v[:, : t + 1, c]))
            rows.append(torch.cat(parts, -1))
        return linear(torch.stack(rows, 1), f"{name}.output")

    h = p["embedding.weight"][x] * math.sqrt(d) + positions_by_formula(range(x.shape[1]), d)
    for i, block in enumerate(model.blocks):
        h = h + attention(
            norm(h, f"blocks.{i}.attention_norm"), f"blocks.{i}.attention", block.attention.heads
        )
        up = linear(norm(h, f"blocks.{i}.ffn_norm"), f"blocks.{i}.up")
        h = h + linear(up * (1 + torch.erf(up / math.sqrt(2))) / 2, f"blocks.{i}.down")
    return linear(norm(h, "norm"), "head"), p


def positions_by_formula(positions, features):
    table = [
        [(math.sin, math.cos)[i % 2](t / 10_000 ** ((i - i % 2) / features)) for i in range(features)]
        for t in positions
    ]
    return torch.tensor(table, dtype=torch.float64)


# ---- Parameters


@pytest.mark.parametrize(("name", "parameters"), [("scaled", 10_511_360), ("simple", 2_105_344)])
def test_sizes_of_the_stage(name, parameters):
    config = model_config(name)
    with torch.device("meta"):
        model = build_model(stage_config("3a"), config, config.vocab_size)
    assert count_parameters(model) == parameters


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("d", "layers", "ff", "vocab"), [(32, 1, 48, 97), (64, 3, 100, 50), (12, 2, 7, 11)])
def test_number_of_parameters(d, layers, ff, vocab, tied):
    attention = 4 * (d * d + d)
    feed_forward = 2 * d * ff + ff + d
    norms = 4 * d
    expected = vocab * d + layers * (attention + feed_forward + norms) + 2 * d
    expected += 0 if tied else vocab * d + vocab
    with torch.device("meta"):
        model = build(WidthConfig(d, layers, heads=4, kv_heads=4, d_ff=ff), vocab=vocab, tied=tied)
    assert count_parameters(model) == expected


def test_weights_are_xavier_uniform_and_biases_zero():
    d, ff = 64, 96
    model = build(WidthConfig(d, layers=2, heads=4, kv_heads=4, d_ff=ff))
    maps = {"embedding": model.embedding.weight, "head": model.head.weight}
    for i, block in enumerate(model.blocks):
        parts = zip("qkv", block.attention.projection.weight.split(d), strict=True)
        maps |= {f"{name} {i}": part for name, part in parts}
        maps |= {f"output {i}": block.attention.output.weight}
        maps |= {f"up {i}": block.up.weight, f"down {i}": block.down.weight}
    for name, weight in maps.items():
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.98 * bound < weight.abs().max() <= bound, name
        # A uniform distribution: its standard deviation, and as many values in each tenth of its range.
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
        tenths = torch.histc(weight.detach(), 10, -bound, bound) / weight.numel()
        assert (tenths - 0.1).abs().max() < 0.03, name
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
    matrices = sum(weight.numel() for weight in maps.values())
    assert matrices == sum(p.numel() for p in model.parameters() if p.dim() > 1)


def test_seed_alone_decides_the_weights():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, second, other = (build(seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.rand(3), expected), "building a model moved the global random state"
    for name, value in first.named_parameters():
        assert torch.equal(value, second.get_parameter(name))
        if value.dim() > 1:
            assert not torch.equal(value, other.get_parameter(name))


# ---- Positions


@pytest.mark.parametrize("features", [2, 32, 512])
def test_sinusoids_are_those_of_the_formula(features):
    positions = [0, 1, 2, 3, 10, 127, 1000, 4095]
    found = sinusoids(torch.tensor(positions), features)
    assert found.dtype == torch.float32
    exact = positions_by_formula(positions, features)
    # An angle is rounded to a few units in its last place.
    allowed = 1e-7 + 4e-7 * torch.tensor(positions, dtype=torch.float64)[:, None]
    assert ((found.double() - exact).abs() <= allowed).all()


@both_attentions
def test_positions_matter(fused, monkeypatch):
    """In one layer the last token sees the set of the earlier ones, and their order by positions only."""
    width = WidthConfig(d_model=32, layers=1, heads=4, kv_heads=4, d_ff=48)
    model, x = trained(width=width, fused=fused), tokens(16)
    other = torch.cat((x[:, :-1].flip(1), x[:, -1:]), 1)
    with torch.no_grad():
        assert relative_error(model.next_logits(other), model.next_logits(x).double()) > 0.01
        monkeypatch.setattr(transformer, "sinusoids", lambda t, features: torch.zeros(len(t), features))
        assert relative_error(model.next_logits(other), model.next_logits(x).double()) < 1e-5


# ---- The function


@both_attentions
@pytest.mark.parametrize("width", [WIDTH, WidthConfig(d_model=36, layers=1, heads=3, kv_heads=3, d_ff=20)])
def test_logits_and_gradients_against_double_precision(fused, width):
    model, x = trained(width=width, fused=fused), tokens(19, batch=3)
    cotangent = torch.randn(3, 19, VOCAB)
    expected, parameters = reference(model, x)
    exact = torch.autograd.grad(expected, list(parameters.values()), cotangent.double())
    found = model(x)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 2e-6
    gradients = torch.autograd.grad(found, list(model.parameters()), cotangent)
    for name, actual, wanted in zip(parameters, gradients, exact, strict=True):
        assert relative_error(actual, wanted) < 1e-5, name


def test_fused_and_plain_attention_are_the_same_function():
    """In float64, where a difference is not one of rounding."""
    x, cotangent = tokens(33), torch.randn(2, 33, VOCAB).double()
    results = []
    for fused in (False, True):
        torch.manual_seed(3)
        model = trained(fused=fused).double()
        out = model(x)
        results.append([out, *torch.autograd.grad(out, list(model.parameters()), cotangent)])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-11)


@both_attentions
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_token_sees_a_later_one(fused, precision):
    model, x = build(fused=fused, precision=precision).eval(), tokens(66)
    assert_causal(model, x, (x + 1) % VOCAB, reach=2)


@both_attentions
def test_gradient_of_a_logit_stops_at_its_token(fused):
    model, states = trained(fused=fused), []

    def keep(_, __, state):
        states.append(state)
        state.retain_grad()

    model.embedding.register_forward_hook(keep)
    model(tokens(12))[:, 7].square().sum().backward()
    by_token = states[0].grad.abs().sum((0, 2))
    assert (by_token[:8] > 0).all()
    assert (by_token[8:] == 0).all()


def test_loss_is_the_cross_entropy_of_the_logits():
    model, x, y = trained().double(), tokens(), tokens()
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    torch.testing.assert_close(model.loss(x, y), expected)
    torch.testing.assert_close(model.next_logits(x), model(x)[:, -1])


def test_dropout_acts_in_training_only():
    model, plain, x = build(dropout=0.5), build(), tokens()
    assert model.training
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    assert torch.equal(model(x), plain(x))


def test_tied_head_shares_one_tensor():
    model, x = build(tied=True), tokens()
    weight, bias = model.head_parameters()
    assert bias is None
    assert weight is model.embedding.weight
    assert sum("embedding" in name or "head" in name for name in model.state_dict()) == 1
    tied = torch.autograd.grad(model.loss(x, x), weight)[0]
    # Both uses, told apart: as a table of inputs and as the head.
    features = model.features(x).flatten(0, 1)
    uses = [(features, weight.detach()), (features.detach(), weight)]
    parts = [torch.autograd.grad(F.cross_entropy(F.linear(*use), x.flatten()), weight)[0] for use in uses]
    assert all(part.norm() > 0 for part in parts)
    torch.testing.assert_close(tied, sum(parts), atol=1e-6, rtol=1e-4)


def test_untied_head_is_its_own():
    model, x = build(), torch.full((1, 4), 5)
    model.loss(x, x).backward()
    assert (model.embedding.weight.grad[torch.arange(VOCAB) != 5] == 0).all()
    assert (model.head.weight.grad.abs().sum(-1) > 0).all()


# ---- Kept keys and values


@both_attentions
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunks", [[1] * 23, [23], [1, 22], [22, 1], [8, 8, 7], [3, 1, 10, 2, 7]], ids=str)
def test_continued_logits_are_those_of_a_full_pass(fused, tied, chunks):
    model, x = trained(fused=fused, tied=tied).double(), tokens(23, batch=1)
    pasts = model.new_caches(23)
    found = torch.cat([model.continue_logits(part, pasts)[0] for part in x.split(chunks, 1)])
    assert not found.requires_grad
    assert [past.length for past in pasts] == [23, 23]
    torch.testing.assert_close(found, model(x)[0].detach(), rtol=1e-11, atol=1e-12)


def test_what_lies_beyond_the_length_of_a_past_does_not_count():
    """Tokens may be taken back by shortening the past: what they left is never read."""
    model, x = trained(), tokens(12, batch=1)
    clean, used = model.new_caches(30), model.new_caches(30)
    for pasts in (clean, used):
        model.continue_logits(x[:, :5], pasts)
    for past in used:
        past.k[:, :, 5:].normal_()
        past.v[:, :, 5:].normal_()
    model.continue_logits(x[:, 5:9].flip(1), used)
    for past in used:
        past.length = 5
    assert torch.equal(model.continue_logits(x[:, 5:], used), model.continue_logits(x[:, 5:], clean))


def test_pasts_of_two_sequences_are_apart():
    model, (first, second) = trained().double(), tokens(10, batch=2)
    pasts = [model.new_caches(10) for _ in range(2)]
    for t in range(10):
        ours = [
            model.continue_logits(x[None, t : t + 1], p)[0, 0]
            for x, p in zip((first, second), pasts, strict=True)
        ]
    expected = model(torch.stack((first, second)))[:, -1].detach()
    torch.testing.assert_close(torch.stack(ours), expected, rtol=1e-11, atol=1e-12)
