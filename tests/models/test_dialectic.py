"""The dialectic loop: an exact likelihood, which is the head's where energies are 0."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.causality import assert_causal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from muse.models import dialectic, linear_cross_entropy, loss
from muse.models.dialectic import Antithesis, gradient_norm, log_growth, watched_contradiction

VOCAB, CANDIDATES = 61, 5
KINDS = ("mlp", "hamiltonian")
CASES = list(itertools.product(KINDS, (1, 3)))


@pytest.fixture
def debating(build):
    """Builds a stage 3 whose energies are of some size."""

    def build_one(kind: str = "mlp", rounds: int = 1, **options: Any) -> Any:
        given = {"koopman": "replace", "dialectic_candidates": CANDIDATES} | options
        model = build(3, dialectic=kind, dialectic_rounds=rounds, **given)
        generator = torch.Generator().manual_seed(1)
        readout = model.antithesis.readout
        readout.data.copy_(3 * torch.randn(len(readout), generator=generator))
        return model

    return build_one


def tokens(length: int = 12, batch: int = 2) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    x = tokens(13)
    inputs, targets = x[:, :-1], x[:, 1:].clone()
    targets[0, :3] = -1
    return inputs, targets


def written_out(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of thesis and synthesis (B, S, V), token by token, by the definition."""
    own, matrix = model.antithesis, model.head_parameters()[0].flatten(1)
    features = model.features(x)
    thesis = (features @ matrix.T).softmax(-1)
    synthesis = thesis.clone()
    for place in itertools.product(*map(range, x.shape)):
        p = thesis[place]
        candidates = p.argsort(descending=True)[:CANDIDATES]
        rows = matrix[candidates]
        seen = [own.token_weight @ (row / row.square().mean().sqrt()) for row in rows]
        now = p
        for _ in range(own.rounds):
            shares = now[candidates] / now[candidates].sum()
            mean = sum(share * one for share, one in zip(shares, seen, strict=True))
            energies = []
            for one in seen:
                a = own.state_weight @ features[place] + one + own.mean_weight @ mean + own.bias
                half = len(a) // 2
                if own.kind == "mlp":
                    energies.append(own.readout @ F.gelu(a))
                else:
                    q, momentum = a[:half].double(), a[half:]
                    normal = torch.distributions.Normal(0.0, 1.0)
                    density = normal.log_prob(q).exp()
                    phi = ((q.square() - 1) * normal.cdf(q) + q * density) / 2
                    kinetic = own.readout[half:] @ momentum.square() / 2
                    energies.append(own.readout[:half] @ phi + kinetic)
            now = p.clone()
            now[candidates] = p[candidates] * (-torch.stack(energies) / len(own.bias) ** 0.5).exp()
            now = now / now.sum()
        synthesis[place] = now
    return thesis, synthesis


