from __future__ import annotations

import copy
import math

import pytest
import torch
from support.configs import small_width
from support.runs import same
from torch import nn

from kernels.adamw import eager
from muse.config import ModelConfig, OptimConfig, StageConfig
from muse.layers import ComplexEmbedding, ComplexLinear, ComplexRMSNorm
from muse.models import build_model
from muse.runs.checkpoints import TrainingState, find_checkpoint, load_tensors
from muse.training.checkpoint import CheckpointWriter
from muse.training.optim import ModelOptimizer, first_non_finite

DTYPES = [torch.float32, torch.bfloat16]
WIDTH = small_width(layers=1, d_ff=12)
MODEL = ModelConfig(vocab_size=30, seq_len=8, real=WIDTH, complex=WIDTH)


def language_model(dtype=torch.float32, **options):
    stage = StageConfig(**{"precision": "fp32", **options, "number": str(options.get("number", 1))})
    return build_model(stage, MODEL, 30).to(dtype)


def set_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def advance(model, optimizer, step, factor=1.0):
    set_gradients(model, step)
    optimizer.attach_gradients()
    optimizer.step(step, factor)


def is_matrix(name, parameter):
    return name.endswith("weight") and parameter.dim() > 1


def all_equal(first, second):
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("options", [{"number": 1}, {"number": 1, "norm": "layer", "tied": False}], ids=str)
def test_adamw_is_that_of_torch(options):
    config = OptimConfig(lr=0.01, weight_decay=0.1)
    model = language_model(**options)
    twin = copy.deepcopy(model)
    optimizer = ModelOptimizer(model, config)
    named = list(twin.named_parameters())
    reference = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if is_matrix(n, p)], "weight_decay": 0.1},
            {"params": [p for n, p in named if not is_matrix(n, p)], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(4):
        advance(model, optimizer, step)
        set_gradients(twin, step)
        reference.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)


def test_muon_is_that_of_torch():
    config = OptimConfig(name="muon", muon_lr=0.05, weight_decay=0.1)
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4))
    start = copy.deepcopy(model)
    twin = copy.deepcopy(model)
    optimizer = ModelOptimizer(model, config)
    reference = torch.optim.Muon(
        [layer.weight for layer in twin], lr=0.05, momentum=config.momentum, weight_decay=0.1
    )
    for step in range(3):
        advance(model, optimizer, step)
        set_gradients(twin, step)
        reference.step()
    for ours, theirs, before in zip(model, twin, start, strict=True):
        torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-7, rtol=1e-6)
        assert not torch.equal(ours.weight, before.weight)
        assert not torch.equal(ours.bias, before.bias)  # by AdamW


def test_muon_takes_the_stacked_planes_of_a_complex_weight():
    config = OptimConfig(name="muon", muon_lr=0.05, weight_decay=0.0)
    layer = ComplexLinear(6, 5)
    stacked = nn.Parameter(layer.weight.detach().clone().flatten(0, 1))
    optimizer = ModelOptimizer(layer, config)
    reference = torch.optim.Muon([stacked], lr=0.05, momentum=config.momentum, weight_decay=0.0)
    for step in range(2):
        advance(layer, optimizer, step)
        stacked.grad = layer.weight.grad.flatten(0, 1)
        reference.step()
    torch.testing.assert_close(layer.weight.detach().flatten(0, 1), stacked.detach(), atol=1e-7, rtol=1e-6)


def test_muon_leaves_embedding_and_head_to_adamw():
    model = language_model(number=1, tied=False)
    optimizer = ModelOptimizer(model, OptimConfig(name="muon"))
    adam, muon = (sum(p.numel() for g in o.param_groups for p in g["params"]) for o in optimizer.optimizers)
    hidden = [m.weight.numel() for m in model.blocks.modules() if isinstance(m, ComplexLinear)]
    assert muon == sum(hidden)
    assert adam + muon == sum(p.numel() for p in model.parameters())


def ones(dtype=torch.bfloat16, rows=64, columns=64):
    layer = nn.Linear(columns, rows, bias=False, dtype=dtype)
    nn.init.ones_(layer.weight)
    return layer


def one_step(seed, step=0, lr=1e-4, rows=64, columns=64):
    """A weight of ones after AdamW's first step with a gradient of ones: 1 - lr before rounding."""
    layer = ones(rows=rows, columns=columns)
    optimizer = ModelOptimizer(layer, OptimConfig(lr=lr, weight_decay=0.0), seed)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.attach_gradients()
    optimizer.step(step)
    return layer.weight.detach().float()


ULP = 2**-8  # of bfloat16 just below 1 it is half of torch.finfo's eps


