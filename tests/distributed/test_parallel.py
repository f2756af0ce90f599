"""One model trained by several ranks is the model that one rank trains."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support import distributed
from support.configs import VOCAB, document_data, stage_config
from support.distributed import Training, run_config, run_ranks, run_train, whole
from support.runs import same
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from muse.dynamics import MLPPotential
from muse.errors import ConfigError
from muse.models import build_model
from muse.processes.ranks import local, rank
from muse.training import trainer
from muse.training.optim import ModelOptimizer
from muse.training.parallel import ParallelLoss


def flow_config(gradient: str, **stage: Any) -> Any:
    return stage_config("2", gradient=gradient, integrator="leapfrog", ode_steps=2, **stage)


GRADIENTS = ("exact", "reversible", "checkpoint", "backprop")
CASES = {
    "stage 0": run_config(stage_config("0")),
    "stage 1": run_config(stage_config("1")),
    **{f"stage 2, {gradient}": run_config(flow_config(gradient)) for gradient in GRADIENTS},
    **{f"reversible trunk, stage {n}": run_config(stage_config(n, trunk="reversible")) for n in ("0", "2")},
    "recomputed blocks": run_config(stage_config("1", recompute="block")),
    "loops": run_config(flow_config("reversible", loops=2)),
    "stage 3": run_config(stage_config("3", mera="add", mera_every=1, gradient="reversible")),
    "dialectic loop": run_config(
        stage_config("3", gradient="reversible", dialectic="mlp", dialectic_candidates=4)
    ),
    "stage 3a": run_config(stage_config("3a")),
    "the block of the seeds": run_config(stage_config("1", mixer="none")),
    "untied": run_config(stage_config("1", tied=False, norm="layer")),
    "modulus": run_config(stage_config("1"), optim={"second_moment": "modulus"}),
    # A guard of 1 keeps as many tokens of every window, so that no rank keeps others than a single one does.
    "selection": run_config(
        stage_config("1"), optim={"selection": "high", "selection_share": 0.5, "selection_guard": 1.0}
    ),
}
IN_FLOAT32 = tuple(CASES)[:6]
# Over three ranks some parameters have no rows for the last one, and others uneven ones. In float64 the exact
# flow still takes gradients by float32 states, and their rounding does not commute with a division by three.
OVER_THREE = ("stage 0", "stage 1", "stage 2, reversible")
IN_FLOAT64 = [(2, together, case) for together in ("ddp", "fsdp") for case in CASES]
IN_FLOAT64 += [(3, together, case) for together in ("ddp", "fsdp") for case in OVER_THREE]


def train_cases(names: tuple[str, ...], folder: Path, together: str, precision: str) -> dict[str, Training]:
    """Train some cases; ``precision`` may be ``fp64``."""
    trainings = {}
    for name in names:
        config = copy.deepcopy(CASES[name])
        config.hardware.parallel = together
        config.stage.precision = "fp32" if precision == "fp64" else precision
        trainings[name] = run_train(config, folder / name, double=precision == "fp64")
    return trainings


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[..., list[dict[str, Training]]]:
    """Trainings of cases on so many ranks, by rank."""

    @functools.cache
    def train(
        count: int, together: str, precision: str = "fp64", names: tuple[str, ...] = tuple(CASES)
    ) -> list[dict[str, Training]]:
        return run_ranks(count, train_cases, names, tmp_path_factory.mktemp("runs"), together, precision)

    return train


def distance(first: Training, second: Training) -> float:
    """Root mean square of the differences between two trainings' weights."""
    return (first.flat() - second.flat()).square().mean().sqrt().item()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "together", "case"), IN_FLOAT64)
def test_ranks_train_the_model_of_one_rank(trained, count, together, case):
    one = trained(1, "none")[0][case]
    names = tuple(CASES) if count == 2 else OVER_THREE
    for found in (joined[case] for joined in trained(count, together, "fp64", names)):
        for loss in ("train/loss", "train/last_loss", "valid/whole_loss"):
            assert found.series(loss) == pytest.approx(one.series(loss), rel=1e-12)
        # Norms are float32.
        assert found.series("train/grad_norm") == pytest.approx(one.series("train/grad_norm"), rel=1e-6)
        torch.testing.assert_close(found.flat(), one.flat(), rtol=1e-12, atol=1e-12)


