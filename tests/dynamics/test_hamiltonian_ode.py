from __future__ import annotations

import copy
import itertools
import math
import shutil
import warnings

import pytest
import torch
import torch._inductor.config
from support.dynamics import (
    MODES,
    POTENTIALS,
    Harmonic,
    HenonHeiles,
    Kepler,
    assert_equal,
    assert_gradients_as_accurate,
    assert_rebuilt,
    exact_gradients,
    flow_gradients,
    gradients,
    in_double,
    kepler_orbit,
    moved,
    no_warnings,
    perturbed_duffing,
    relative_error,
    state,
    twin,
    worst_error,
)
from torch import nn
from torch.autograd import gradcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from muse.dynamics import HamiltonianNeuralODE, MLPPotential, Potential, flow_metrics
from muse.errors import RunError

every_mode = pytest.mark.parametrize("mode", MODES)
every_potential = pytest.mark.parametrize("kind", POTENTIALS)
# Every mode and every potential, and each way to go back in fixed and in floating point: by the kernel, by
# the kernel chunk by chunk for a context, and by plain PyTorch for Duffing's.
PAIRS = [
    ("exact", "mlp"),
    ("exact", "confined_context"),
    ("exact", "duffing"),
    ("reversible", "context"),
    ("reversible", "spring"),
    ("reversible", "duffing"),
    ("checkpoint", "confined_context"),
    ("checkpoint", "duffing"),
    ("backprop", "context"),
    ("backprop", "spring"),
    ("verify", "confined_context"),
    ("verify", "mlp"),
]
some_pairs = pytest.mark.parametrize(("mode", "kind"), PAIRS)
some_mlp_pairs = pytest.mark.parametrize(("mode", "kind"), [pair for pair in PAIRS if pair[1] != "duffing"])
some_mlps = pytest.mark.parametrize("kind", ["mlp", "confined_context"])
INTEGRATORS = ("leapfrog", "yoshida4", "blanes_moan_rkn4", "position_verlet")


def make(
    mode: str = "exact", kind: str = "mlp", width: int = 16, steps: int = 10, dt: float = 0.1, **options
):
    """A flow whose potential depends on the seed only."""
    torch.manual_seed(7)
    potential = POTENTIALS[kind](width)
    return HamiltonianNeuralODE(potential, steps, dt, **(MODES[mode] | options))


# ---- Gradients


@pytest.mark.parametrize(
    ("mode", "kind", "integrator"),
    [(*pair, integrator) for pair, integrator in zip(PAIRS, itertools.cycle(INTEGRATORS))],
)
def test_gradients_against_double_precision(mode, kind, integrator):
    """The result and the gradients of the state and every parameter."""
    ode = make(mode, kind, width=32, integrator=integrator)
    z = state(4, 25, 32)
    with no_warnings():
        found = flow_gradients(ode, z)
    exact = exact_gradients(ode, z)
    assert len(found) == {"mlp": 5, "context": 6, "spring": 5, "confined_context": 6, "duffing": 4}[kind]
    for name in found:
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], exact[name]) <= 1e-5, name
    if ode.compares:
        assert flow_metrics(ode)["flow/fallbacks"] == 0


@pytest.mark.parametrize(
    ("kind", "integrator", "steps"),
    [
        ("duffing", "blanes_moan_rkn4", 1),
        ("spring", "yoshida4", 1),
        ("context", "leapfrog", 10),
        ("confined_context", "blanes_moan_rkn4", 2),
        ("mlp", "leapfrog", 40),
    ],
)
def test_gradients_of_exact_are_as_accurate_as_those_of_backpropagation(kind, integrator, steps):
    """At the default number of bits."""
    ode, z = make("exact", kind, width=32, steps=steps, integrator=integrator), state(2, 9, 32)
    assert_gradients_as_accurate(ode, z)