def standard_error(lr, count):
    share = lr / ULP
    return ULP * math.sqrt(share * (1 - share) / count)


@pytest.mark.parametrize("lr", [1e-4, 1e-3])
def test_stochastic_rounding_keeps_the_mean_of_an_update(lr):
    """Rounded to nearest the update of a fortieth (a quarter) of an ulp would vanish."""
    assert torch.tensor(1 - lr).bfloat16() == 1
    after = torch.stack([one_step(seed, lr=lr) for seed in range(24)])
    assert set(after.unique().tolist()) == {1.0, 1 - ULP}
    error = (1 - after.mean()).item() - lr
    assert abs(error) < 5 * standard_error(lr, after.numel())
    # Elements are rounded one by one, not together.
    each = 5 * standard_error(lr, after[0].numel())
    assert all(abs((1 - weight.mean()).item() - lr) < each for weight in after)


def test_many_small_updates_add_up():
    layer = ones()
    optimizer = ModelOptimizer(layer, OptimConfig(lr=1e-4, weight_decay=0.0))
    for step in range(50):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.attach_gradients()
        optimizer.step(step)
    assert abs((1 - layer.weight.float().mean()).item() / 50e-4 - 1) < 0.1


def test_rounding_depends_on_seed_and_step_alone():
    base = one_step(seed=3, step=5)
    torch.manual_seed(99)
    assert torch.equal(one_step(seed=3, step=5), base)
    assert not torch.equal(one_step(seed=4, step=5), base)
    assert not torch.equal(one_step(seed=3, step=6), base)


