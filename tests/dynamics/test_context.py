"""A potential that sees where a token starts its flow, and holds on to that for the whole flow."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from support.dynamics import (
    MODES,
    Frozen,
    assert_equal,
    assert_gradients_as_accurate,
    assert_rebuilt,
    exact_gradients,
    flow_gradients,
    gradients,
    in_double,
    moved,
    no_warnings,
    perturbed_context,
    relative_error,
    state,
    worst_error,
)

import muse.dynamics.potential
from muse.config import StageConfig, WidthConfig
from muse.dynamics import HamiltonianNeuralODE, MLPPotential, flow_metrics, stages
from muse.dynamics.energy import curvature, drift, energy, modification, trajectory
from muse.errors import RunError
from muse.models.hamiltonian import HamiltonianFlow

CHUNK = muse.dynamics.potential.CHUNK
PHIS = ("gelu_integral", "silu", "gelu", "softplus")
every_mode = pytest.mark.parametrize("mode", MODES)


def make(mode="exact", width=16, hidden=None, steps=10, dt=0.1, integrator="blanes_moan_rkn4", **options):
    """A flow whose potential depends on the seed only; options of the potential."""
    torch.manual_seed(7)
    potential = perturbed_context(width, hidden, **options)
    return HamiltonianNeuralODE(potential, steps, dt, integrator, **MODES[mode])


# ---- What V is


def phi(a, name):
    """As the formulas have it."""
    match name:
        case "gelu_integral":
            cdf, density = (1 + torch.erf(a / 2**0.5)) / 2, torch.exp(-a * a / 2) / (2 * math.pi) ** 0.5
            return ((a * a - 1) * cdf + a * density) / 2
        case "silu":
            return a * torch.sigmoid(a)
        case "gelu":
            return F.gelu(a)
        case _:
            return torch.log1p(torch.exp(a))


def by_hand(parameters, z, steps, dt, name="gelu_integral", spring=0.0):
    """Leapfrog with the force that autograd makes of V."""
    w1, b1, w2, context_weight = parameters
    q, p = z.unbind(-2)
    start = torch.cat((q, p), -1)

    def force(q):
        # Another tensor than the q of the start, through which there is no force.
        here = q.clone()
        value = (w2.abs() * phi(here @ w1.T + b1 + start @ context_weight.T, name)).sum()
        value = value + spring / 2 * here.square().sum()
        return -torch.autograd.grad(value, here, create_graph=True)[0]

    for _ in range(steps):
        p = p + dt / 2 * force(q)
        q = q + dt * p
        p = p + dt / 2 * force(q)
    return torch.stack((q, p), -2)


@pytest.mark.parametrize(
    ("mode", "name", "spring"),
    [
        *zip(itertools.repeat("exact"), PHIS, itertools.cycle([0.0, 0.5])),
        *zip(itertools.repeat("backprop"), PHIS, itertools.cycle([0.5, 0.0])),
        ("reversible", "gelu_integral", 0.5),
        ("checkpoint", "silu", 0.5),
        ("verify", "gelu", 0.5),
    ],
)
def test_the_flow_is_what_the_formula_says(mode, name, spring):
    """The result and every gradient, in single precision, against the formula in double precision."""
    ode = make(mode, integrator="leapfrog", steps=5, dt=0.2, phi=name, confinement=spring)
    z = state(30, 16)
    parameters = [x.detach().double().requires_grad_() for x in ode.parameters()]
    assert len(parameters) == 4
    exact = gradients(lambda x: by_hand(parameters, x, 5, 0.2, name, spring), iter(parameters), z.double())
    with no_warnings():
        found = flow_gradients(ode, z)
    assert worst_error(found, exact) <= 1e-5


def test_value_by_hand():
    """One unit, which sees q + 0.5 + 2 q0 - p0."""
    potential = MLPPotential(1, 1, phi="softplus", with_context=True).double()
    with torch.no_grad():
        potential.w1.fill_(1.0)
        potential.b1.fill_(0.5)
        potential.w2.fill_(-3.0)
        potential.context_weight.copy_(torch.tensor([[2.0, -1.0]]))
    q0, p0 = torch.tensor([[0.3], [0.0]]).double(), torch.tensor([[0.1], [-1.0]]).double()
    q = torch.tensor([[0.25], [0.5]]).double()
    expected = torch.tensor([3 * math.log1p(math.exp(0.25 + 0.5 + 0.6 - 0.1)), 3 * math.log1p(math.exp(2.0))])
    torch.testing.assert_close(potential(q, *potential.context(q0, p0)), expected.double())


def test_without_weights_of_the_context_there_is_none():
    """With U = 0 it is the potential without a context, which starts with the same weights."""
    torch.manual_seed(5)
    plain = MLPPotential(16, 32)
    torch.manual_seed(5)
    potential = MLPPotential(16, 32, with_context=True)
    assert {name for name, _ in plain.named_parameters()} == {"w1", "b1", "w2"}
    assert {name for name, _ in potential.named_parameters()} == {"w1", "b1", "w2", "context_weight"}
    assert potential.context_weight.shape == (32, 32)
    for name, x in plain.named_parameters():
        assert torch.equal(x, getattr(potential, name))
    z = state(20, 16, dtype=torch.float64)
    q, p = z.unbind(-2)
    assert plain.context(q, p) == ()
    # In double precision, where a difference is not one of rounding.
    flows = [HamiltonianNeuralODE(x, gradient="backprop").double() for x in (plain, potential)]
    assert (moved(flows[0], z) - moved(flows[1], z)).abs().max() > 0.1
    with torch.no_grad():
        potential.context_weight.zero_()
    torch.testing.assert_close(potential(q, *potential.context(q, p)), plain(q))
    expected, found = (flow_gradients(x, z) for x in flows)
    # What U is trained by does not vanish with it.
    assert found.pop("parameter 3").norm() > 0
    assert worst_error(found, expected) < 1e-12


@pytest.mark.parametrize(
    "use",
    [
        lambda x, q: x(q),
        lambda x, q: x.force(q, *x.coefficients()),
        lambda x, q: x.field(*x.coefficients()),
        lambda x, q: energy(x, q, q),
        lambda x, q: modification(x, q, q, 0.1),
        lambda x, q: curvature(x, q),
    ],
    ids=["value", "force", "field", "energy", "modification", "curvature"],
)
def test_a_context_that_is_missing(use):
    potential, q = perturbed_context(6), torch.randn(5, 6)
    with pytest.raises(ValueError, match=r"depends on a context; pass what its context\(q, p\) returns"):
        use(potential, q)


def test_the_start_of_a_flow_that_lacks_its_context():
    """Nor is U taken for one."""
    potential = perturbed_context(6)
    q, p = state(5, 6).unbind(-2)
    part = stages("leapfrog", 2, 0.1)
    with pytest.raises(ValueError):  # noqa: PT011
        potential.advance(q, p, potential.coefficients(), part, 0.0)


# ---- Gradients


# Around what is taken at a time.
@pytest.mark.parametrize(
    ("mode", "tokens"),
    [
        ("exact", 1),
        ("exact", CHUNK),
        ("exact", 2 * CHUNK + 1),
        ("reversible", CHUNK - 1),
        ("reversible", CHUNK + 1),
    ],
)
def test_gradients_of_many_tokens_against_double_precision(mode, tokens):
    ode, z = make(mode, steps=3, integrator="yoshida4"), state(tokens, 16)
    with no_warnings():
        found = flow_gradients(ode, z)
    exact = exact_gradients(ode, z)
    assert len(found) == 6
    for name in found:
        assert found[name].shape == exact[name].shape
        assert relative_error(found[name], exact[name]) <= 1e-5, name


@pytest.mark.parametrize("tokens", [1, CHUNK + 1])
def test_gradients_of_many_tokens_are_as_accurate_as_those_of_backpropagation(tokens):
    ode, z = make(width=8, steps=2, integrator="leapfrog"), state(tokens, 8)
    assert_gradients_as_accurate(ode, z)


@pytest.mark.parametrize(
    ("mode", "precision"),
    [
        ("exact", "bf16"),
        ("exact", "fp16"),
        ("reversible", "fp16"),
        ("checkpoint", "bf16"),
        ("backprop", "fp16"),
        ("backprop", "bf16"),
        ("verify", "fp16"),
    ],
)
def test_gradients_of_half_precision_forces(mode, precision):
    """They are those of the same map with exact forces, to what such a force is worth."""
    ode, z = make(mode, width=32, force_precision=precision), state(4, 25, 32)
    ode.recon_threshold = 1e-2
    with no_warnings():
        found = flow_gradients(ode, z)
    exact = exact_gradients(ode, z)
    # Backpropagation sums over the stages in half precision, the other modes do not.
    tolerance = {"bf16": 1.0, "fp16": 0.125}[precision] * (2e-2 if mode == "backprop" else 6e-3)
    for name in found:
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], exact[name]) <= tolerance, name


@pytest.mark.parametrize(
    ("mode", "precision"),
    [
        ("exact", "fp32"),
        ("exact", "bf16"),
        ("reversible", "bf16"),
        ("checkpoint", "bf16"),
        ("backprop", "fp32"),
        ("verify", "fp32"),
    ],
)
def test_gradients_of_parameters_in_bfloat16(mode, precision):
    """Gradients are rounded once as they are stored, or come of forces in the same precision."""
    ode, z = make(mode, width=32, force_precision=precision).bfloat16(), state(4, 25, 32)
    ode.recon_threshold = 1e-5 if precision == "fp32" else 1e-2
    with no_warnings():
        found = flow_gradients(ode, z)
    exact = exact_gradients(ode, z)
    for name in found:
        stored = name.startswith("parameter")
        assert found[name].dtype == (torch.bfloat16 if stored else torch.float32)
        if precision == "bf16":
            tolerance = 2e-2 if mode == "backprop" else 1e-2
        else:
            tolerance = 5e-3 if stored else 1e-5
        assert relative_error(found[name], exact[name]) <= tolerance, name


@every_mode
def test_the_input_has_a_gradient_through_the_context(mode):
    """Beside the one that is left if the context is held fixed, whose parameters' gradients are the same."""
    ode, z = make(mode, width=32), state(40, 32)
    reference = in_double(ode)

    def held_fixed(flow, x):
        options = MODES[mode] if flow is ode else {"gradient": "backprop"}
        fixed = HamiltonianNeuralODE(
            Frozen(flow.potential, x), flow.steps, flow.dt, flow.integrator, **options
        )
        return gradients(fixed, flow.potential.parameters(), x)

    found, fixed = flow_gradients(ode, z), held_fixed(ode, z)
    exact, exact_fixed = flow_gradients(reference, z.double()), held_fixed(reference, z.double())
    through = found.pop("z") - fixed.pop("z")
    exact_through = exact["z"] - exact_fixed["z"]
    assert exact_through.norm() > 0.1 * exact["z"].norm()
    assert relative_error(through, exact_through) < 1e-4
    # Of q0 and of p0.
    assert exact_through[:, 0].norm() > 0.1 * exact_through.norm() < 10 * exact_through[:, 1].norm()
    assert_equal(found, fixed)


