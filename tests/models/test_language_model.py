from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from support.causality import assert_causal
from support.rounding import assert_as_accurate

from muse.measure.gradient_error import joined
from muse.models import count_parameters

VOCAB = 61
STAGE_1 = [
    *({"score": score} for score in ("real", "magnitude", "phase")),
    *({"score": score, "norm": "layer"} for score in ("real", "magnitude", "phase")),
    *({"activation": name} for name in ("mod_relu", "mod_swish", "cardioid", "z_relu")),
    {"mixer": "none"},
]
STAGE_2 = [
    *({"number": 2, "gradient": gradient} for gradient in ("exact", "reversible", "checkpoint", "backprop")),
    {"number": 2, "potential": "duffing", "integrator": "leapfrog", "ode_steps": 10, "dt": 0.1},
    {"number": 2, "force_precision": "bf16", "score": "phase", "norm": "layer", "flows": 3, "context": False},
]
STAGE_3 = [
    {"number": 3, "koopman": "replace"},
    {"number": 3, "koopman": "replace", "koopman_every": 1},
    {"number": 3, "koopman": "add"},
    {"number": 3, "koopman": "replace", "koopman_angles": False, "koopman_selective": False},
    {"number": 3, "mera": "replace", "mera_every": 1},
    {"number": 3, "mera": "add", "mera_every": 1, "koopman": "replace"},
    {"number": 3, "attention_window": 5},
]
TRUNKS = [{"number": number, "trunk": "reversible"} for number in (0, 1, 2)]
TRUNKS += [{"number": 3, "koopman": koopman, "trunk": "reversible"} for koopman in ("replace", "add")]
TRUNKS += [{"number": 3, "mera": "add", "trunk": "reversible"}]
LOOPS = [{"number": number, "loops": 3} for number in (0, 1, 2)]
LOOPS += [{"number": 3, "koopman": "replace", "loops": 3}, {"number": 3, "mera": "replace", "loops": 3}]
MODELS = [{"number": 0}, {"number": 0, "activation": "swiglu"}, *STAGE_1, *STAGE_2, *STAGE_3, *TRUNKS, *LOOPS]
SCORES = [{"score": score} for score in ("real", "magnitude", "phase")]


def label(options):
    return "-".join(str(value) for value in options.values())


def tokens(length=20, batch=2):
    return torch.randint(VOCAB, (batch, length))


@pytest.mark.parametrize(
    ("options", "precision"),
    [*zip(MODELS, itertools.cycle(["fp32", "bf16"])), *zip(SCORES, ["fp32", "bf16", "fp32"])],
    ids=str,
)
def test_no_token_sees_a_later_one(build, options, precision):
    model = build(**options, precision=precision).eval()
    x = tokens(66)
    mixes = options.get("mixer") != "none"
    assert_causal(model, x, (x + 1) % VOCAB, reach=2 if mixes else 1)
    if not mixes:
        # Neither does it see an earlier one.
        assert_causal(lambda y: model(y.flip(1)).flip(1), x, (x + 1) % VOCAB)


def continued(model, x):
    """Logits of tokens one by one, and by parts."""
    results = []
    for sizes in ([1] * 12, [7, 1, 1, 3]):
        caches = model.new_caches(12)
        logits = [model.continue_logits(part, caches) for part in x.split(sizes, dim=1)]
        assert {cache.length for cache in caches} == {12}
        results.append(torch.cat(logits, dim=1))
    return results