@pytest.mark.parametrize("elements", [1, 100, 7 * 50, 2**20])
def test_every_element_is_updated_whatever_the_chunks(elements, monkeypatch):
    whole = [one_step(0, lr=lr, rows=50, columns=7) for lr in (0.1, 1e-3)]
    monkeypatch.setattr(eager, "CHUNK", elements)
    # An update of many ulps moves each element, and no element by more than one ulp from its exact value.
    moved = one_step(0, lr=0.1, rows=50, columns=7)
    assert (moved - 0.9).abs().max() < ULP
    after = torch.stack([one_step(seed, lr=1e-3, rows=50, columns=7) for seed in range(60)])
    assert (after < 1).any(0).all()
    assert abs((1 - after.mean()).item() - 1e-3) < 5 * standard_error(1e-3, after.numel())
    assert torch.equal(moved, whole[0])
    assert torch.equal(after[0], whole[1])


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("elements", [5, 2**20])
def test_bfloat16_follows_float32(name, elements, monkeypatch):
    monkeypatch.setattr(eager, "CHUNK", elements)
    config = OptimConfig(name=name, lr=0.02)
    model = language_model(torch.bfloat16, number=1)
    twin = copy.deepcopy(model).float()
    optimizer, reference = ModelOptimizer(model, config), ModelOptimizer(twin, config)
    start = copy.deepcopy(twin)
    for step in range(5):
        advance(model, optimizer, step)
        set_gradients(twin, step)
        for parameter in twin.parameters():  # the gradients that bfloat16 can hold
            parameter.grad = parameter.grad.bfloat16().float()
        reference.attach_gradients()
        reference.step(step)
    for (label, ours), theirs, before in zip(
        model.named_parameters(), twin.parameters(), start.parameters(), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        moved, error = (theirs - before).norm(), (ours.float() - theirs).norm()
        assert moved > 0, label
        assert error < 0.25 * moved, label


class Planes(nn.Module):
    """One of each place in which a plane axis can be."""

    def __init__(self, dtype):
        super().__init__()
        self.linear = ComplexLinear(8, 6)
        self.embedding = ComplexEmbedding(9, 8)
        self.norm = ComplexRMSNorm(8)
        self.to(dtype)

    def complex_parameters(self):
        linear, embedding, norm = self.linear, self.embedding, self.norm
        return (linear.weight, 0), (linear.bias, 0), (embedding.weight, 1), (norm.gain, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("second_moment", ["modulus", "plane"])
@pytest.mark.parametrize("elements", [20, 2**20])
def test_direction_of_the_first_step(dtype, second_moment, elements, monkeypatch):
    """With one second moment for both planes a number moves along its gradient; with two it does not."""
    monkeypatch.setattr(eager, "CHUNK", elements)
    model = Planes(dtype)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)  # so that bfloat16 holds the update with its own relative precision
    optimizer = ModelOptimizer(model, OptimConfig(lr=0.1, second_moment=second_moment))
    advance(model, optimizer, 0)
    for parameter, axis in model.complex_parameters():
        update = torch.complex(*(-parameter.detach().float()).unbind(axis))
        gradient = torch.complex(*parameter.grad.float().unbind(axis))
        turn = (update * gradient.conj()).angle().abs()
        if second_moment == "modulus":
            assert turn.max() < (1e-4 if dtype == torch.float32 else 0.02)
            tolerance = {"rtol": 1e-4 if dtype == torch.float32 else 0.02, "atol": 0}
            torch.testing.assert_close(update.abs(), torch.full_like(update.abs(), 0.1), **tolerance)
        else:
            assert turn.max() > 0.3


def test_modulus_is_adam_with_the_squared_modulus():
    config = OptimConfig(lr=0.1, second_moment="modulus", weight_decay=0.0)
    model = Planes(torch.float32)
    start = copy.deepcopy(model)
    optimizer = ModelOptimizer(model, config)
    (b1, b2), steps = config.betas, 4
    histories = [[] for _ in model.complex_parameters()]
    for step in range(steps):
        advance(model, optimizer, step)
        for history, (parameter, axis) in zip(histories, model.complex_parameters(), strict=True):
            history.append(torch.complex(*parameter.grad.double().unbind(axis)))
    for history, (parameter, axis), (before, _) in zip(
        histories, model.complex_parameters(), start.complex_parameters(), strict=True
    ):
        z = torch.complex(*before.detach().double().unbind(axis))
        m, v = torch.zeros_like(z), torch.zeros_like(z.real)
        for step, gradient in enumerate(history, start=1):
            m = b1 * m + (1 - b1) * gradient
            v = b2 * v + (1 - b2) * gradient.abs().square()
            z = z - config.lr * (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + config.eps)
        after = torch.complex(*parameter.detach().double().unbind(axis))
        torch.testing.assert_close(after, z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("second_moment", ["modulus", "plane"])
def test_state_round_trip(dtype, name, second_moment, tmp_path, monkeypatch):
    monkeypatch.setattr(eager, "CHUNK", 50)
    config = OptimConfig(name=name, second_moment=second_moment)
    model = language_model(dtype, number=1)
    optimizer = ModelOptimizer(model, config, seed=2)
    for step in range(2):
        advance(model, optimizer, step)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    twin = copy.deepcopy(model)
    restored = ModelOptimizer(twin, config, seed=2)
    restored.load_state_dict(torch.load(tmp_path / "state.pt"))
    fresh_model = copy.deepcopy(model)
    fresh = ModelOptimizer(fresh_model, config, seed=2)
    for step in range(2, 4):
        advance(model, optimizer, step)
        advance(twin, restored, step)
        advance(fresh_model, fresh, step)
    assert all_equal(model, twin)
    assert not all_equal(model, fresh_model)  # the state matters


def through_a_checkpoint(model, optimizer, config, run):
    """The model and the optimiser that a process which continues the training has."""
    writer = CheckpointWriter(run / "checkpoints")
    tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    writer.save(tensors, TrainingState(optimizer.updates, {}, [], math.inf, None), best=False)
    other = language_model(next(model.parameters()).dtype, number=1)
    restored = ModelOptimizer(other, config, seed=2)
    tensors = {"model": other.state_dict(), "optimizer": restored.state_dict()}
    load_tensors(find_checkpoint(run), tensors)
    other.load_state_dict(tensors["model"])
    restored.load_state_dict(tensors["optimizer"])
    return other, restored


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("second_moment", ["modulus", "plane"])
def test_a_training_continued_from_checkpoints_again_and_again_is_one_training(
    dtype, name, second_moment, tmp_path, monkeypatch
):
    monkeypatch.setattr(eager, "CHUNK", 50)
    config = OptimConfig(name=name, second_moment=second_moment)
    model, twin = language_model(dtype, number=1), language_model(dtype, number=1)
    optimizer, restored = (ModelOptimizer(m, config, seed=2) for m in (model, twin))
    for step in range(6):
        advance(model, optimizer, step)
        advance(twin, restored, step)
        if step % 2:
            twin, restored = through_a_checkpoint(twin, restored, config, tmp_path)
        assert all_equal(model, twin)
        assert same(optimizer.state_dict(), restored.state_dict())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_state_is_by_parameter_and_knows_no_chunks(dtype, name, monkeypatch):
    config = OptimConfig(name=name)
    model = language_model(dtype, number=1)
    monkeypatch.setattr(eager, "CHUNK", 50)
    optimizer = ModelOptimizer(model, config)
    for step in range(2):
        advance(model, optimizer, step)
    state = optimizer.state_dict()
    assert int(state["updates"]) == 2
    assert state["moments"].keys() == dict(model.named_parameters()).keys()
    for label, parameter in model.named_parameters():
        for moment in state["moments"][label].values():
            assert moment.shape == parameter.shape
            assert moment.dtype == parameter.dtype
            assert moment.abs().max() > 0
    monkeypatch.setattr(eager, "CHUNK", 2**20)
    whole = ModelOptimizer(copy.deepcopy(model), config)
    whole.load_state_dict(copy.deepcopy(state))
    assert same(whole.state_dict(), state)


@pytest.mark.parametrize(
    "options",
    [
        {"number": 0},
        {"number": 1},
        {"number": 1, "norm": "layer"},
        {"number": 1, "mixer": "none"},
        {"number": 1, "activation": "mod_relu"},
        {"number": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(options, name):
    options = {"activation": "gelu"} | options if options["number"] == 0 else options
    model = language_model(**options)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    config = OptimConfig(name=name, lr=0.1, muon_lr=0.1, weight_decay=0.5)
    optimizer = ModelOptimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.attach_gradients()
    optimizer.step(0)
    kept = set()
    for label, parameter in model.named_parameters():
        expected = 0.95 if is_matrix(label, parameter) else 1.0
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected))
        if expected == 1:
            kept.add(label.rpartition(".")[2])
    assert kept <= {"gain", "gamma", "beta", "bias", "phase", "weight", "w1", "b1", "w2"}
    assert kept


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_factor_scales_the_gradients(dtype, name):
    config = OptimConfig(name=name, eps=1.0)  # a large offset, so that AdamW feels the size of a gradient
    models = [language_model(dtype, number=1) for _ in range(3)]
    for model, scale, factor in zip(models, (1.0, 0.25, 1.0), (0.25, 1.0, 1.0), strict=True):
        optimizer = ModelOptimizer(model, config)
        set_gradients(model)
        for parameter in model.parameters():
            parameter.grad.mul_(scale)
        optimizer.attach_gradients()
        optimizer.step(0, factor)
    assert all_equal(models[0], models[1])
    assert not all_equal(models[0], models[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_without_gradient_stay(dtype):
    model = Planes(dtype)
    before = copy.deepcopy(model)
    optimizer = ModelOptimizer(model, OptimConfig(second_moment="modulus"))
    set_gradients(model)
    model.norm.gain.grad = None
    optimizer.attach_gradients()
    optimizer.step(0)
    assert torch.equal(model.norm.gain, before.norm.gain)
    assert not torch.equal(model.linear.weight, before.linear.weight)


def test_float32_parameters_among_bfloat16_ones_are_not_rounded():
    """A norm kept in float32 beside bfloat16 matrices steps as it would alone."""
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.LayerNorm(4))
    alone = copy.deepcopy(model[1])
    optimizer, reference = ModelOptimizer(model, OptimConfig()), ModelOptimizer(alone, OptimConfig())
    for step in range(3):
        set_gradients(model, step)
        for ours, theirs in zip(model[1].parameters(), alone.parameters(), strict=True):
            theirs.grad = ours.grad.clone()
        optimizer.attach_gradients()
        optimizer.step(step, 0.5)
        reference.attach_gradients()
        reference.step(step, 0.5)
    assert all_equal(model[1], alone)


def test_learning_rate_is_a_fraction_of_each_peak():
    config = OptimConfig(name="muon", lr=0.01, muon_lr=0.05, weight_decay=0.0)
    models = [language_model(number=1) for _ in range(2)]
    moved = []
    for model, factor in zip(models, (1.0, 0.5), strict=True):
        before = copy.deepcopy(model)
        optimizer = ModelOptimizer(model, config)
        optimizer.set_learning_rate(factor)
        advance(model, optimizer, 0)
        pairs = zip(model.parameters(), before.parameters(), strict=True)
        moved.append([(a.float() - b.float()).norm().item() for a, b in pairs])
    for full, half in zip(*moved, strict=True):
        assert half / full == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_norm(dtype):
    model = Planes(dtype)
    set_gradients(model)
    model.linear.bias.grad = None
    flat = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
    norm = ModelOptimizer(model, OptimConfig()).gradient_norm()
    assert norm.dtype == torch.float32
    # Rows of bfloat16 gradients may be summed up in bfloat16.
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert norm.item() == pytest.approx(flat.norm().item(), rel=tolerance)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_first_non_finite(value):
    model = Planes(torch.float32)
    set_gradients(model)
    assert first_non_finite(model) is None
    model.embedding.weight.grad[3, 1, 2] = value
    assert first_non_finite(model) == "the gradient of embedding.weight"
    with torch.no_grad():
        model.linear.bias[0, 0] = value
    assert first_non_finite(model) == "linear.bias"