@pytest.mark.parametrize("mode", ["exact", "reversible"])
def test_repeated_backward_of_many_tokens_is_bitwise_equal(mode):
    ode, z = make(mode, width=8, steps=2), state(2 * CHUNK + 1, 8)
    first = flow_gradients(ode, z)
    for _ in range(2):
        assert_equal(flow_gradients(ode, z), first)
    leaf = z.clone().requires_grad_()
    end = moved(ode, leaf)
    wanted = (leaf, *ode.parameters())
    once, twice = (torch.autograd.grad(end.square().sum(), wanted, retain_graph=True) for _ in range(2))
    for x, y in zip(once, twice, strict=True):
        assert torch.equal(x, y)


# ---- Reconstruction, to the last bit


@pytest.mark.parametrize(
    ("tokens", "precision"),
    [(1, "fp32"), (CHUNK - 1, "bf16"), (CHUNK, "fp16"), (CHUNK + 1, "fp32"), (2 * CHUNK + 1, "bf16")],
)
def test_reconstruction_error_is_zero_at_any_number_of_tokens(tokens, precision):
    assert_rebuilt(make("verify", 12, 24, 3, force_precision=precision), state(tokens, 12))


@pytest.mark.parametrize(
    ("width", "steps", "precision"),
    [(1, 10, "fp16"), (6, 100, "bf16"), (33, 10, "fp32"), (33, 1, "bf16"), (96, 10, "fp16"), (96, 1, "fp32")],
)
def test_reconstruction_error_is_zero_at_any_width(width, steps, precision):
    # In shorter steps no token leaves the range.
    ode = make("verify", width, 3 * width, steps, 0.1 if steps < 100 else 0.05, force_precision=precision)
    assert_rebuilt(ode, state(7, width))