def path(training: Training, case: str, precision: str) -> Tensor:
    """How far each weight got in a training."""
    stage = copy.deepcopy(CASES[case].stage)
    stage.precision = precision
    model = build_model(stage, CASES[case].model, VOCAB, CASES[case].seed)
    return training.flat() - torch.cat([p.detach().double().flatten() for p in model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "names"),
    [("fp32", IN_FLOAT32), ("bf16", ("stage 2, exact",)), ("bf16-mixed", ("stage 2, exact",))],
)
@pytest.mark.parametrize("together", ["ddp", "fsdp"])
def test_ranks_differ_from_one_rank_no_more_than_rounding_does(trained, together, precision, names):
    exact, one = trained(1, "none")[0], trained(1, "none", precision, names)[0]
    for joined in trained(2, together, precision, names):
        for case in names:
            assert distance(joined[case], one[case]) < 2 * distance(one[case], exact[case]), case
            # Rounding has no direction: of n numbers it has a part of 1/sqrt(n) along the path. A learning
            # rate that is wrong by a tenth is less than the rounding of bfloat16, but points along the path.
            along = path(one[case], case, precision)
            apart = joined[case].flat() - one[case].flat()
            assert abs(along @ apart) < 5 / math.sqrt(len(along)) * along.norm() * apart.norm(), case


def train_replica(folder: Path, precision: str, optim: str) -> tuple[dict[str, Tensor], list[float]]:
    config = run_config(stage_config("1", precision=precision, dropout=0.2), "ddp", {"name": optim})
    training = run_train(config, folder)
    return training.weights, training.series("train/loss")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "optim"),
    [("fp32", "muon"), ("bf16", "adamw"), ("bf16-mixed", "adamw"), ("fp16-mixed", "adamw")],
)
def test_replicas_stay_equal_to_the_last_bit(tmp_path, precision, optim):
    (first, losses), (second, also) = run_ranks(2, train_replica, tmp_path, precision, optim)
    assert same(first, second)
    assert losses == also
    assert losses[-1] < losses[0]


def dropped(folder: Path) -> Tensor:
    """Where the first dropout of a training is zero."""
    outputs: list[Tensor] = []

    def prepare(model: nn.Module) -> None:
        dropout = model.blocks[0].dropout
        dropout.register_forward_hook(lambda module, given, output: outputs.append(output.detach() == 0))

    run_train(run_config(stage_config("1", dropout=0.5), "ddp", steps=1), folder, prepare=prepare)
    return outputs[0]


def test_ranks_drop_different_activations(tmp_path):
    first, second = run_ranks(2, dropped, tmp_path)
    assert 0.2 < (first == second).double().mean() < 0.8


def train_verified(folder: Path, together: str, precision: str) -> Training:
    stage = stage_config("2", precision=precision, gradient="exact", verify=True, dropout=0.2)
    return run_train(run_config(stage, together), folder)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("together", ["ddp", "fsdp"])
def test_the_exact_flow_is_rebuilt_to_the_last_bit_on_every_rank(tmp_path, together, precision):
    for training in run_ranks(2, train_verified, tmp_path, together, precision):
        assert training.series("flow/reconstruction_error") == [0.0] * 4
        assert training.series("flow/fallbacks") == [0.0] * 4


def train_evaluated(folder: Path, together: str) -> Training:
    stage = stage_config("2", gradient="reversible", integrator="leapfrog", ode_steps=2, dropout=0.2)
    return run_train(run_config(stage, together, eval_every=2, eval_tokens=16), folder)


@pytest.mark.slow
@pytest.mark.parametrize("together", ["ddp", "fsdp"])
def test_the_first_rank_watches_flows(tmp_path, together):
    first, second = run_ranks(2, train_evaluated, tmp_path, together)
    for name in [f"blocks_{block}_flow_{flow}" for block in (0, 1) for flow in (0, 1)]:
        for key in ("energy", "drift_max", "drift_mean", "curvature_dt2"):
            values = first.series(f"flow/{name}/{key}")
            assert len(values) == 2
            assert all(0 < value < 1e3 for value in values)
    assert second.series("flow/energy") == []
    # The largest of all ranks.
    errors = first.series("flow/reconstruction_error")
    assert errors == second.series("flow/reconstruction_error")
    assert 0 < max(errors) < 1e-5
    assert first.series("valid/loss") == second.series("valid/loss")


def train_predicting(folder: Path, together: str) -> Training:
    stage = stage_config("3", gradient="reversible", koopman="add", koopman_prediction=1.0)
    return run_train(run_config(stage, together, eval_every=3), folder, double=True)


