from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from muse.layers.recompute import recomputed


def forward(x, weights, recompute, function=torch.tanh):
    output = function(x)
    storage = StorageWeakRef(output.untyped_storage())
    if recompute:
        with recomputed(output, function, x):
            y = sum(F.linear(output, weight) for weight in weights)
    else:
        y = sum(F.linear(output, weight) for weight in weights)
    return y, storage


@pytest.fixture
def problem():
    x = torch.randn(5, 4, requires_grad=True)
    return x, [torch.randn(3, 4, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize("recompute", [True, False])
def test_output_is_freed(problem, recompute):
    # GELU keeps its input only; tanh would keep its output by itself.
    y, storage = forward(*problem, recompute, F.gelu)
    assert y.requires_grad
    # The unchanged form shows that the observation works: there the products keep it.
    assert storage.expired() == recompute


def test_gradients_keep_their_bits(problem):
    x, weights = problem
    cotangent = torch.randn(5, 3)
    kept = torch.autograd.grad(forward(*problem, False)[0], (x, *weights), cotangent)
    again = torch.autograd.grad(forward(*problem, True)[0], (x, *weights), cotangent)
    for expected, actual in zip(kept, again, strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_function_runs_once_for_each_operation_that_needs_it(problem, grad_mode):
    calls = []

    def function(x):
        calls.append(torch.is_grad_enabled())
        return F.gelu(x)

    with torch.set_grad_enabled(grad_mode):
        y, _ = forward(*problem, True, function)
    assert calls == [grad_mode]
    if grad_mode:
        y.sum().backward()
        assert calls == [True, False, False]


def test_other_tensors_are_kept_as_they_are(problem):
    x, _ = problem
    output = torch.tanh(x)
    with recomputed(output, lambda _: pytest.fail("nothing here keeps the output"), x):
        y = (x * 2).square().sum()
    y.backward()
    torch.testing.assert_close(x.grad, 8 * x.detach())