@pytest.mark.parametrize(("kind", "rounds"), CASES)
@torch.no_grad()
def test_the_synthesis_is_what_the_definition_says_and_sums_to_one(debating, kind, rounds):
    model = debating(kind, rounds).double().eval()
    x = tokens(6)
    found = model(x).softmax(-1)
    thesis, expected = written_out(model, x)
    # The length of a row's weights has an offset.
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]), rtol=0, atol=1e-14)
    # All but the candidates keep their masses beside each other.
    ratio = (found / thesis).gather(-1, thesis.argsort(-1, descending=True))
    assert (ratio[..., CANDIDATES:].std(-1) < 1e-9).all()
    assert (ratio[..., :CANDIDATES].std(-1) > 1e-3).all()
    exact = -expected.log().gather(-1, x[..., None]).mean()
    torch.testing.assert_close(model.loss(x, x), exact, rtol=1e-7, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_begins_as_the_thesis(build, kind, precision):
    model, plain = (
        build(3, koopman="replace", dialectic=of, precision=precision).eval() for of in (kind, "none")
    )
    assert plain.antithesis is None
    x, y = batch()
    assert torch.equal(model(x), plain(x).float())
    losses = [one.loss(x, y) for one in (model, plain)]
    assert torch.equal(*losses)
    with torch.no_grad():
        assert torch.equal(model.loss(x, y), plain.loss(x, y))
    for one in losses:
        one.backward()
    own = model.antithesis.readout.grad
    assert own.isfinite().all()
    assert own.norm() > 1e-6
    for name, parameter in plain.named_parameters():
        apart = model.get_parameter(name).grad - parameter.grad
        assert apart.norm() <= 0.02 * parameter.grad.norm(), name


@pytest.fixture(params=["one chunk", "chunks", "rows"])
def chunking(request, monkeypatch):
    chunk, block = {"one chunk": (2**25, 2**22), "chunks": (400, 300), "rows": (1, 1)}[request.param]
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(dialectic, "BLOCK_ELEMENTS", block)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize(("kind", "rounds"), CASES)
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_the_logits(debating, kind, rounds, tied):
    model = debating(kind, rounds, tied=tied).double()
    x, y = batch()
    for reduction in ("mean", "sum"):
        expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1, reduction=reduction)
        value = model.loss(x, y, reduction)
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(model.loss(x, y, reduction), expected, rtol=1e-11, atol=0)
        parameters = list(model.parameters())
        found, wanted = (torch.autograd.grad(3 * one, parameters) for one in (value, expected))
        for actual, exact in zip(found, wanted, strict=True):
            assert exact.norm() > 0
            torch.testing.assert_close(actual, exact, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_rounds_no_energy_away(debating, kind):
    """In bfloat16 a logit of some size is 0.03 from the next one; energies of 0.001 still count."""
    model = debating(kind).eval()
    model.antithesis.readout.data *= 1e-4
    rough = copy.deepcopy(model).bfloat16()
    x, y = batch()
    with torch.no_grad():
        differences = []
        for one in (model, rough):
            with_it = one.loss(x, y)
            readout = one.antithesis.readout.data
            one.antithesis.readout.data = torch.zeros_like(readout)
            differences.append(with_it - one.loss(x, y))
            one.antithesis.readout.data = readout
        assert differences[0].abs() > 1e-6
        torch.testing.assert_close(*differences, rtol=0.2, atol=1e-6)
        assert model(x).dtype == rough(x).dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed", "fp16-mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_half_precision(debating, kind, precision):
    model = debating(kind, 2, precision=precision)
    exact = copy.deepcopy(model).double()
    x, y = batch()
    dtype = torch.float16 if precision == "fp16-mixed" else torch.bfloat16
    with torch.autocast("cpu", dtype, enabled=precision != "bf16"):
        value = model.loss(x, y)
    value.backward()
    expected = exact.loss(x, y)
    expected.backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=0.02, atol=0)
    for name, parameter in model.antithesis.named_parameters():
        wanted = exact.antithesis.get_parameter(name).grad
        assert parameter.grad.dtype == parameter.dtype
        assert (parameter.grad - wanted).norm() < 0.15 * wanted.norm(), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("trunk", ["residual", "reversible"])
def test_no_token_sees_a_later_one(debating, precision, trunk):
    model = debating("mlp", 2, precision=precision, trunk=trunk).eval()
    x = tokens(66)
    assert_causal(model, x, (x + 1) % VOCAB)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tokens_after_those_in_caches(debating, kind):
    model = debating(kind, 2, gradient="backprop").double().eval()
    x = tokens(12)
    expected, caches = model(x), model.new_caches(12)
    found = torch.cat([model.continue_logits(part, caches) for part in x.split([7, 1, 1, 3], dim=1)], 1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(model.next_logits(x), expected[:, -1], rtol=1e-9, atol=1e-10)


def test_there_may_be_fewer_tokens_than_candidates(debating):
    model = debating(dialectic_candidates=100).double()
    x, y = batch()
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1)
    torch.testing.assert_close(model.loss(x, y), expected, rtol=1e-11, atol=0)