@pytest.mark.parametrize(
    "options",
    [{"number": 0}, *SCORES, {"norm": "layer"}, *STAGE_2[3:], *STAGE_3, *TRUNKS, *LOOPS],
    ids=label,
)
def test_tokens_after_those_in_caches(build, options):
    """In float64, where a difference is not one of rounding; nor is a state rounded to fixed point."""
    flow = {"gradient": "backprop"} if options.get("number", 1) > 1 else {}
    model = build(**options | flow).double().eval()
    if model.trunk is not None:
        model.trunk.fallen_back = True
    x = tokens(12)
    expected = model(x).detach()
    for found in continued(model, x):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "precision"),
    [({"score": "phase"}, "fp32"), (STAGE_2[0], "bf16"), (TRUNKS[2], "bf16")],
    ids=str,
)
def test_tokens_after_those_in_caches_are_as_accurate_as_all_at_once(build, options, precision):
    model, x = build(**options, precision=precision).eval(), tokens(12)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x)
        assert_as_accurate(continued(model, x), lambda: [model(x)] * 2, [exact] * 2, samples=8)


@pytest.mark.parametrize(
    "options",
    [
        {"number": 0},
        {"number": 1},
        {"number": 2, "gradient": "backprop"},
        {"number": 3, "koopman": "replace", "gradient": "backprop"},
    ],
)
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_looped_model_is_one_with_as_many_blocks_that_share_their_weights(build, options, recompute):
    looped, deep = (
        build(**options, loops=3, recompute=recompute).double(),
        build(**options, layers=6).double(),
    )
    deep.load_state_dict(
        looped.state_dict()
        | {
            f"blocks.{2 * loop + block}.{name}": value
            for loop in range(3)
            for block in range(2)
            for name, value in looped.blocks[block].state_dict().items()
        }
    )
    embedded = []
    deep.embedding.register_forward_hook(lambda _, __, state: embedded.append(state))
    for block in (2, 4):
        deep.blocks[block].register_forward_pre_hook(lambda _, states: (states[0] + embedded[0],))
    x = tokens()
    losses = [model.loss(x[:, :-1], x[:, 1:]) for model in (looped, deep)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    for loss in losses:
        loss.backward()
    shared = [deep.blocks[block] for block in range(6)]
    for block, own in enumerate(looped.blocks):
        for name, parameter in own.named_parameters():
            summed = sum(other.get_parameter(name).grad for other in shared[block::2])
            torch.testing.assert_close(parameter.grad, summed, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        looped.embedding.weight.grad, deep.embedding.weight.grad, rtol=1e-9, atol=1e-12
    )
    assert count_parameters(looped) == count_parameters(build(**options))


def test_the_block_of_the_seeds_has_no_cache(build):
    assert build(mixer="none").new_caches(12) is None


@pytest.mark.parametrize("options", [{"number": 0}, *SCORES, *STAGE_2, *STAGE_3, *TRUNKS, *LOOPS], ids=label)
def test_gradient_of_a_logit_stops_at_its_token(build, options):
    model = build(**options)
    states = []

    def keep(_, __, state):
        states.append(state.requires_grad_())
        state.retain_grad()

    model.embedding.register_forward_hook(keep)
    model(tokens(12))[:, 7].square().sum().backward()
    by_token = states[0].grad.flatten(2).abs().sum((0, 2))
    assert (by_token[:8] > 0).all()
    assert (by_token[8:] == 0).all()


@pytest.mark.parametrize(
    ("options", "precision"), [*zip(MODELS, itertools.cycle(["fp32", "bf16", "bf16-mixed"]))], ids=str
)
def test_loss_and_gradients_are_finite(build, options, precision):
    model = build(**options, precision=precision)
    x = tokens(33)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        loss = model.loss(x[:, :-1], x[:, 1:])
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    expected = torch.bfloat16 if precision == "bf16" else torch.float32
    for name, parameter in model.named_parameters():
        assert parameter.dtype == expected
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.norm() > 0, name
    assert 1e-6 < joined(p.grad for p in model.parameters()).norm() < 1e3


@pytest.mark.parametrize(
    "options", [{"number": 0}, *SCORES, {"mixer": "none"}, {"number": 2}, STAGE_3[0]], ids=label
)
def test_loss_is_the_cross_entropy_of_the_logits(build, options):
    model = build(**options).double()
    x, y = tokens(), tokens()
    y[0, :5] = -1
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1)
    torch.testing.assert_close(model.loss(x, y), expected)
    total = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1, reduction="sum")
    torch.testing.assert_close(model.loss(x, y, "sum"), total)
    torch.testing.assert_close(model.next_logits(x), model(x)[:, -1])
    ours = torch.autograd.grad(model.loss(x, y), list(model.parameters()))
    plain = torch.autograd.grad(expected, list(model.parameters()))
    for actual, wanted in zip(ours, plain, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({"number": 0}, "bf16"),
        *zip(SCORES, ["fp32", "bf16", "bf16"]),
        ({"mixer": "none"}, "bf16"),
        ({"number": 2}, "fp32"),
        ({"number": 2}, "bf16"),
        (STAGE_3[1], "bf16"),
    ],
    ids=str,
)
def test_a_hundred_random_inputs(build, options, precision):
    model = build(**options, precision=precision).eval()
    with torch.no_grad():
        assert model(tokens(33, batch=80)).isfinite().all()
        assert all(model(tokens(length, batch=1)).isfinite().all() for length in (1, 2, 3, 63, 64, 65))
        assert all(model(torch.full((1, 40), token)).isfinite().all() for token in range(14))