@pytest.mark.parametrize(
    ("shape", "precision"),
    [((24,), "bf16"), ((2, 3, 5, 24), "fp16"), ((3, 2, 2, 97, 24), "fp32")],
    ids=str,
)
def test_reconstruction_error_is_zero_in_any_shape(shape, precision):
    assert_rebuilt(make("verify", 24, force_precision=precision), state(*shape))


@pytest.mark.parametrize(
    ("stored", "precision"),
    [(torch.bfloat16, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "bf16"), (torch.float16, "fp16")],
    ids=str,
)
def test_reconstruction_error_is_zero_with_weights_in_half_precision(stored, precision):
    assert_rebuilt(make("verify", 24, force_precision=precision).to(stored), state(50, 24))


@pytest.mark.parametrize(
    ("autocast", "precision"),
    [(torch.bfloat16, "fp32"), (torch.float16, "bf16"), (torch.bfloat16, "fp16")],
    ids=str,
)
def test_reconstruction_error_is_zero_under_autocast(autocast, precision):
    ode, z = make("verify", 24, force_precision=precision), state(CHUNK + 6, 24)
    with torch.autocast("cpu", dtype=autocast):
        assert_rebuilt(ode, z)


def strided(order, tokens, width):
    """A state (tokens, 2, width) whose memory has another order."""
    return state(tokens, width).permute(order).contiguous().permute(sorted(range(3), key=order.__getitem__))


