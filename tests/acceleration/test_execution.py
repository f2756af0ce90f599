from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
from support.acceleration import VOCAB, batch, build, exact, gradients, joined, relative_error

from muse.acceleration import Execution
from muse.config import OptimConfig

CHOICES = {
    "plain": Execution(),
    "attention": Execution(attention=True),
    "loss": Execution(loss=True),
    "optimizer": Execution(optimizer=True),
    "threads": Execution(threads=2),
    "all": Execution(attention=True, loss=True, optimizer=True, threads=2),
}
both_optimizers = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


def results(execution, model, inputs, targets, **options):
    model = copy.deepcopy(model)
    execution.apply(model)
    loss = execution.training_loss(model, inputs, targets, **options)
    return loss.detach(), gradients(model, loss)


class Saved:
    """Context that notes the shapes of what autograd saves in it."""

    def __init__(self):
        self.shapes = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.note, lambda x: x)

    def note(self, x):
        self.shapes.append(tuple(x.shape))
        return x

    def __enter__(self):
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


# ---- The loss


@pytest.mark.parametrize(
    ("choice", "tied"),
    [
        ("plain", False),
        ("plain", True),
        ("attention", False),
        ("loss", False),
        ("loss", True),
        ("optimizer", False),
        ("threads", True),
        ("all", False),
        ("all", True),
    ],
)
def test_loss_and_gradients_against_double_precision(choice, tied):
    model, data = build(tied=tied), batch(4, 21)
    loss, found = results(CHOICES[choice], model, *data)
    expected, wanted = exact(model, *data)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name in wanted:
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], wanted[name]) < 1e-5, name


@pytest.mark.parametrize("others", [{}, {"attention": True, "loss": True}], ids=["alone", "with the others"])
def test_half_precision_products_change_the_gradients_by_their_rounding(others):
    model, data = build(), batch()
    loss, found = results(Execution(products=True, **others), model, *data)
    expected, wanted = exact(model, *data)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2**-8)
    assert 2**-11 < relative_error(joined(found), joined(wanted)) < 2**-6
    for name in wanted:
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], wanted[name]) < 2**-5, name


def test_products_are_in_half_precision_only_on_request():
    for products in (False, True):
        model, dtypes = build(), []
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not model.head:
                module.register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
        Execution(products=products).training_loss(model, *batch())
        assert dtypes == 8 * [torch.bfloat16 if products else torch.float32]


@pytest.mark.parametrize("loss", [False, True])
@pytest.mark.parametrize("attention", [False, True])
def test_what_is_not_kept_for_the_backward_pass(attention, loss):
    """Fused attention keeps no weights (B, H, S, S), the loss no logits (B * S, V)."""
    model, (inputs, targets) = build(), batch(3, 21)
    execution = Execution(attention=attention, loss=loss)
    execution.apply(model)
    with Saved() as saved:
        execution.training_loss(model, inputs, targets)
    assert ((3, 4, 21, 21) in saved.shapes) is not attention
    assert ((3 * 21, VOCAB) in saved.shapes) is not loss


@pytest.mark.parametrize("execution", [Execution(), Execution(loss=True)], ids=["plain", "loss"])
def test_saving_surrounds_all_before_the_head(execution):
    model, (inputs, targets) = build(), batch(3, 21)
    inside, all_of_it = Saved(), Saved()
    loss, found = results(execution, model, inputs, targets, saving=inside)
    with all_of_it:
        model.features(inputs)
    assert inside.shapes == all_of_it.shapes
    expected, wanted = results(execution, model, inputs, targets)
    assert torch.equal(loss, expected)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# ---- What is set on the modules


def test_applying_the_plain_execution_restores_it(compiler, threads):
    model, (inputs, _) = build(), batch()
    with torch.no_grad():
        expected = model(inputs)
        Execution(attention=True, compile=True, threads=threads + 1).apply(model)
        assert torch.get_num_threads() == threads + 1
        changed = model(inputs)
        assert compiler.calls == len(model.blocks)
        assert relative_error(changed, expected) < 1e-5
        Execution(threads=threads).apply(model)
        assert torch.get_num_threads() == threads
        assert torch.equal(model(inputs), expected)
    assert compiler.calls == len(model.blocks)


def test_no_number_of_threads_leaves_them(threads):
    torch.set_num_threads(threads + 1)
    Execution().apply(build())
    assert torch.get_num_threads() == threads + 1


def evaluate(model, inputs, error):
    model(inputs)
    if error is not None:
        raise error