@pytest.mark.parametrize("number", [0, 1])
def test_tied_head_shares_one_tensor(build, number):
    model = build(number)
    weight, bias = model.head_parameters()
    assert bias is None
    assert weight.data_ptr() == model.embedding.weight.data_ptr()
    assert sum("embedding" in name or "head" in name for name in model.state_dict()) == 1
    x = tokens()
    tied = torch.autograd.grad(model.loss(x, x), model.embedding.weight)[0]
    # Both uses, told apart: as a table of inputs and as the head.
    features = model.features(x).flatten(0, 1)
    cut = torch.autograd.grad(
        F.cross_entropy(F.linear(features, weight.detach().flatten(1)), x.flatten()), model.embedding.weight
    )[0]
    head = torch.autograd.grad(
        F.cross_entropy(F.linear(features.detach(), model.head_parameters()[0].flatten(1)), x.flatten()),
        model.embedding.weight,
    )[0]
    assert cut.norm() > 0
    assert head.norm() > 0
    torch.testing.assert_close(tied, cut + head, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("number", [0, 1])
def test_untied_head_is_its_own(build, number):
    tied, model = build(number), build(number, tied=False)
    assert count_parameters(model) - count_parameters(tied) == tied.embedding.weight.numel()
    assert model.head_parameters()[0].data_ptr() != model.embedding.weight.data_ptr()
    unused = [t for t in range(VOCAB) if t != 5]
    x = torch.full((1, 4), 5)
    model.loss(x, x).backward()
    assert (model.embedding.weight.grad[unused] == 0).all()
    assert (model.head.weight.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize(
    "options", [{"number": 0}, *SCORES, {"mixer": "none"}, {"number": 2}, STAGE_3[0]], ids=label
)
def test_dropout_acts_in_training_only(build, options):
    model, plain = build(**options, dropout=0.5), build(**options)
    x = tokens()
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_norms_change_no_bit_of_the_gradients(build, norm, dropout):
    block = build(norm=norm, dropout=dropout).blocks[0].train()

    def plain(z):
        z = z + block.dropout(block.attention(block.attention_norm(z)))
        return z + block.dropout(block.ffn.down(block.ffn.activation(block.ffn.up(block.ffn_norm(z)))))

    z, cotangent = torch.randn(2, 2, 9, 2, 12)
    results = []
    for function in (block, plain):
        torch.manual_seed(5)
        leaf = z.detach().requires_grad_()
        out = function(leaf)
        results.append([out, *torch.autograd.grad(out, (leaf, *block.parameters()), cotangent)])
    assert all(torch.equal(actual, expected) for actual, expected in zip(*results, strict=True))
