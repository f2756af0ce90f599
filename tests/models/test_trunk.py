"""The reversible trunk: its gradient is that of what it computes, and it is rebuilt to the last bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.configs import SEQ_LEN, VOCAB, run_config, small_sizes, stage_config
from torch import nn

from muse.errors import ConfigError, RunError
from muse.measure.peak_memory import peak_memory
from muse.models import build_model, trunk
from muse.models.trunk import FRACTION_BITS, GROWTH_BITS, UNIT, drifts_of, kicks_of
from muse.training.step import NotFinite, training_step

STAGES = ["0", "1", "2", "3"]
CPU = torch.device("cpu")


def build(number="1", layers=2, precision="fp32", **options):
    stage = stage_config(number, precision, trunk="reversible", **options)
    return build_model(stage, small_sizes(layers=layers), VOCAB)


def batch(length=SEQ_LEN):
    tokens = torch.randint(VOCAB, (2, length + 1))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model):
    return [parameter.grad for parameter in model.parameters()]


class Rounded(torch.autograd.Function):
    """Rounding that counts as the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def loss_by_autograd(model, tokens, targets):
    """The same kicks and drifts with the same rounding, every intermediate result kept."""
    state = model.embedding(tokens)
    z, v = Rounded.apply(state.double() / UNIT) * UNIT, 0.0
    sublayers = [sublayer for block in model.blocks for sublayer in block.sublayers()]
    drifts = drifts_of(len(sublayers), model.trunk.drifts[1])
    for sublayer, kick, drift in zip(sublayers, kicks_of(drifts), drifts, strict=True):
        v = v + Rounded.apply(sublayer(z.to(state.dtype)).double() * (kick / UNIT))
        z = z + Rounded.apply(v * drift) * UNIT
    return model.loss_of(model.read_out(model.norm(z.to(state.dtype))), targets)


@pytest.mark.parametrize(
    ("number", "layers", "options"),
    [
        *((number, 2, {}) for number in STAGES),
        ("0", 2, {"dropout": 0.3}),
        ("1", 2, {"dropout": 0.3, "trunk_decay": 0.9}),
        ("2", 2, {"dropout": 0.3, "gradient": "checkpoint"}),
        ("1", 24, {}),
        ("2", 24, {"integrator": "position_verlet"}),
    ],
)
def test_gradients_are_those_of_plain_autograd(number, layers, options):
    model, given = build(number, layers, **options).double(), batch()
    torch.manual_seed(3)
    wanted = loss_by_autograd(model, *given)
    wanted.backward()
    expected = gradients(model)
    model.zero_grad()
    torch.manual_seed(3)
    loss = model.loss(*given)
    loss.backward()
    assert torch.equal(loss, wanted)
    for found, known in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(found, known, rtol=1e-9, atol=1e-12 * known.abs().max().item())


@pytest.fixture
def states(monkeypatch):
    """Of every call of a trunk its state, and z as it was at first."""
    found = []
    fixed_point = trunk._FixedPoint

    def recorded(*arguments):
        state = fixed_point(*arguments)
        found.append((state, state.position.clone()))
        return state

    monkeypatch.setattr(fixed_point, "release", lambda state: None)
    monkeypatch.setattr(trunk, "_FixedPoint", recorded)
    return found


@pytest.mark.parametrize(
    ("layers", "number", "precision", "options"),
    [
        *((48, number, "bf16", {}) for number in STAGES),
        *((6, number, "fp32", {}) for number in STAGES),
        (6, "1", "bf16-mixed", {"dropout": 0.3, "activation": "mod_relu", "norm": "layer"}),
        (6, "1", "bf16", {"score": "phase", "dropout": 0.3}),
        (6, "2", "bf16", {"force_precision": "bf16", "gradient": "reversible", "dropout": 0.3}),
        (6, "2", "fp32", {"gradient": "backprop", "integrator": "leapfrog", "dropout": 0.3}),
    ],
)
def test_every_state_is_rebuilt_to_the_last_bit_at_any_depth(states, layers, number, precision, options):
    step = training_step(
        run_config(stage_config(number, precision)), build(number, layers, precision, **options).train()
    )
    step.gradients([batch(), batch()])
    assert len(states) == 2
    for state, start in states:
        assert state.done == 0
        assert torch.equal(state.position, start)
        assert not state.momentum.any()
    for gradient in gradients(step.model):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("number", STAGES)