class Largest(TorchDispatchMode):
    """Notes the most elements that a result has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(part, torch.Tensor):
                self.elements = max(self.elements, part.numel())
        return out


def test_the_loss_never_holds_all_logits(monkeypatch):
    count, width, vocab = 4000, 8, 300
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 100 * vocab)
    monkeypatch.setattr(loss, "SOFTMAX_ELEMENTS", 50 * vocab)
    monkeypatch.setattr(dialectic, "BLOCK_ELEMENTS", 4 * 8 * 60)
    antithesis = Antithesis("mlp", width, 4)
    x, weight = torch.randn(count, width).requires_grad_(), torch.randn(vocab, width).requires_grad_()
    with Largest() as seen:
        linear_cross_entropy(x, weight, torch.randint(vocab, (count,)), antithesis=antithesis).backward()
    # Of a chunk, or what x and its gradient are anyway.
    assert seen.elements <= max(100 * vocab, x.numel())


def test_no_gradient_is_worked_out_in_vain(debating):
    model = debating()
    x, y = batch()
    with torch.no_grad(), FlopCounterMode(display=False) as once:
        model.loss(x, y)
    with FlopCounterMode(display=False) as again:
        model.loss(x, y)
    with torch.no_grad(), FlopCounterMode(display=False) as before:
        model.features(x)
    assert once.get_total_flops() - before.get_total_flops() < 0.4 * (
        again.get_total_flops() - before.get_total_flops()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_growth_of_z_is_as_good_as_its_dtype_and_never_overflows(dtype):
    log_share = torch.tensor([[0.9, 0.05], [1 - 1e-9, 1e-10], [1e-20, 1e-30], [0.5, 0.5]], dtype=dtype).log()
    for size in (0.0, 1e-6, 0.1, 3.0, 60.0, 300.0):
        for signs in ((1, 1), (-1, -1), (1, -1)):
            energies = size * torch.tensor(signs, dtype=dtype).expand(4, 2)
            found = log_growth(log_share, energies)
            assert found.isfinite().all()
            if size == 0:
                assert (found == 0).all()
            share = log_share.double().exp()
            others = (1 - share.sum(-1, keepdim=True)).clamp(min=0)
            terms = torch.cat((others.log(), log_share.double() - energies.double()), -1)
            tolerance = 2e-6 if dtype == torch.float32 else 1e-9
            # Where all mass is on candidates that lose it, what is left is known to the rounding of 1.
            lost = found < -10
            torch.testing.assert_close(
                found.double()[~lost],
                terms.logsumexp(-1, keepdim=True)[~lost],
                rtol=tolerance,
                atol=tolerance,
            )


@pytest.mark.parametrize("kind", KINDS)
def test_the_contradiction_is_the_divergence_weighted_by_the_loss(debating, kind):
    model = debating(kind).double().eval()
    x, y = batch()
    with torch.no_grad():
        thesis, synthesis = written_out(model, x)
        divergence = (thesis * (thesis / synthesis).log()).sum(-1)
        losses = -synthesis.log().gather(-1, y.clamp(min=0)[..., None])[..., 0] * (y >= 0)
        before = model.loss(x, y, "sum")
        with watched_contradiction(model.antithesis) as metrics:
            assert torch.equal(model.loss(x, y, "sum"), before)
            model.loss(x[:, :5], y[:, :5], "sum")
    weights = losses.sum() + losses[:, :5].sum()
    products = (divergence * losses).sum() + (divergence * losses)[:, :5].sum()
    assert list(metrics) == ["dialectic/contradiction"]
    assert metrics["dialectic/contradiction"] == pytest.approx((products / weights).item(), rel=1e-6)
    model.loss(x, y).backward()
    with watched_contradiction(model.antithesis) as metrics:
        pass
    norm = torch.cat([p.grad.flatten() for p in model.antithesis.parameters()]).norm().item()
    assert metrics["dialectic/grad_norm"] == gradient_norm(model.antithesis) == pytest.approx(norm, rel=1e-5)
    with watched_contradiction(None) as metrics:
        pass
    assert metrics == {}


def test_a_second_round_is_told_of_the_first(debating):
    one, two = (debating("mlp", rounds).double() for rounds in (1, 2))
    x = tokens(6)
    assert not torch.allclose(one(x), two(x))
    two.antithesis.mean_weight.data.zero_()
    one.antithesis.mean_weight.data.zero_()
    torch.testing.assert_close(one(x), two(x))