@pytest.mark.parametrize(
    ("tokens", "width", "order", "precision"),
    [
        (2, 16, (2, 1, 0), "fp16"),
        (5, 64, (1, 2, 0), "fp32"),
        (40, 96, (1, 0, 2), "fp16"),
        (40, 96, (2, 1, 0), "fp32"),
        (300, 96, (1, 2, 0), "fp16"),
        (CHUNK + 1, 16, (1, 2, 0), "fp32"),
    ],
    ids=str,
)
def test_reconstruction_error_is_zero_whatever_the_strides(order, tokens, width, precision):
    """Also where neighbours in memory are the tokens: a product may sum in an order that depends on it."""
    z = strided(order, tokens, width)
    assert not z.is_contiguous()
    assert_rebuilt(make("verify", width, force_precision=precision, steps=5), z)


@pytest.mark.parametrize(
    ("mode", "order"), [*zip(MODES, itertools.cycle([(1, 0, 2), (2, 1, 0), (1, 2, 0)]))], ids=str
)
def test_strides_matter_no_more_than_rounding(mode, order):
    ode, z = make(mode, width=24), strided(order, 50, 24)
    found, expected = flow_gradients(ode, z), flow_gradients(ode, z.contiguous())
    assert worst_error(found, expected) < 1e-5


# ---- Tokens


@every_mode
def test_other_tokens_do_not_matter(mode):
    """Up to rounding: alone, or among others."""
    ode, z = make(mode, width=24), state(40, 24)
    ends = moved(ode, z)
    for some in (slice(3, 4), slice(0, 17), slice(12, 40)):
        torch.testing.assert_close(moved(ode, z[some]), ends[some], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["exact", "reversible"])