@pytest.mark.parametrize(
    ("gradient", "kind", "integrator", "steps"),
    [
        ("reversible", "mlp", "blanes_moan_rkn4", 1),
        ("reversible", "context", "leapfrog", 3),
        ("reversible", "spring", "leapfrog", 3),
        ("reversible", "confined_context", "blanes_moan_rkn4", 1),
        ("reversible", "duffing", "leapfrog", 3),
        ("checkpoint", "confined_context", "leapfrog", 3),
        ("backprop", "confined_context", "leapfrog", 3),
        ("backprop", "duffing", "blanes_moan_rkn4", 1),
    ],
)
def test_gradcheck(gradient, kind, integrator, steps):
    ode = make(gradient, kind, width=3, steps=steps, dt=0.3, integrator=integrator).double()
    names = [name for name, _ in ode.named_parameters()]

    def run(z, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.stack(torch.func.functional_call(ode, given, z.unbind(-2)), -2)

    leaves = [x.detach().requires_grad_() for x in (state(2, 3, dtype=torch.float64), *ode.parameters())]
    assert gradcheck(run, leaves)


@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
@pytest.mark.parametrize(
    "potential", [HenonHeiles(), Kepler(), Harmonic(1.7)], ids=lambda x: type(x).__name__
)
def test_other_potentials_plug_in(potential, mode):
    z = torch.stack([kepler_orbit(e) for e in (0.0, 0.1, 0.2)]) * torch.tensor([[0.5], [1.0]])
    backprop = HamiltonianNeuralODE(potential, 10, 0.1, gradient="backprop").double()
    expected = flow_gradients(backprop, z)
    found = flow_gradients(twin(backprop, gradient=mode).double(), z)
    assert worst_error(found, expected) < 1e-12


@pytest.mark.parametrize(
    "potential", [HenonHeiles(), Kepler(), Harmonic(1.7)], ids=lambda x: type(x).__name__
)
def test_other_potentials_are_rebuilt_exactly(potential):
    z = torch.stack([kepler_orbit(e) for e in (0.0, 0.1, 0.2)]).float()
    ode = HamiltonianNeuralODE(potential, 100, 0.02, verify=True)
    with no_warnings():
        found = flow_gradients(ode, z)
    assert worst_error(found, exact_gradients(ode, z)) < 1e-5
    assert flow_metrics(ode) == {"flow/fallbacks": 0.0, "flow/reconstruction_error": 0.0}


@some_mlp_pairs
def test_repeated_backward_is_bitwise_equal(mode, kind):
    ode, z = make(mode, kind, width=24), state(300, 24)
    assert_equal(flow_gradients(ode, z), flow_gradients(ode, z))
    leaf = z.clone().requires_grad_()
    end = moved(ode, leaf)
    first, second = (torch.autograd.grad(end.square().sum(), leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@some_mlp_pairs
def test_gradient_of_half_the_state(mode, kind):
    ode, z = make(mode, kind), state(5, 16).requires_grad_()
    reference = in_double(ode)
    other = z.detach().double().requires_grad_()
    (found,) = torch.autograd.grad(moved(ode, z)[:, 1].square().sum(), z)
    (exact,) = torch.autograd.grad(moved(reference, other)[:, 1].square().sum(), other)
    assert relative_error(found, exact) < 1e-5


@some_mlp_pairs
def test_frozen_potential_and_frozen_state(mode, kind):
    ode, z = make(mode, kind), state(5, 16)
    expected = flow_gradients(ode, z)
    parameters = list(ode.parameters())
    cotangent = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(1))
    for x, name in zip(
        torch.autograd.grad(moved(ode, z), parameters, cotangent), list(expected)[2:], strict=True
    ):
        assert torch.equal(x, expected[name])
    ode.requires_grad_(False)
    leaf = z.requires_grad_()
    assert torch.equal(torch.autograd.grad(moved(ode, leaf), leaf, cotangent)[0], expected["z"])
    assert not moved(ode, z.detach()).requires_grad


@some_mlp_pairs
def test_a_layer_used_twice(mode, kind):
    """In one graph, so that two calls wait for their backward passes."""
    ode, z = make(mode, kind), state(5, 16)

    def twice(flow):
        return lambda x: moved(flow, moved(flow, x))

    found = gradients(twice(ode), ode.parameters(), z)
    reference = in_double(ode)
    assert worst_error(found, gradients(twice(reference), reference.parameters(), z.double())) < 1e-5


@pytest.mark.parametrize(
    ("mode", "kind"), [("exact", "mlp"), ("reversible", "context"), ("verify", "confined_context")]
)
def test_double_backward_is_refused(mode, kind):
    ode, z = make(mode, kind), state(5, 16).requires_grad_()
    with pytest.raises(RuntimeError, match=r"no second derivative; stage\.gradient=backprop has"):
        torch.autograd.grad(moved(ode, z).square().sum(), z, create_graph=True)


def test_double_backward_of_backpropagation():
    ode = make("backprop", "confined_context", width=3, steps=2, integrator="leapfrog").double()
    assert torch.autograd.gradgradcheck(
        lambda z: moved(ode, z), state(2, 3, dtype=torch.float64).requires_grad_()
    )


# ---- What goes in and comes out


@some_pairs
def test_shapes(mode, kind):
    ode = make(mode, kind, width=6, integrator="leapfrog")
    for shape in ((6,), (2, 3, 6), (2, 3, 2, 2, 6), (0, 6)):
        z = state(*shape).requires_grad_()
        end = moved(ode, z)
        assert end.shape == z.shape
        end.sum().backward()
        assert z.grad.shape == z.shape
        assert z.grad.isfinite().all()


@some_pairs
def test_strides_do_not_matter(mode, kind):
    ode, z = make(mode, kind), state(5, 7, 16)
    strided = z.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert_equal(flow_gradients(ode, strided), flow_gradients(ode, z))
    wide = torch.randn(5, 7, 2, 40)
    wide[..., 3:19] = z
    assert torch.equal(moved(ode, wide[..., 3:19]), moved(ode, z))


@some_mlp_pairs
def test_half_precision_is_accepted(mode, kind):
    ode = make(mode, kind)
    for dtype in (torch.bfloat16, torch.float16):
        z = state(5, 16).to(dtype)
        leaf = z.clone().requires_grad_()
        end = moved(ode, leaf)
        assert end.dtype == torch.float32
        assert torch.equal(end, moved(ode, z.float()))
        end.sum().backward()
        assert leaf.grad.dtype == dtype


@some_mlp_pairs
def test_tokens_do_not_touch(mode, kind):
    """A token never sees another: not in its result, nor in its gradient."""
    ode, z = make(mode, kind, width=32), state(3, 20, 32)
    before = flow_gradients(ode, z)
    others = torch.ones(3, 20, dtype=torch.bool)
    others[1, 7] = False
    changed = z.clone()
    changed[1, 7] += 1
    after = flow_gradients(ode, changed)
    for name in ("end", "z"):
        assert torch.equal(after[name][others], before[name][others])
        assert not torch.equal(after[name][1, 7], before[name][1, 7])
    leaf = z.clone().requires_grad_()
    (grad,) = torch.autograd.grad(moved(ode, leaf)[1, 7].sum(), leaf)
    assert grad[1, 7].all()
    assert not grad[others].any()


@every_potential
def test_modes_agree_on_the_result(kind):
    z = state(50, 16)
    reference = moved(make("backprop", kind).double(), z.double())
    for mode in ("checkpoint", "reversible"):
        torch.testing.assert_close(
            moved(make(mode, kind).double(), z.double()), reference, rtol=0, atol=1e-12
        )
    # Each of 121 kicks and drifts rounds by up to half a unit of 2^-23, 7e-6 in all, and 61 forces by up to
    # 1e-6, of which kicks of 0.02 on average make 1e-6.
    for mode in ("exact", "verify"):
        torch.testing.assert_close(moved(make(mode, kind), z).double(), reference, rtol=0, atol=1e-5)
    # The state is a multiple of the unit; up to 2 no bit of it is lost in float32.
    end = moved(make("exact", kind, fraction_bits=10), z) * 2**10
    assert torch.equal(end, end.round())


@some_mlp_pairs
def test_results_without_a_graph_are_the_same(mode, kind):
    """And a flow leaves its input alone."""
    ode, z = make(mode, kind, width=24), state(100, 24)
    before = z.clone()
    with_graph = moved(ode, z.clone().requires_grad_())
    assert with_graph.requires_grad
    with torch.no_grad():
        assert torch.equal(moved(ode, z), with_graph)
    with torch.inference_mode():
        assert torch.equal(moved(ode, z), with_graph)
    ode.eval()
    assert torch.equal(moved(ode, z), with_graph)
    assert torch.equal(z, before)


# ---- Reconstruction, to the last bit


@every_potential
@pytest.mark.parametrize(
    ("integrator", "steps", "precision"),
    [("leapfrog", 100, "bf16"), ("yoshida4", 10, "fp32"), ("blanes_moan_rkn4", 1, "bf16")],
)
def test_reconstruction_error_is_zero(kind, precision, steps, integrator):
    torch.manual_seed(3)
    if kind == "duffing":
        potential = perturbed_duffing(64)
    else:
        potential = POTENTIALS[kind](64, 128, force_precision=precision)
    ode = HamiltonianNeuralODE(potential, steps, 0.1, integrator, verify=True)
    assert_rebuilt(ode, state(2, 5, 64))


@pytest.mark.parametrize(
    ("width", "hidden", "steps", "integrator", "precision", "kind"),
    [
        pytest.param(64, 64, 1000, "leapfrog", "bf16", "mlp", id="1000_steps"),
        pytest.param(256, 512, 100, "leapfrog", "fp32", "confined_context", id="256_wide"),
        pytest.param(512, 2048, 5, "yoshida4", "bf16", "confined_context", id="512_wide"),
        pytest.param(
            512, 512, 1000, "leapfrog", "fp32", "mlp", marks=pytest.mark.slow, id="512_wide_1000_steps"
        ),
    ],
)
def test_reconstruction_error_is_zero_at_length(width, hidden, steps, integrator, precision, kind):
    potential = POTENTIALS[kind](width, hidden, force_precision=precision)
    # Few hidden units leave directions without a force: there a token leaves the range in a time of 100.
    ode = HamiltonianNeuralODE(potential, steps, 0.1 if steps < 1000 else 0.02, integrator, verify=True)
    assert_rebuilt(ode, state(3, width))


def test_reconstruction_error_is_zero_where_floating_point_misses():
    """The comparison does compare: the same flow in floating point is rebuilt with an error."""
    for mode in ("verify", "reversible"):
        ode = make(mode, width=64, steps=100, recon_threshold=1.0)
        z = state(10, 64).requires_grad_()
        moved(ode, z).sum().backward()
        error = flow_metrics(ode)["flow/reconstruction_error"]
        assert error == 0.0 if mode == "verify" else 1e-7 < error < 1e-4


@pytest.mark.parametrize(
    ("mode", "kind", "precision"),
    [
        (mode, kind, precision)
        for (mode, kind), precision in zip(PAIRS, itertools.cycle(["fp32", "bf16"]))
        if kind != "duffing"
    ],
)
def test_autocast_changes_nothing(mode, kind, precision):
    torch.manual_seed(3)
    potential = POTENTIALS[kind](24, force_precision=precision)
    ode, z = HamiltonianNeuralODE(potential, **MODES[mode]), state(40, 24)

    def under_autocast(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return moved(ode, x)

    # bfloat16 forces are not rebuilt in floating point to the default threshold.
    ode.recon_threshold = 1e-5 if precision == "fp32" else 1e-2
    with no_warnings():
        expected, found = flow_gradients(ode, z), gradients(under_autocast, ode.parameters(), z)
    assert_equal(found, expected)
    assert found["end"].dtype == torch.float32
    if mode == "verify":
        assert flow_metrics(ode)["flow/reconstruction_error"] == 0.0


class PlainMLP(MLPPotential):
    """Without the kernel, so that autocast could reach its products."""

    advance, undo = Potential.advance, Potential.undo


@pytest.mark.parametrize("kind", [MLPPotential, PlainMLP])
def test_frozen_weights_cost_no_gradients(kind, monkeypatch):
    ode, z = HamiltonianNeuralODE(kind(16, 32)), state(5, 16).requires_grad_()
    undo, found = ode.potential.undo, []
    monkeypatch.setattr(ode.potential, "undo", lambda *given: found.append(undo(*given)) or found[-1])
    for trained in (True, False):
        ode.requires_grad_(trained)
        moved(ode, z).sum().backward()
    whole, frozen = found
    assert all(torch.equal(x, y) for x, y in zip(whole[:4], frozen[:4], strict=True))
    assert [sum(x.numel() for x in gradients[4:]) for gradients in found] == [16 * 32 + 2 * 32, 0]


@pytest.mark.parametrize(
    ("mode", "potential", "with_context"),
    [
        ("exact", MLPPotential, True),
        ("exact", PlainMLP, False),
        ("reversible", MLPPotential, False),
        ("reversible", PlainMLP, True),
        ("verify", MLPPotential, True),
    ],
)
def test_autocast_around_the_backward_pass_changes_nothing(mode, potential, with_context):
    ode = HamiltonianNeuralODE(potential(16, 32, with_context=with_context), **MODES[mode])
    z = state(5, 16)
    expected = flow_gradients(ode, z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(flow_gradients(ode, z), expected)


class Block(nn.Module):
    """A flow between two products, with dropout and a residual."""

    def __init__(self, ode: HamiltonianNeuralODE, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.ode, self.into, self.out = ode, nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, z):
        return z + self.out(self.dropout(moved(self.ode, self.into(z))))


@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_beside_the_flow(autocast):
    block = Block(make("verify"), 16, dropout=0.5).train()
    for _ in range(3):
        with no_warnings(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            block(state(2, 9, 16)).square().sum().backward()
    assert flow_metrics(block) == {"flow/fallbacks": 0.0, "flow/reconstruction_error": 0.0}


class Scaled(nn.Module):
    """A flow with little to compile around it."""

    def __init__(self, ode: HamiltonianNeuralODE) -> None:
        super().__init__()
        self.ode, self.gain = ode, nn.Parameter(torch.tensor(0.9))

    def forward(self, z):
        return moved(self.ode, self.gain * z).tanh()


def compare_compiled(block, mode, backend, **tolerance):
    compiled = torch.compile(block, backend=backend)
    z = state(2, 9, 16)
    expected = gradients(block, block.parameters(), z)
    found = gradients(compiled, block.parameters(), z)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **tolerance)
    metrics = flow_metrics(block)
    assert metrics["flow/fallbacks"] == 0
    if mode == "verify":
        assert metrics["flow/reconstruction_error"] == 0.0
    return compiled


@pytest.mark.parametrize(("mode", "kind"), [("backprop", "mlp"), ("verify", "confined_context")])
def test_compiled(mode, kind):
    compiled = compare_compiled(Block(make(mode, kind), 16), mode, "aot_eager", rtol=0, atol=0)
    # In evaluation, and where the shape changes.
    with torch.no_grad():
        for z in (state(2, 9, 16), state(3, 5, 16)):
            torch.testing.assert_close(compiled(z), compiled._orig_mod(z), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="the compiler needs gcc")
def test_compiled_to_machine_code():
    # One process and no precompiled headers: what they save over many kernels, they cost over a few.
    with torch._inductor.config.patch({"compile_threads": 1, "cpp_cache_precompile_headers": False}):
        scaled = Scaled(make("verify", "confined_context"))
        compare_compiled(scaled, "verify", "inductor", rtol=1e-4, atol=1e-5)


# ---- Memory


def bytes_saved(mode, steps, kind="mlp"):
    ode, z = make(mode, kind, width=32, steps=steps), state(200, 32).requires_grad_()
    held = {}
    parameters = {x.untyped_storage().data_ptr() for x in ode.parameters()}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        end = moved(ode, z)
    assert end.requires_grad
    return sum(held.values())


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("exact", "mlp"), ("exact", "confined_context"), ("reversible", "mlp"), ("verify", "context")],
)
def test_memory_does_not_grow_with_the_steps(mode, kind):
    state_bytes = 200 * 2 * 32 * 4
    few, many = bytes_saved(mode, 5, kind), bytes_saved(mode, 40, kind)
    assert few == many
    # The final state, the initial one where it is compared, and the context, which is a copy of it.
    assert few == state_bytes * ((1 if mode == "exact" else 2) + ("context" in kind))


def test_memory_grows_with_the_steps_in_backpropagation():
    few, many = bytes_saved("backprop", 5), bytes_saved("backprop", 40)
    assert many > 7 * few > 7 * 200 * 2 * 32 * 4


class Results(TorchDispatchMode):
    """Keeps watch over the memory of all results that are not views of given tensors."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.given = {StorageWeakRef(x.untyped_storage()) for x in given}
        self.sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def alive(self) -> int:
        return sum(
            size for storage, size in self.sizes.items() if not (storage in self.given or storage.expired())
        )


def test_memory_of_checkpointing():
    """A state for every ten of 100 stages."""

    def alive(mode):
        ode, z = make(mode, width=32, steps=99, integrator="leapfrog"), state(200, 32).requires_grad_()
        with Results(z, *ode.parameters()) as results:
            end = moved(ode, z)
        assert end.requires_grad
        return results.alive()

    state_bytes = 200 * 2 * 32 * 4
    # The final state as it is held, and as it is returned.
    assert alive("exact") == 2 * state_bytes
    assert 10 * state_bytes <= alive("checkpoint") <= 13 * state_bytes
    assert alive("backprop") > 100 * state_bytes


# ---- Falling back


def overflowing(kind="mlp", fraction_bits=29):
    """The range is +-4, which a few channels leave on the way."""
    ode = make("exact", kind, steps=20, fraction_bits=fraction_bits)
    z = state(6, 16)
    z[2, 1, 3] = 6.0
    return ode, z


def assert_fallen_back(ode, z, warning):
    """The call warns and counts, later ones are silent, and gradients are right throughout."""
    exact = exact_gradients(ode, z)
    assert not ode.fallen_back
    with pytest.warns(UserWarning, match=warning) as caught:
        found = flow_gradients(ode, z)
    assert len(caught) == 1
    assert str(caught[0].message).startswith(f"{ode.name}: ")
    assert worst_error(found, exact) <= 1e-5
    assert ode.fallen_back
    assert ode.fallback_count == 1
    assert flow_metrics(ode)["flow/fallbacks"] == 1.0
    with no_warnings():
        again = flow_gradients(ode, z)
    assert worst_error(again, exact) <= 1e-5
    assert ode.fallback_count == 1


def test_overflow_on_the_way():
    """The final state need not tell: that of a swing which is back in range does not."""
    ode = HamiltonianNeuralODE(Harmonic(1.0), 63, 0.1, "yoshida4", fraction_bits=29, name="swing")
    z = torch.tensor([[[0.5, 0.2], [5.0, 0.3]], [[0.1, 0.1], [0.2, 0.4]]])
    z[0, :, 0] = torch.tensor([3.5, 3.5])
    ends = moved(in_double(ode), z.double())
    assert max(z.abs().max(), ends.abs().max()) < 4
    assert_fallen_back(
        ode, z, r"left the range of \+-4 of stage.fraction_bits=29; .*stage.gradient=checkpoint"
    )


@pytest.mark.parametrize(("kind", "verify"), [("mlp", False), ("context", True), ("confined_context", False)])
def test_overflow_of_the_input(kind, verify):
    ode, z = overflowing(kind)
    assert_fallen_back(twin(ode, fraction_bits=29, verify=verify), z, "left the range")


@every_potential
def test_overflow_of_a_huge_input(kind):
    ode = make("exact", kind, steps=3, dt=0.01)
    z = state(6, 16)
    # Beyond 2^31 units, and for Duffing with a force beyond 2^31 units a step.
    z[1, 0, 2] = 2000.0
    ode.dt = 0.0001 if kind == "duffing" else 0.01
    ode = twin(ode, fraction_bits=23)
    assert_fallen_back(ode, z, r"range of \+-256")


@some_mlps
def test_overflow_without_a_graph(kind):
    ode, z = overflowing(kind)
    with torch.no_grad(), pytest.warns(UserWarning, match="left the range"):
        end = moved(ode, z)
    assert relative_error(end, moved(in_double(ode), z.double()).detach()) < 1e-6
    assert ode.fallback_count == 1


def test_overflow_under_a_compiler():
    block = Block(make("exact", fraction_bits=29), 16)
    compiled = torch.compile(block, backend="aot_eager")
    z = 20 * state(2, 9, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = gradients(compiled, block.parameters(), z)
    assert block.ode.fallback_count == 1
    with no_warnings():
        assert_equal(gradients(compiled, block.parameters(), z), found)
        assert_equal(gradients(block, block.parameters(), z), found)


def perturb(ode, monkeypatch, amount=1e-3):
    """What undo rebuilds, and the gradients it takes on the way, are off from now on."""
    undo = ode.potential.undo

    def off(*arguments):
        start_q, start_p, *grads = undo(*arguments)
        change = amount * (ode.scale or 1.0)
        return (start_q + change).to(start_q.dtype), start_p, *(1.5 * x for x in grads)

    monkeypatch.setattr(ode.potential, "undo", off)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("reversible", "mlp"),
        ("reversible", "confined_context"),
        ("reversible", "duffing"),
        ("verify", "context"),
        ("verify", "spring"),
    ],
)
def test_forced_reconstruction_failure(mode, kind, monkeypatch):
    ode, z = make(mode, kind, name="layer 3"), state(6, 16)
    exact = exact_gradients(ode, z)
    perturb(ode, monkeypatch)
    with pytest.warns(
        UserWarning, match=r"^layer 3: the initial state was rebuilt with an error of 0.001;"
    ) as caught:
        found = flow_gradients(ode, z)
    assert len(caught) == 1
    assert worst_error(found, exact) <= 1e-5
    assert ode.fallback_count == 1
    metrics = flow_metrics(ode)
    assert metrics["flow/fallbacks"] == 1.0
    assert metrics["flow/reconstruction_error"] == pytest.approx(1e-3, rel=1e-2)
    with no_warnings():
        assert worst_error(flow_gradients(ode, z), exact) <= 1e-5
    # Nothing is rebuilt any more, so nothing is compared.
    assert flow_metrics(ode) == {"flow/fallbacks": 1.0}


@pytest.mark.parametrize("mode", ["reversible", "verify"])
def test_the_smallest_difference_counts(mode, monkeypatch):
    """One unit of one element, and what just passes the threshold."""
    ode, z = make(mode, recon_threshold=1e-5), state(6, 16)
    undo = ode.potential.undo
    off = 1 if mode == "verify" else 2e-5

    def nearly(*arguments):
        start_q, start_p, *grads = undo(*arguments)
        start_p[3, 5] += off
        return start_q, start_p, *grads

    monkeypatch.setattr(ode.potential, "undo", nearly)
    with pytest.warns(UserWarning, match="rebuilt with an error"):
        flow_gradients(ode, z)
    assert ode.fallen_back


def test_reconstruction_of_nan_falls_back(monkeypatch):
    ode, z = make("reversible"), state(6, 16)
    exact = exact_gradients(ode, z)
    perturb(ode, monkeypatch, amount=math.nan)
    with pytest.warns(UserWarning, match="rebuilt with an error of nan"):
        found = flow_gradients(ode, z)
    assert worst_error(found, exact) <= 1e-5


def test_perturbed_integrator(monkeypatch):
    """The weights of the way back are not those of the way there."""
    ode, z = make("reversible"), state(6, 16)
    exact = exact_gradients(ode, z)
    undo = ode.potential.undo
    monkeypatch.setattr(
        ode.potential,
        "undo",
        lambda gq, gp, q, p, weights, *rest: undo(gq, gp, q, p, tuple(1.01 * x for x in weights), *rest),
    )
    with pytest.warns(UserWarning, match="rebuilt with an error"):
        found = flow_gradients(ode, z)
    assert worst_error(found, exact) <= 1e-5


@some_mlps
def test_a_tiny_threshold(kind):
    """What floating point cannot keep."""
    ode = make("reversible", kind, steps=50, recon_threshold=1e-12)
    assert_fallen_back(ode, state(6, 16), "the initial state was rebuilt with an error of ")


def test_training_goes_on_after_a_failure(monkeypatch):
    """And takes the same way as with float64 gradients."""
    ode, z, target = make("reversible"), state(20, 16), state(20, 16)
    reference = in_double(ode)
    losses = []
    for flow, x, y in ((ode, z, target), (reference, z.double(), target.double())):
        optimizer = torch.optim.SGD(flow.parameters(), lr=0.5)
        losses.append([])
        for step in range(6):
            if step == 2 and flow is ode:
                perturb(ode, monkeypatch)
            loss = (moved(flow, x) - y).square().mean()
            optimizer.zero_grad()
            if step == 2 and flow is ode:
                with pytest.warns(UserWarning, match="rebuilt with an error"):
                    loss.backward()
            else:
                loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert ode.fallback_count == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < 0.99 * losses[0][0]


@some_mlps
def test_two_calls_that_fail_warn_once(kind, monkeypatch):
    """Both forward passes were done before the first failure shows."""
    ode, z = make("reversible", kind, width=16), state(6, 16)
    reference = in_double(ode)
    exact = gradients(lambda x: moved(reference, moved(reference, x)), reference.parameters(), z.double())
    perturb(ode, monkeypatch)
    with pytest.warns(UserWarning, match="rebuilt with an error") as caught:
        found = gradients(lambda x: moved(ode, moved(ode, x)), ode.parameters(), z)
    assert len(caught) == 1
    assert worst_error(found, exact) <= 1e-5
    # The gradients of two calls were taken otherwise.
    assert ode.fallback_count == 2


def test_only_the_layer_that_fails_falls_back(monkeypatch):
    model = nn.ModuleList([make("reversible", name="first"), make("reversible", name="second")])
    perturb(model[1], monkeypatch)
    with pytest.warns(UserWarning, match="second"):
        moved(model[1], moved(model[0], state(6, 16))).sum().backward()
    assert [ode.fallen_back for ode in model] == [False, True]
    metrics = flow_metrics(model)
    assert metrics["flow/fallbacks"] == 1.0
    assert metrics["flow/reconstruction_error"] == pytest.approx(1e-3, rel=1e-2)


def test_no_fallback_within_the_threshold():
    ode, z = make("reversible", steps=50), state(20, 16)
    with no_warnings():
        flow_gradients(ode, z)
    metrics = flow_metrics(ode)
    assert metrics["flow/fallbacks"] == 0.0
    assert 0 < metrics["flow/reconstruction_error"] < 8e-6
    # Read once.
    assert flow_metrics(ode) == {"flow/fallbacks": 0.0}


def test_a_kernel_that_overflows_where_the_plain_path_does_not(monkeypatch):
    ode, z = make("reversible"), state(6, 16)
    advance = ode.potential.advance
    monkeypatch.setattr(ode.potential, "advance", lambda *x: (*advance(*x)[:2], torch.tensor(math.inf)))
    assert_fallen_back(ode, z, "its state was not finite")


def test_metrics_of_a_model_without_flows():
    assert flow_metrics(nn.Linear(2, 2)) == {}


def test_state_dict_keeps_the_fallback():
    ode, z = overflowing()
    with pytest.warns(UserWarning, match="left the range"):
        expected = flow_gradients(ode, z)
    saved = nn.Sequential(ode).state_dict()
    restored = nn.Sequential(twin(ode, fraction_bits=29))
    assert not restored[0].fallen_back
    restored.load_state_dict(saved)
    assert restored[0].fallen_back
    assert restored[0].fallback_count == 1
    with no_warnings():
        assert_equal(flow_gradients(restored[0], z), expected)
    # And a state of before the fallback brings the mode back.
    restored.load_state_dict(nn.Sequential(make("exact", steps=20, fraction_bits=29)).state_dict())
    assert not restored[0].fallen_back


def test_copies_keep_the_fallback():
    ode, z = overflowing()
    with pytest.warns(UserWarning, match="left the range"):
        moved(ode, z)
    assert copy.deepcopy(ode).fallen_back


# ---- Not finite


@some_pairs
def test_input_that_is_not_finite(mode, kind):
    for plane, bad in ((0, math.nan), (1, math.nan), (0, math.inf), (1, -math.inf)):
        ode, z = make(mode, kind, name="layer 5"), state(6, 16)
        z[4, plane, 2] = bad
        with pytest.raises(RunError, match=r"^layer 5: .*not finite before the first step"):
            moved(ode, z.clone().requires_grad_())
        with torch.no_grad(), pytest.raises(RunError, match="layer 5"):
            moved(ode, z)
        assert ode.fallback_count == 0


class Pole(Harmonic):
    """No force, but infinite or not a number beyond q = 1."""

    def __init__(self, bad: float) -> None:
        super().__init__(0.0)
        self.bad = bad

    def force(self, q, *coefficients):
        return super().force(q, *coefficients).masked_fill(q > 1, self.bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@every_mode
def test_a_step_that_is_not_finite(mode, bad):
    """q = 0.1 per step: the fourth step ends beyond 1."""
    ode = HamiltonianNeuralODE(Pole(bad), 10, 0.1, "leapfrog", name="layer 2", **MODES[mode])
    z = torch.tensor([[[0.65, 0.0], [1.0, 0.0]]])
    with pytest.raises(RunError, match=r"^layer 2: .*not finite after step 4 of 10"):
        moved(ode, z.requires_grad_())
    with torch.no_grad(), pytest.raises(RunError, match="after step 4 of 10"):
        moved(ode, z)
    # What does not come so far is let through.
    z = torch.tensor([[[-0.65, 0.0], [1.0, 0.0]]])
    torch.testing.assert_close(moved(ode, z), z + torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]))
    assert ode.fallback_count == 0


@every_mode
def test_a_weight_that_is_not_finite(mode):
    for name in ("w1", "b1", "w2", "context_weight"):
        ode = make(mode, "context" if name == "context_weight" else "mlp", name="layer 4")
        getattr(ode.potential, name).data.view(-1)[0] = math.nan
        with pytest.raises(RunError, match=r"^layer 4: .*not finite after step 1 of 10"):
            moved(ode, state(6, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_mode
def test_a_flow_that_runs_off(mode, dtype):
    """A step too long for the spring: the state grows by orders of magnitude a step."""
    ode = HamiltonianNeuralODE(Harmonic(1e4), 100, 1.0, "leapfrog", name="loose", **MODES[mode])
    z = state(6, 16, dtype=dtype)
    if dtype == torch.float64:
        ode.double()
    with warnings.catch_warnings():
        # Out of range of the fixed-point state before it is out of that of floating point.
        warnings.simplefilter("ignore")
        with pytest.raises(RunError, match=r"^loose: .*not finite after step \d+ of 100"):
            moved(ode, z)


def test_a_state_in_double_precision_needs_no_such_parameters():
    """Backpropagation takes it, and says so of NaN as ever."""
    ode, z = make("backprop"), state(6, 16, dtype=torch.float64)
    assert moved(ode, z).dtype == torch.float64
    z[0, 0, 0] = math.nan
    with pytest.raises(RunError, match="before the first step"):
        moved(ode, z)
    z[0, 0, 0] = 0.0
    ode.potential.w2.data[0] = math.nan
    with pytest.raises(RunError, match="after step 1 of 10"):
        moved(ode, z)