@pytest.mark.slow
def test_sharded_operators_learn_to_predict_as_replicas_do(tmp_path):
    """Not as one rank does, whose variances are over all windows."""
    replica, _ = run_ranks(2, train_predicting, tmp_path / "ddp", "ddp")
    for sharded in run_ranks(2, train_predicting, tmp_path / "fsdp", "fsdp"):
        torch.testing.assert_close(sharded.flat(), replica.flat(), rtol=1e-10, atol=1e-10)
        assert sharded.series("train/loss") == pytest.approx(replica.series("train/loss"), rel=1e-10)


def train_on_documents(folder: Path, together: str) -> tuple[Training, list[Tensor]]:
    """And the targets of the second step."""
    distributed.token_data = partial(document_data, 405)
    config = run_config(stage_config("3", gradient="reversible"), together)
    config.data.packing = "documents"
    batches = trainer._batches(config, document_data(405), 1)
    return run_train(config, folder, double=True), [batch.targets for batch in batches]


@pytest.mark.slow
@pytest.mark.parametrize("together", ["ddp", "fsdp"])
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_share_windows_of_documents_and_each_token_counts_as_much(tmp_path, together, count):
    ((one, targets),) = run_ranks(1, train_on_documents, tmp_path / "one", "none")
    found = run_ranks(count, train_on_documents, tmp_path / "joined", together)
    for pieces in zip(targets, *(own for _, own in found), strict=True):
        assert torch.equal(pieces[0], torch.cat(pieces[1:]))
    # Not as many on every rank, or the mean of means would do.
    assert len({int((own[0] >= 0).sum()) for _, own in found}) > 1
    for training, _ in found:
        for name in ("train/loss", "train/last_loss", "valid/whole_loss"):
            assert training.series(name) == pytest.approx(one.series(name), rel=1e-12)
        assert training.series("train/padding") == one.series("train/padding")
        torch.testing.assert_close(training.flat(), one.flat(), rtol=1e-12, atol=1e-12)


def fall_back(folder: Path, together: str, failing: str) -> Training:
    """Train a flow that fails in one call on the second rank, in its forward or its backward pass."""
    function, calls = getattr(MLPPotential, failing), []

    def spoiled(self: MLPPotential, *arguments: Any) -> tuple[Tensor, ...]:
        found = function(self, *arguments)
        calls.append(1)
        if rank() != 1 or len(calls) != 11:
            return found
        if failing == "undo":
            return found[0] + 1e-3, *found[1:]
        return *found[:-1], torch.full_like(found[-1], math.inf)

    setattr(MLPPotential, failing, spoiled)
    return run_train(run_config(flow_config("reversible"), together), folder, double=True)


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["undo", "advance"])
@pytest.mark.parametrize("together", ["ddp", "fsdp"])
def test_a_fallback_on_one_rank_becomes_one_on_all_and_gradients_stay_right(tmp_path, together, failing):
    (expected,) = run_ranks(1, train_one, tmp_path, "backprop")
    for training in run_ranks(2, fall_back, tmp_path / "joined", together, failing):
        # A step has 2 micro-batches through 4 flows.
        assert training.series("flow/fallbacks") == [0, 1, 1, 1]
        assert training.series("train/loss") == pytest.approx(expected.series("train/loss"), rel=1e-12)
        torch.testing.assert_close(training.flat(), expected.flat(), rtol=1e-12, atol=1e-12)


def train_one(folder: Path, gradient: str) -> Training:
    return run_train(run_config(flow_config(gradient)), folder, double=True)


def overflow(folder: Path) -> list[dict[str, Tensor]]:
    """Weights after each step of a training in float16 whose second step overflows on the second rank."""
    models: list[nn.Module] = []
    weights: list[dict[str, Tensor]] = []
    backwards = []

    def prepare(model: nn.Module) -> None:
        def spoil(gradient: Tensor) -> Tensor:
            backwards.append(1)
            return gradient * math.inf if rank() == 1 and len(backwards) == 3 else gradient

        models.append(model)
        model.norm.gain.register_hook(spoil)

    def react(step: int) -> None:
        weights.append({name: value.detach().clone() for name, value in models[0].named_parameters()})

    run_train(
        run_config(stage_config("1", precision="fp16-mixed"), "ddp"), folder, react=react, prepare=prepare
    )
    return weights[:4]


def test_an_overflow_on_one_rank_skips_the_step_on_all(tmp_path):
    first, second = run_ranks(2, overflow, tmp_path)
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert [same(a, b) for a, b in pairwise(first)] == [True, False, False]