@pytest.mark.parametrize("error", [None, ValueError("evaluation")], ids=["no error", "error"])
def test_compiled_blocks_are_left_aside_and_taken_up_again(compiler, error):
    model, (inputs, targets) = build(), batch()
    execution = Execution(compile=True)
    execution.apply(model)
    calls = [block._compiled_call_impl for block in model.blocks]
    assert None not in calls
    with suppress(ValueError), execution.eager(model):
        evaluate(model, inputs, error)
    assert compiler.calls == 0
    assert [block._compiled_call_impl for block in model.blocks] == calls
    execution.training_loss(model, inputs, targets)
    assert compiler.calls == len(model.blocks)


def test_eager_leaves_uncompiled_blocks_uncompiled(compiler):
    model, (inputs, _) = build(), batch()
    execution = Execution()
    execution.apply(model)
    with execution.eager(model):
        model(inputs)
    model(inputs)
    assert compiler.calls == 0


@pytest.mark.slow
def test_compiled_blocks_mean_the_same(monkeypatch):
    """Through the compiler's front end; its back end would take a minute."""
    compile_with, model, data = torch.compile, build(layers=1), batch()

    def by_front_end(function):
        return compile_with(function, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", by_front_end)
    loss, found = results(Execution(attention=True, compile=True), model, *data)
    expected, wanted = exact(model, *data)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name in wanted:
        assert relative_error(found[name], wanted[name]) < 1e-5, name


# ---- The optimiser


def adamw_by_formula(parameter, gradients, options):
    """Loshchilov and Hutter, in float64."""
    x = parameter.detach().double()
    m = v = torch.zeros_like(x)
    decay = options.weight_decay if x.dim() > 1 else 0.0
    for step, gradient in enumerate(gradients, 1):
        g = gradient.double()
        m = options.betas[0] * m + (1 - options.betas[0]) * g
        v = options.betas[1] * v + (1 - options.betas[1]) * g * g
        unbiased = m / (1 - options.betas[0] ** step), v / (1 - options.betas[1] ** step)
        x = x - options.lr * (decay * x + unbiased[0] / (unbiased[1].sqrt() + options.eps))
    return x


@both_optimizers
def test_three_updates_against_the_formula(fused):
    options = OptimConfig(lr=0.01, weight_decay=0.3, betas=[0.8, 0.97], eps=1e-3)
    model = build()
    before = copy.deepcopy(model)
    optimizer = Execution(optimizer=fused).build_optimizer(model, options)
    given = {name: [] for name, _ in model.named_parameters()}
    for _ in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = 0.01 * torch.randn_like(parameter)
            given[name].append(parameter.grad.clone())
        optimizer.step()
    for name, parameter in before.named_parameters():
        expected = adamw_by_formula(parameter, given[name], options)
        moved = expected - parameter.double()
        assert moved.abs().max() > 1e-3, name
        assert relative_error(model.get_parameter(name).double() - parameter.double(), moved) < 1e-4, name


def test_fused_and_plain_updates_are_the_same():
    models, data = [build(), build()], batch()
    for model, fused in zip(models, (False, True), strict=True):
        execution = Execution(optimizer=fused)
        optimizer = execution.build_optimizer(model, OptimConfig(lr=1e-3))
        for _ in range(3):
            execution.training_loss(model, *data).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    first, second, start = (dict(m.named_parameters()) for m in (*models, build()))
    for name, parameter in first.items():
        assert not torch.equal(parameter, start[name])
        # The gradient of the bias of keys is zero but for rounding, which AdamW makes steps of.
        parts = slice(None)
        if name.endswith("projection.bias"):
            parts = torch.tensor([*range(32), *range(64, 96)])
        torch.testing.assert_close(second[name][parts], parameter[parts], rtol=1e-5, atol=1e-6)


@both_optimizers
def test_vectors_do_not_decay(fused):
    model = build()
    before = copy.deepcopy(model)
    options = OptimConfig(lr=0.1, weight_decay=0.5)
    optimizer = Execution(optimizer=fused).build_optimizer(model, options)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        old = before.get_parameter(name)
        if parameter.dim() > 1:
            torch.testing.assert_close(parameter, 0.95 * old)
        else:
            assert torch.equal(parameter, old), name


@pytest.mark.parametrize("tied", [False, True])
@both_optimizers
def test_every_parameter_is_updated_by_one_group(tied, fused):
    model = build(tied=tied)
    optimizer = Execution(optimizer=fused).build_optimizer(model, OptimConfig())
    updated = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(updated) == sorted(id(p) for p in model.parameters())
    assert {bool(group["fused"]) for group in optimizer.param_groups} == {fused}
