"""The auxiliary loss of Koopman operators in a model and its training."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.configs import VOCAB, run_config, small_sizes, stage_config
from support.runs import CrashError, contents, crash_at, same
from support.training import Recorder, run_train

from muse.errors import ConfigError
from muse.layers.koopman import noted_shares, operators_of, prediction_loss
from muse.models import build_model
from muse.runs.checkpoints import find_checkpoint

FORMS = [
    {},
    {"koopman": "add", "koopman_every": 1, "loops": 2},
    {"dialectic": "mlp", "dialectic_candidates": 4},
]


def build(weight=0.0, **options):
    stage = stage_config("3", gradient="backprop", koopman_prediction=weight, **options)
    return build_model(stage, small_sizes(layers=4), VOCAB, seed=3).double()


def batch():
    return tuple(torch.randint(VOCAB, (3, 8)) for _ in range(2))


def gradients(model, loss):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found, strict=True)]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_it_adds_its_gradient_to_that_of_the_loss_and_nothing_to_the_value(options):
    without, model, given = build(**options), build(0.3, **options), batch()
    plain = without.loss(*given)
    loss = model.loss(*given)
    assert torch.equal(loss, plain)
    with noted_shares(model) as noted:
        model.features(given[0])
    operators = operators_of(model)
    assert {name: len(calls) for name, calls in noted.items()} == dict.fromkeys(operators, model.loops)
    own = gradients(model, prediction_loss(noted))
    assert sum(bool(gradient.any()) for gradient in own) > 5 * len(operators)
    for found, of_loss, auxiliary in zip(gradients(model, loss), gradients(without, plain), own, strict=True):
        torch.testing.assert_close(found, of_loss + 0.3 * auxiliary)
    assert all(operator.noted is None for operator in operators.values())


def test_nothing_is_computed_where_it_is_off_or_nothing_is_learned(monkeypatch):
    calls = []
    monkeypatch.setattr("muse.layers.koopman.shares_of", lambda *given: calls.append(given))
    model, given = build(), batch()
    model.loss(*given).backward()
    model = build(1.0)
    model(given[0])
    with torch.no_grad():
        model.loss(*given)
    assert calls == []
    model.loss(*given)
    assert len(calls) == len(operators_of(model))


@pytest.mark.slow
def test_a_compiled_model_has_the_same_gradients():
    torch._dynamo.reset()
    model, given = build(0.3), batch()
    expected = gradients(model, model.loss(*given))
    model.features = torch.compile(model.features, backend="aot_eager")
    found = gradients(model, model.loss(*given))
    with torch.no_grad():
        model.loss(*given)
    again = gradients(model, model.loss(*given))
    torch._dynamo.reset()
    for one, two, wanted in zip(found, again, expected, strict=True):
        torch.testing.assert_close(one, wanted)
        torch.testing.assert_close(two, wanted)


def test_blocks_that_are_computed_again_are_refused():
    for options in ({"trunk": "reversible"}, {"recompute": "block"}):
        with pytest.raises(
            ConfigError, match=r"stage\.koopman_prediction=0\.3 .* needs stage\.trunk=residual"
        ):
            build(0.3, **options)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_training_equals_an_undisturbed_one_and_tells_the_shares(tmp_path, precision):
    stage = stage_config("3", precision, koopman_prediction=0.5, dropout=0.2)
    config = run_config(stage, {"accumulation": 2}, steps=6, checkpoint_every=3, eval_every=3)
    whole, rest = Recorder(), Recorder()
    _, undisturbed = run_train(config, tmp_path / "whole", whole)
    with pytest.raises(CrashError):
        run_train(config, tmp_path / "first", Recorder(react=crash_at(4)))
    _, resumed = run_train(config, tmp_path / "rest", rest, find_checkpoint(tmp_path / "first"))
    assert same(contents(undisturbed.checkpoint), contents(resumed.checkpoint))
    told = [line for _, line in whole.lines if "valid/loss" in line]
    assert [line for _, line in rest.lines if "valid/loss" in line] == told[1:]
    for line in told:
        assert 0 < line["koopman/blocks_0_mixer/distinct_share"] <= 1
        assert -1 < line["koopman/blocks_0_mixer/predictable_share"] <= 1
    config.stage = dataclasses.replace(stage, koopman_prediction=0.0)
    off = Recorder()
    _, without = run_train(config, tmp_path / "off", off)
    assert not any(key.endswith("distinct_share") for _, line in off.lines for key in line)
    assert not same(contents(without.checkpoint), contents(undisturbed.checkpoint))