def test_a_token_changes_no_other_bit(mode):
    """Neither of its own chunk nor of the other."""
    ode, z = make(mode, width=8, steps=2, integrator="leapfrog"), state(CHUNK + 100, 8)
    before = flow_gradients(ode, z)
    for changed in (0, CHUNK - 1, CHUNK, CHUNK + 99):
        other = z.clone()
        other[changed] += 1
        after = flow_gradients(ode, other)
        others = torch.arange(len(z)) != changed
        for name in ("end", "z"):
            assert torch.equal(after[name][others], before[name][others])
            assert not torch.equal(after[name][changed], before[name][changed])


@pytest.mark.parametrize("mode", ["exact", "reversible", "verify"])
def test_chunks_do_not_matter(mode, monkeypatch):
    ode, z = make(mode, width=24), state(3, 11, 24)
    whole = flow_gradients(ode, z)
    monkeypatch.setattr(muse.dynamics.potential, "CHUNK", 7)
    with no_warnings():
        parts = flow_gradients(ode, z)
    assert worst_error(parts, whole) < 1e-5


def test_peak_is_that_of_all_chunks():
    potential = perturbed_context(8)
    z = state(2 * CHUNK + 1, 8)
    peaks = []
    for loud in (0, CHUNK, 2 * CHUNK):
        other = z.clone()
        other[loud, 0, 3] = 100.0
        q, p = other.unbind(-2)
        coefficients = (*potential.coefficients(), *potential.context(q, p))
        peaks.append(potential.advance(q, p, coefficients, stages("leapfrog", 1, 0.01), 0.0)[2].item())
    assert min(peaks) >= 99


# ---- Energy and geometry, at a context


@pytest.mark.parametrize("width", [4, 96])
def test_energy_is_conserved_in_the_context_of_the_start(width):
    flow = make("backprop", width, 4 * width).double()
    z = state(64, width, dtype=torch.float64)
    taken = trajectory(flow, *z.unbind(-2), 100, modified=False)
    assert 0 < drift(taken.energy).max() < 1e-6
    # It is no other function that is conserved.
    q, p = z.unbind(-2)
    own, other = flow.potential.context(q, p), flow.potential.context(taken.q, taken.p)
    ends = energy(flow.potential, taken.q, taken.p, own)
    torch.testing.assert_close(ends, taken.energy[-1], rtol=1e-12, atol=0)
    moved = (energy(flow.potential, taken.q, taken.p, other) - taken.energy[0]).abs() / taken.energy[0]
    assert moved.max() > 1e-2


