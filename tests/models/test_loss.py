from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.rounding import assert_as_accurate
from torch.utils.flop_counter import FlopCounterMode

from muse.models import linear_cross_entropy, loss

SIZES = [(1, 4, 7), (37, 5, 11), (64, 8, 2), (65, 3, 129)]


def problem(tokens, width, vocab, ignored=0.25):
    x, weight, bias = torch.randn(tokens, width), torch.randn(vocab, width), torch.randn(vocab)
    targets = torch.randint(vocab, (tokens,))
    targets[1:][torch.rand(tokens - 1) < ignored] = -1
    return x.double(), weight.double(), bias.double(), targets


def reference(x, weight, targets, bias, reduction):
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)


def run(function, x, weight, bias, targets, reduction="mean", factor=1.0):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    value = function(*leaves[:2], targets, leaves[2] if bias is not None else None, reduction)
    return [value.detach(), *torch.autograd.grad(value * factor, leaves)]


@pytest.fixture(params=["one chunk", "chunks", "rows"])
def chunking(request, monkeypatch):
    """Sizes of the chunks of the product and of the softmax; the small ones leave ragged ends."""
    chunk, softmax = {"one chunk": (2**25, 2**21), "chunks": (90, 50), "rows": (1, 1)}[request.param]
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(loss, "SOFTMAX_ELEMENTS", softmax)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_and_gradients_are_those_of_cross_entropy(sizes, with_bias, reduction):
    x, weight, bias, targets = problem(*sizes)
    bias = bias if with_bias else None
    got = run(linear_cross_entropy, x, weight, bias, targets, reduction, factor=3)
    for actual, expected in zip(got, run(reference, x, weight, bias, targets, reduction, 3), strict=True):
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_targets_ignored(reduction):
    x, weight, bias, targets = problem(9, 4, 7)
    results = run(linear_cross_entropy, x, weight, bias, torch.full_like(targets, -1), reduction)
    assert all((result == 0).all() for result in results)


@pytest.mark.parametrize("reduction", ["none", "max"])
def test_other_reductions_are_refused(reduction):
    x, weight, _, targets = problem(3, 4, 7)
    with pytest.raises(ValueError, match=reduction):
        linear_cross_entropy(x, weight, targets, reduction=reduction)


def test_input_need_not_be_contiguous():
    x, weight, bias, targets = problem(9, 4, 7)
    x, weight = x.T.contiguous().T, weight.T.contiguous().T
    assert not (x.is_contiguous())
    assert not (weight.is_contiguous())
    got = run(linear_cross_entropy, x, weight, bias, targets)
    for actual, expected in zip(got, run(reference, x, weight, bias, targets), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("wanted", range(3))
def test_only_wanted_gradients(wanted):
    *tensors, targets = problem(9, 4, 7)
    tensors[wanted].requires_grad_()
    x, weight, bias = tensors
    linear_cross_entropy(x, weight, targets, bias).backward()
    assert [t.grad is not None for t in tensors] == [index == wanted for index in range(3)]
    expected = run(reference, x, weight, bias, targets)[1 + wanted]
    torch.testing.assert_close(tensors[wanted].grad, expected)


def test_no_gradient_is_worked_out_in_vain():
    x, weight, _, targets = problem(9, 4, 7)
    weight.requires_grad_()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        value = linear_cross_entropy(x, weight, targets)
    assert counter.get_total_flops() == 2 * x.numel() * len(weight)
    torch.testing.assert_close(value, reference(x, weight.detach(), targets, None, "mean"))


def test_second_backward_is_refused():
    x, weight, _, targets = problem(9, 4, 7)
    value = linear_cross_entropy(x.requires_grad_(), weight, targets)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        value.backward()


def test_double_backward_is_refused():
    """The gradients are constants to autograd: a penalty on them would silently have no effect."""
    x, weight, _, targets = problem(9, 4, 7)
    value = linear_cross_entropy(x.requires_grad_(), weight, targets)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(value, x, create_graph=True)


# One token has too few errors to compare.
@pytest.mark.parametrize(
    ("dtype", "sizes"), [*zip([torch.float32, torch.bfloat16, torch.float16], SIZES[1:])]
)
def test_accuracy(dtype, sizes):
    x, weight, bias, targets = problem(*sizes)
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    result = run(linear_cross_entropy, x, weight, bias, targets)
    exact = run(reference, x.double(), weight.double(), bias.double(), targets)
    assert result[0].dtype == torch.float32  # the loss of half-precision features is not rounded to them

    def plain():
        """With the softmax rounded to the dtype, of which the loss is taken, too."""
        logits = F.linear(x, weight, bias)
        probability, counted = logits.softmax(-1), (targets >= 0)[:, None]
        chosen = F.one_hot(targets.clamp(min=0), sizes[2]).to(dtype)
        losses = (
            logits.amax(-1).float() - probability.amax(-1).float().log() - (logits * chosen).sum(-1).float()
        )
        slope = (probability - chosen) * counted
        gradients = (g / counted.sum() for g in (slope @ weight, slope.mT @ x, slope.sum(0)))
        return (losses * counted[:, 0]).sum() / counted.sum(), *gradients

    assert_as_accurate(result, plain, exact)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_with_a_loss_scale(reduction):
    """1/tokens alone would push these gradients under 6e-8; with the loss scale they are normal numbers."""
    scale = 65536.0 if reduction == "mean" else 8.0
    x, weight, _, targets = problem(4096, 8, 64, ignored=0)
    x, weight = (0.01 * x).half(), (0.01 * weight).half()
    _, grad_x, grad_weight = run(linear_cross_entropy, x, weight, None, targets, reduction, scale)
    exact = run(reference, x.double(), weight.double(), None, targets, reduction, scale)
    for actual, expected in zip((grad_x, grad_weight), exact[1:], strict=True):
        assert actual.dtype == torch.float16
        assert actual.isfinite().all()
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < 2e-3


def test_autocast():
    x, weight, bias, targets = problem(9, 4, 7)
    x, weight, bias = (t.float() for t in (x, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        value, *gradients = run(linear_cross_entropy, x, weight, bias, targets)
    assert value.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in gradients)
    expected, *_ = run(linear_cross_entropy, x.bfloat16(), weight.bfloat16(), bias, targets)
    torch.testing.assert_close(value, expected)
