from __future__ import annotations

import pytest
import torch
from support.dtypes import DTYPES, HALVES, in_each_half
from support.head import head_inputs, results, rounded
from support.padding import padded
from support.rounding import assert_as_accurate

from kernels import linear_cross_entropy as operation
from kernels.launch import eager
from kernels.linear_cross_entropy import linear_cross_entropy, plain
from muse.models import loss
from muse.models.dialectic import Antithesis

# Tokens, vocabulary, features. The interpreter's blocks are 16 tokens and words and, of losses, 32 features.
ONE = (1, 1, 1)
ONE_LESS = (15, 31, 31)
ONE_MORE = (17, 33, 33)
# Blocks that end with the words, or with the features, of one block or of several.
EVEN = (32, 48, 32)
SEVERAL = (19, 40, 64)
WIDE = (5, 17, 70)
ALL = [ONE, ONE_LESS, ONE_MORE, EVEN, SEVERAL, WIDE]
SMALL = (17, 21, 6)
# Programs for each of the blocks there, so that the other side is split.
FEW = 2


@pytest.fixture
def splits(monkeypatch):
    """Of each launch."""
    found = []

    def launch(kernel, grid, *arguments, **options):
        found.append((kernel.__name__, grid[1]))
        implementation_launch(kernel, grid, *arguments, **options)

    implementation_launch = operation.triton_code.launch
    monkeypatch.setattr(operation.triton_code, "launch", launch)
    return found


def check(given, samples=8):
    got = results(linear_cross_entropy, *given)
    exact = rounded(*(t.double() if t is not None and t.is_floating_point() else t for t in given))
    assert_as_accurate(got, lambda: rounded(*given), exact, samples)
    return got


def alternating():
    return in_each_half([(sizes, (torch.float16, torch.float32)[k % 2]) for k, sizes in enumerate(ALL)])