def test_energy_error_of_leapfrog_falls_by_four():
    flow = make("backprop", 16, 64, integrator="leapfrog").double()
    start = state(64, 16, dtype=torch.float64).unbind(-2)
    errors = [
        drift(trajectory(flow, *start, 50 * 2**i, 0.1 / 2**i, every=2**i, modified=False).energy).max().item()
        for i in range(4)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(("tokens", "precision"), [(40, "fp32"), (40, "fp16"), (CHUNK + 1, "bf16")])
def test_there_and_back_in_fixed_point(tokens, precision):
    """Turned round, and in the context of the way there, a token comes back to the very integers."""
    potential = perturbed_context(24, force_precision=precision)
    q, p = state(tokens, 24).unbind(-2)
    coefficients = (*potential.coefficients(), *potential.context(q, p))
    part, scale = stages("blanes_moan_rkn4", 10, 0.1), 2.0**23
    end_q, end_p, _ = potential.advance(q, p, coefficients, part, scale)
    back_q, back_p, _ = potential.advance(end_q, -end_p, coefficients, part, scale)
    start_q, start_p = ((x.double() * scale).round().to(torch.int32) for x in (q, p))
    assert torch.equal(back_q, start_q)
    assert torch.equal(-back_p, start_p)
    # In the context of its end it does not.
    other = (*potential.coefficients(), *potential.context(end_q / scale, -end_p / scale))
    lost_q, _, _ = potential.advance(end_q, -end_p, other, part, scale)
    assert (lost_q - start_q).abs().max() > 0.01 * scale


# ---- Falling back, and states that are not finite


@pytest.mark.parametrize(("verify", "loud"), [(False, CHUNK + 5), (True, 0)])
def test_overflow_in_any_chunk_falls_back(verify, loud):
    torch.manual_seed(7)
    potential = perturbed_context(8)
    ode = HamiltonianNeuralODE(potential, 5, 0.1, fraction_bits=29, verify=verify, name="layer 6")
    z = 0.5 * state(CHUNK + 10, 8).clamp(-2, 2)
    z[loud, 1, 3] = 6.0
    exact = exact_gradients(ode, z)
    with pytest.warns(UserWarning, match=r"^layer 6: its state left the range of \+-4"):
        found = flow_gradients(ode, z)
    assert worst_error(found, exact) <= 1e-5
    assert ode.fallback_count == 1
    with no_warnings():
        assert worst_error(flow_gradients(ode, z), exact) <= 1e-5
    # What stays in range does not.
    z[loud, 1, 3] = 0.5
    other = HamiltonianNeuralODE(potential, 5, 0.1, fraction_bits=29, verify=verify)
    with no_warnings():
        flow_gradients(other, z)
    assert other.fallback_count == 0


@pytest.mark.parametrize(
    ("mode", "bad", "token"),
    [
        ("exact", math.nan, CHUNK + 5),
        ("exact", math.inf, 0),
        ("reversible", math.inf, CHUNK + 5),
        ("checkpoint", math.nan, 0),
        ("backprop", math.inf, 0),
        ("verify", math.nan, CHUNK + 5),
    ],
)
def test_a_token_that_is_not_finite(mode, bad, token):
    ode, z = make(mode, 8, steps=3), state(CHUNK + 10, 8)
    ode.name = "blocks.2.flow.1"
    z[token, 1, 2] = bad
    with pytest.raises(RunError, match=r"^blocks\.2\.flow\.1: .*not finite before the first step"):
        moved(ode, z)
    assert ode.fallback_count == 0


@every_mode
def test_a_step_that_is_not_finite(mode):
    """U of 1e39 is infinite in float32 and makes forces so; the message has the step."""
    ode, z = make(mode, 8, steps=3), state(20, 8)
    ode.name = "blocks.0.flow.0"
    ode.potential.context_weight.data.mul_(1e39)
    with pytest.raises(RunError, match=r"^blocks\.0\.flow\.0: .*not finite after step 1 of 3"):
        moved(ode, z)


# ---- In a block


def block_flow(**options):
    torch.manual_seed(11)
    stage = StageConfig(number="2", potential_width=24, context=True, ode_steps=2, dt=0.5, **options)
    return HamiltonianFlow(WidthConfig(d_model=12, heads=2, kv_heads=2, d_ff=48), stage, "blocks.0.flow")


@pytest.mark.parametrize(
    ("gradient", "flows"), [("exact", 1), ("exact", 3), ("reversible", 2), ("checkpoint", 2), ("backprop", 3)]
)
def test_flows_in_turn_against_double_precision(gradient, flows):
    """Each in the context that the one before it leaves."""
    flow = block_flow(gradient=gradient, flows=flows, verify=gradient == "exact")
    reference = copy.deepcopy(flow).double()
    for ode in reference.odes:
        ode.gradient, ode.scale = "backprop", 0.0
    z = state(4, 9, 12)
    with no_warnings():
        found = gradients(flow, flow.parameters(), z)
    assert len(found) == 2 + 4 * flows
    exact = gradients(reference, reference.parameters(), z.double())
    # The change of the state is smaller than the state, whose rounding it has.
    assert worst_error(found, exact) <= 2e-5
    if gradient == "exact":
        assert flow_metrics(flow) == {"flow/fallbacks": 0.0, "flow/reconstruction_error": 0.0}


def test_a_flow_of_a_block_that_is_not_finite_is_named():
    flow = block_flow()
    flow.odes[1].potential.context_weight.data[3, 4] = math.nan
    with pytest.raises(RunError, match=r"^blocks\.0\.flow\.1: .*not finite after step 1 of 2"):
        flow(state(4, 9, 12))