def test_what_is_kept_does_not_grow_with_the_depth(number):
    kept = []
    for layers in (2, 12):
        model, (tokens, targets) = build(number, layers), batch()
        model.loss(tokens, targets).backward()
        with peak_memory(CPU, model) as meter:
            features = model.features(tokens)
            kept.append(meter.current() - meter.before)
            del features
    assert kept[0] == kept[1]


def test_what_a_backward_pass_takes_does_not_grow_with_the_depth():
    peaks = []
    for layers in (2, 12):
        model, given = build("1", layers), batch(64)
        model.loss(*given).backward()
        gradient_bytes = sum(gradient.nbytes for gradient in gradients(model))
        with peak_memory(CPU, model) as meter:
            model.loss(*given).backward()
            peaks.append(meter.peak() - meter.before)
        # Those that are there already are added to.
        assert sum(gradient.nbytes for gradient in gradients(model)) == gradient_bytes
    assert peaks[1] <= 1.01 * peaks[0]


@pytest.mark.parametrize(("layers", "decay"), [*itertools.product([1, 2, 8, 96], [0.01, 0.5, 0.9, 1.0])])
def test_every_sublayer_counts_once_in_the_end_and_the_momentum_fits(layers, decay):
    drifts = drifts_of(layers, decay)
    kicks = kicks_of(drifts)
    for number in range(layers):
        assert kicks[number] * math.fsum(drifts[number:]) == pytest.approx(1, rel=1e-14)
    assert all(later >= decay * drift * (1 - 1e-14) for drift, later in itertools.pairwise(drifts))
    assert max(drifts) == drifts[0] == 1
    assert max(kicks) <= 2.0**GROWTH_BITS * (1 + 1e-9)
    assert FRACTION_BITS + GROWTH_BITS < 53


def spoil(model):
    """Let a sub-layer give something else in the backward pass."""
    first = next(iter(model.blocks[0].attention.parameters()))
    first.data.mul_(1.01)


def test_a_state_that_is_not_rebuilt_is_an_error_that_says_why():
    model, given = build(), batch()
    loss = model.loss(*given)
    spoil(model)
    with pytest.raises(RunError, match=r"not rebuilt to the last bit.*stage\.trunk=residual"):
        loss.backward()


def test_numbers_that_the_momentum_cannot_hold_are_noticed():
    model, given = build(layers=24), batch()
    model.blocks[-1].ffn.down.weight.data.mul_(2.0**20)
    with pytest.raises(RunError, match="more than its numbers hold"):
        model.loss(*given).backward()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_whose_states_are_not_rebuilt_is_taken_again(monkeypatch, dropout):
    """The result is that of a step on checkpointing from the start, dropout and all."""
    given = [batch(), batch()]
    steps = [training_step(run_config(stage_config()), build(dropout=dropout).train()) for _ in range(2)]
    steps[1].model.trunk.fallen_back = True
    undo = trunk._FixedPoint.undo_kick
    monkeypatch.setattr(trunk._FixedPoint, "undo_kick", lambda state, change: undo(state, change * 1.001))
    results = []
    for step in steps:
        torch.manual_seed(5)
        if step is steps[0]:
            with pytest.warns(UserWarning, match="^trunk: .*not rebuilt to the last bit"):
                results.append(step.take(0, given))
        else:
            results.append(step.take(0, given))
    assert results[0] == results[1]
    assert steps[0].model.trunk.fallback_count == 1
    for x, y in zip(steps[0].model.parameters(), steps[1].model.parameters(), strict=True):
        assert torch.equal(x, y)


def test_a_loss_that_is_not_finite_is_no_reason_to_fall_back():
    step = training_step(run_config(stage_config()), build().train())
    next(iter(step.model.blocks[1].ffn.parameters())).data[0, 0, 0] = math.nan
    with pytest.raises(NotFinite, match=r"blocks\.1\.ffn"):
        step.take(0, [batch()])
    assert not step.model.trunk.fallen_back