@pytest.mark.parametrize(("sizes", "dtype"), alternating())
@pytest.mark.parametrize("with_bias", [True, False])
def test_losses_and_every_gradient(sizes, dtype, with_bias, device, splits):
    x, weight, bias, targets, grad = head_inputs(*sizes, dtype, device)
    got = check((x, weight, bias if with_bias else None, targets, grad))
    assert [t.dtype for t in got] == [torch.float32] + [dtype] * (2 + with_bias)
    names = [name for name, _ in splits]
    assert names == ["_losses_kernel", "_gradient_kernel", "_gradient_kernel"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_other_side_is_split_and_repeated_calls_are_bitwise_equal(dtype, device, splits, monkeypatch):
    pinned = operation.PINNED
    blocks = {
        name: pinned.options(name, torch.empty(0, device=device, dtype=dtype), 8)["BLOCK_N"]
        for name in ("losses", "gradient")
    }
    most = max(blocks.values())
    # An odd number of blocks, the last of which has one row.
    given = head_inputs(6 * most + 1, 6 * most + 1, 8, dtype, device)
    monkeypatch.setattr(operation.triton_code, "PROGRAMS", FEW * 7)
    got = check(given)
    assert all(count > 1 for _, count in splits)
    assert all(map(torch.equal, got, results(linear_cross_entropy, *given)))


@pytest.mark.parametrize("dtype", HALVES)
def test_planar_weight_and_wide_bias(dtype, device):
    x, weight, bias, targets, grad = head_inputs(17, 21, 6, dtype, device)
    planar = padded(weight.unflatten(1, (2, 3)), 1, 0, 1)
    flat = check((x, weight, bias.float(), targets, grad))
    got = check((x, planar, bias.float(), targets, grad))
    assert got[2].shape == (21, 2, 3)
    assert all(torch.equal(one, other.view(one.shape)) for one, other in zip(got, flat, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype, device):
    x, weight, bias, targets, grad = head_inputs(*SMALL, dtype, device)
    expected = results(linear_cross_entropy, x, weight, bias, targets, grad)
    targets, grad, bias = (torch.stack((t, t - 1), -1)[:, 0] for t in (targets, grad, bias))
    got = results(linear_cross_entropy, x.mT.contiguous().mT, weight.mT.contiguous().mT, bias, targets, grad)
    assert all(map(torch.equal, got, expected))


def test_gradients_of_a_mean_are_of_one_number(device):
    """It comes with a stride of 0."""
    *given, grad = head_inputs(*SMALL, torch.float32, device)
    check((*given, grad[0].expand(len(grad))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(dtype, device):
    x, weight, bias, targets, grad = head_inputs(17, 40, 8, dtype, device)
    got = check((x, weight * 30, bias, targets, grad))
    assert all(t.isfinite().all() for t in got)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("factor", "size"), [(2.0**-20, 2.0**7), (2.0**17, 2.0**-7)])
def test_small_and_large_gradients(factor, size, dtype, device):
    """That of a logit may be out of float16's range, as by a mean or a loss scale, where that of x is not."""
    x, weight, bias, targets, grad = head_inputs(33, 21, 8, dtype, device)

    def gradient(factor, size):
        leaf = (x / size).requires_grad_()
        losses = linear_cross_entropy(leaf, weight * size, targets, bias)
        return torch.autograd.grad(losses, leaf, grad * len(grad) * factor)[0].float()

    expected = gradient(1.0, 1.0) * (factor * size)
    within = {"rtol": 1e-2, "atol": 1e-3 * expected.abs().max().item()}
    torch.testing.assert_close(gradient(factor, size), expected, **within)


def test_words_that_are_ruled_out(device):
    """A bias of -inf, of a whole block of words, too."""
    x, weight, bias, targets, grad = head_inputs(17, 70, 6, torch.float32, device)
    bias[:40] = -torch.inf
    targets.clamp_(min=50)
    got = results(linear_cross_entropy, x, weight, bias, targets, grad)
    expected = results(
        linear_cross_entropy, x, weight[40:], bias[40:], torch.where(targets < 0, targets, targets - 40), grad
    )
    assert all(t.isfinite().all() for t in got)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    for actual, there in zip(got[2:], expected[2:], strict=True):
        torch.testing.assert_close(actual[40:], there)
        assert (actual[:40] == 0).all()


def test_one_wrong_number_is_seen(device):
    given = head_inputs(*SMALL, torch.float32, device)
    got = results(linear_cross_entropy, *given)
    exact = rounded(*(t.double() if t.is_floating_point() else t for t in given))
    for index in range(len(got)):
        wrong = [t.clone() for t in got]
        wrong[index].view(-1)[0] += 1e-4 * wrong[index].abs().max()
        with pytest.raises(AssertionError, match=f"tensor {index}"):
            assert_as_accurate(wrong, lambda: rounded(*given), exact, 8)


def test_targets_that_do_not_count(device):
    """Neither their states nor how many they are change anything else."""
    x, weight, bias, targets, grad = head_inputs(*SMALL, torch.float32, device, ignored=0.5)
    got = results(linear_cross_entropy, x, weight, bias, targets, grad)
    counted = targets >= 0
    assert 0 < counted.sum() < len(targets)
    assert (got[0][~counted] == 0).all()
    assert (got[1][~counted] == 0).all()
    x[~counted] += 1
    again = results(linear_cross_entropy, x, weight, bias, torch.where(counted, targets, -100), grad)
    assert all(map(torch.equal, got, again))


def test_a_target_outside_of_the_vocabulary_is_not_a_number(device):
    x, weight, bias, targets, _ = head_inputs(*SMALL, torch.float32, device)
    targets[3] = len(weight)
    losses = linear_cross_entropy(x, weight, targets, bias)
    assert losses.isnan().tolist() == [index == 3 for index in range(len(x))]


def test_no_tokens(device):
    given = head_inputs(0, 21, 6, torch.float32, device)
    losses, *gradients = results(linear_cross_entropy, *given)
    assert losses.shape == (0,)
    assert all((t == 0).all() for t in gradients)


def test_more_features_than_a_program_holds(device, splits):
    """Losses by the kernel, gradients by the library."""
    width = max(map(int, operation.PINNED.table["gradient"]["interpreter"]["32"])) + 1
    if device.type != "cpu":
        width = 1025
    given = head_inputs(5, 17, width, torch.float32, device)
    check(given)
    assert [name for name, _ in splits] == ["_losses_kernel"]


def test_eager_and_triton_agree(device):
    given = head_inputs(*SMALL, torch.float32, device)
    got = results(linear_cross_entropy, *given)
    with eager():
        expected = results(linear_cross_entropy, *given)
    for actual, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[0], plain.linear_cross_entropy(given[0], given[1], given[3], given[2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_of_the_models(dtype, reduction, device, splits, monkeypatch):
    """As by chunks, without logits of a chunk."""
    x, weight, bias, targets, _ = head_inputs(17, 21, 32, dtype, device)
    monkeypatch.setattr(operation, "takes_triton", lambda x, training: operation.use_triton(x))

    def run():
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        value = loss.linear_cross_entropy(*leaves[:2], targets, leaves[2], reduction)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    got = run()
    assert len(splits) == 3
    with eager():
        expected = run()
    within = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 5e-3, "atol": 5e-3}
    for actual, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(actual, reference, **within)
    with torch.no_grad():
        value = loss.linear_cross_entropy(x, weight, targets, bias, reduction)
    torch.testing.assert_close(value, got[0])
    assert len(splits) == 4


def test_losses_of_the_models_tokens(device, splits, monkeypatch):
    """With their entropy, which the kernel does not make, by chunks."""
    x, weight, bias, targets, _ = head_inputs(17, 21, 32, torch.float32, device)
    monkeypatch.setattr(operation, "takes_triton", lambda x, training: operation.use_triton(x))
    losses, nothing = loss.linear_losses(x, weight, targets, bias)
    assert (len(splits), nothing) == (1, None)
    others, entropies = loss.linear_losses(x, weight, targets, bias, entropy=True)
    assert len(splits) == 1
    assert entropies.shape == losses.shape
    torch.testing.assert_close(losses, others.where(targets >= 0, 0.0))


def test_an_antithesis_is_given_logits(device, splits, monkeypatch):
    x, weight, bias, targets, _ = head_inputs(17, 21, 32, torch.float32, device)
    monkeypatch.setattr(operation, "takes_triton", lambda x, training: operation.use_triton(x))
    antithesis = Antithesis("mlp", 32, 4).to(device)
    value = loss.linear_cross_entropy(x, weight, targets, bias, antithesis=antithesis)
    assert splits == []
    # Its energies are 0 at the start.
    torch.testing.assert_close(value, loss.linear_cross_entropy(x, weight, targets, bias))
    assert len(splits) == 1