STEPS, RATE = 50, 1e-4


def drift(together: str) -> tuple[float, float]:
    """How far weights of 1 in bfloat16 get by small steps; their mean on this rank, and over all."""
    config = run_config(stage_config("1", precision="bf16"), optim={"lr": RATE, "weight_decay": 0.0})
    model = build_model(config.stage, config.model, VOCAB)
    ParallelLoss(model, together)
    optimizer = ModelOptimizer(model, config.optim)
    for parameter in model.parameters():
        torch.nn.init.ones_(local(parameter.detach()))
        parameter.grad = torch.ones_like(parameter)
    for step in range(STEPS):
        optimizer.attach_gradients()
        optimizer.step(step)
    moved = [1 - local(parameter.detach()).float().flatten() for parameter in model.parameters()]
    gathered = [1 - whole(parameter.detach()).float().flatten() for parameter in model.parameters()]
    return torch.cat(moved).mean().item(), torch.cat(gathered).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_sharded_weights_in_bfloat16_follow_steps_smaller_than_their_rounding(count):
    # 1 - 1e-4 is 1 in bfloat16.
    for own, all_ranks in run_ranks(count, drift, "fsdp"):
        assert own == pytest.approx(STEPS * RATE, rel=0.3)
        assert all_ranks == pytest.approx(STEPS * RATE, rel=0.2)


def stepped(together: str) -> dict[str, Tensor]:
    """The parameters in bfloat16, whole, after three steps with given gradients."""
    config = run_config(stage_config("2", precision="bf16"), optim={"lr": 0.01})
    torch.manual_seed(0)
    model = build_model(config.stage, config.model, VOCAB)
    ParallelLoss(model, together)
    optimizer = ModelOptimizer(model, config.optim, seed=3)
    for step in range(3):
        for parameter in model.parameters():
            # Of the number of each element in the whole parameter.
            index = torch.arange(parameter.numel()).view(parameter.shape)
            gradient = torch.sin(index * (step + 1.0)).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.attach_gradients()
        optimizer.step(step, 0.5)
    return {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_stochastic_rounding_does_not_depend_on_shards(count):
    alone = run_ranks(1, stepped, "none")[0]
    for found in run_ranks(count, stepped, "fsdp"):
        assert any(x.dtype == torch.bfloat16 for x in found.values())
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], x) for name, x in alone.items())


def refused(together: str) -> str:
    """Why a model cannot be trained with moduli."""
    config = run_config(stage_config("1"), optim={"second_moment": "modulus"})
    model = build_model(config.stage, config.model, VOCAB)
    ParallelLoss(model, together)
    try:
        ModelOptimizer(model, config.optim)
    except ConfigError as error:
        return str(error)
    return ""


def test_moduli_are_refused_where_planes_lie_on_different_ranks():
    # 8 channels cannot be shared by 3 ranks.
    first, *others = run_ranks(3, refused, "fsdp")
    assert others == [first] * 2
    assert "on different ranks" in first
    assert "choose plane, or hardware.parallel=ddp" in first
    assert "\n" not in first
    assert run_ranks(3, refused, "ddp") == [""] * 3


def held(together: str) -> tuple[int, int, int, int]:
    """Elements of parameters, gradients and moments that this rank holds, and of the model."""
    config = run_config(stage_config("2"), together)
    model = build_model(config.stage, config.model, VOCAB)
    parallel_loss = ParallelLoss(model, together)
    optimizer = ModelOptimizer(model, config.optim)
    tokens = torch.arange(16).view(2, 8) % VOCAB
    with parallel_loss.gradients_summed(last=True):
        parallel_loss(tokens, tokens).backward()
    parameters = list(model.parameters())
    own = sum(local(parameter).numel() for parameter in parameters)
    gradients = sum(local(parameter.grad).numel() for parameter in parameters)
    moments = sum(moment.numel() for moment in optimizer.state_tensors())
    return own, gradients, moments, sum(parameter.numel() for parameter in parameters)


def test_fsdp_shares_parameters_gradients_and_moments():
    found = run_ranks(2, held, "fsdp")
    total = found[0][3]
    assert sum(own for own, *_ in found) == total
    for own, gradients, moments, _ in found:
        assert own == pytest.approx(total / 2, rel=0.1)
        assert (gradients, moments) == (own, 2 * own)
    assert run_ranks(2, held, "ddp") == [(total, total, 2 * total, total)] * 2