@pytest.mark.parametrize("number", STAGES)
def test_after_a_fallback_the_trunk_means_the_same(number):
    model, given = build(number, 3).double(), batch()
    model.loss(*given).backward()
    expected = gradients(model)
    model.zero_grad()
    model.trunk.fallen_back = True
    model.loss(*given).backward()
    for found, known in zip(gradients(model), expected, strict=True):
        # The state was rounded to multiples of 2^-20.
        torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-4 * known.abs().max().item())


def test_a_second_backward_pass_and_a_second_derivative_are_refused():
    model, given = build(), batch()
    loss = model.loss(*given)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"only once|undone once"):
        loss.backward()
    features = model.features(given[0]).sum()
    features.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="undone once"):
        features.backward()
    features = model.features(given[0]).sum()
    with pytest.raises(RuntimeError, match=r"no second derivative; stage\.trunk=residual"):
        torch.autograd.grad(features, list(model.blocks.parameters()), create_graph=True)


def test_frozen_parameters_get_no_gradient_and_the_others_the_same():
    model, given = build(), batch()
    model.loss(*given).backward()
    expected = gradients(model)
    model.zero_grad()
    frozen = [*model.embedding.parameters(), *model.blocks[0].attention.parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.loss(*given).backward()
    for parameter, known in zip(model.parameters(), expected, strict=True):
        if any(parameter is one for one in frozen):
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, known)


def test_without_gradients_the_features_are_the_same():
    model, (tokens, _) = build("2", 3), batch()
    features = model.features(tokens)
    with torch.no_grad():
        assert torch.equal(model.features(tokens), features)


@pytest.mark.slow
@pytest.mark.parametrize("number", STAGES)
def test_compiled_sublayers_are_rebuilt_and_mean_the_same(states, number):
    torch._dynamo.reset()
    model, given = build(number, 2), batch()
    model.loss(*given).backward()
    expected = gradients(model)
    model.zero_grad()
    compile_module = nn.Module.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda module: compile_module(module, backend="aot_eager"))
        model.compile_features()
    model.loss(*given).backward()
    torch._dynamo.reset()
    state, start = states[-1]
    assert torch.equal(state.position, start)
    assert not state.momentum.any()
    for found, known in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-5)


def test_blocks_that_are_computed_again_give_the_same_bits_and_keep_less():
    results, kept = [], []
    for options in ({}, {"recompute": "block"}, {"recompute": "block", "recompute_blocks": 3}):
        stage = stage_config("1", "bf16", dropout=0.3, **options)
        model = build_model(stage, small_sizes(layers=4), VOCAB)
        torch.manual_seed(0)
        given = batch()
        loss = model.loss(*given)
        loss.backward()
        results.append([loss, *gradients(model)])
        with peak_memory(CPU, model) as meter:
            features = model.features(given[0])
            kept.append(meter.current() - meter.before)
            del features
    for found in results[1:]:
        for x, y in zip(found, results[0], strict=True):
            assert torch.equal(x, y)
    assert kept[2] < kept[1] < kept[0] / 3


@pytest.mark.parametrize(
    ("number", "options", "message"),
    [
        ("1", {"mixer": "none"}, "needs blocks that add to their state"),
        ("3a", {}, "needs blocks that add to their state"),
        ("1", {"recompute": "block"}, r"stage\.recompute=block .* must be none"),
    ],
)
def test_stages_without_such_a_trunk_are_refused(number, options, message):
    with pytest.raises(ConfigError, match=message):
        stage_config(number, trunk="reversible", **options)


def test_a_sublayer_on_the_cpu_that_is_called_again_leaves_the_generator_of_a_gpu_alone(monkeypatch):
    changed = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *state: changed.append(state))
    surroundings = trunk._Surroundings(torch.device("cpu"), random=True)
    first = torch.rand(3)
    with surroundings.again():
        assert torch.equal(torch.rand(3), first)
    assert not changed
