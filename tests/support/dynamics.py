"""Potentials of classical mechanics, and the float64 reference that every gradient is held against."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from muse.dynamics import DuffingPotential, HamiltonianNeuralODE, MLPPotential, Potential, flow_metrics
from support.rounding import assert_as_accurate

# The modes, and exact with the comparison on request.
MODES = {name: {"gradient": name} for name in ("exact", "reversible", "checkpoint", "backprop")} | {
    "verify": {"gradient": "exact", "verify": True}
}


class Harmonic(Potential):
    """V = stiffness |q|^2 / 2."""

    def __init__(self, stiffness: float = 1.0) -> None:
        super().__init__()
        self.stiffness = nn.Parameter(torch.tensor(stiffness))

    def value(self, q: Tensor, *coefficients: Tensor) -> Tensor:
        (stiffness,) = (x.to(q.dtype) for x in coefficients)
        return stiffness * q.square().sum(-1) / 2

    def force(self, q: Tensor, *coefficients: Tensor) -> Tensor:
        (stiffness,) = (x.to(q.dtype) for x in coefficients)
        return -stiffness * q


class Kepler(Potential):
    """V = -1 / |q|."""

    def value(self, q: Tensor, *coefficients: Tensor) -> Tensor:
        return -1 / q.norm(dim=-1)

    def force(self, q: Tensor, *coefficients: Tensor) -> Tensor:
        return -q / q.norm(dim=-1, keepdim=True) ** 3


class HenonHeiles(Potential):
    """V = |q|^2 / 2 + x^2 y - y^3 / 3 of q = (x, y)."""

    def value(self, q: Tensor, *coefficients: Tensor) -> Tensor:
        x, y = q.unbind(-1)
        return q.square().sum(-1) / 2 + x.square() * y - y**3 / 3

    def force(self, q: Tensor, *coefficients: Tensor) -> Tensor:
        x, y = q.unbind(-1)
        return -torch.stack((x + 2 * x * y, y + x.square() - y.square()), -1)


class UniformField(Potential):
    """V = slope . q: a force that does not depend on q."""

    def __init__(self, features: int, trained: bool = True) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.randn(features), requires_grad=trained)

    def value(self, q: Tensor, *coefficients: Tensor) -> Tensor:
        return q @ coefficients[0].to(q.dtype)

    def force(self, q: Tensor, *coefficients: Tensor) -> Tensor:
        return -coefficients[0].to(q.dtype).expand_as(q)


class Frozen(Potential):
    """A potential in the context of one state, wherever its flow starts."""

    def __init__(self, inner: Potential, z: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.given = tuple(x.detach() for x in inner.context(*z.unbind(-2)))
        self.value, self.force, self.field = inner.value, inner.force, inner.field
        self.advance, self.undo = inner.advance, inner.undo

    def coefficients(self) -> tuple[Tensor, ...]:
        return self.inner.coefficients()

    def context(self, q: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        return self.given


def kepler_orbit(eccentricity: float) -> Tensor:
    """The pericentre (2, 2) of an orbit with a period of 2 pi."""
    q = torch.tensor([1 - eccentricity, 0.0], dtype=torch.float64)
    p = torch.tensor([0.0, ((1 + eccentricity) / (1 - eccentricity)) ** 0.5], dtype=torch.float64)
    return torch.stack((q, p))


def perturbed_mlp(width: int, hidden: int | None = None, **options) -> MLPPotential:
    """With biases, and weights w2 of either sign, as training may leave them."""
    potential = MLPPotential(width, hidden or 2 * width, **options)
    with torch.no_grad():
        potential.b1.normal_(std=0.3)
        potential.w2[::2] *= -1
    return potential


def perturbed_duffing(width: int) -> DuffingPotential:
    potential = DuffingPotential(width)
    with torch.no_grad():
        potential.stiffness.uniform_(0.3, 1.5)
        potential.quartic.uniform_(-0.2, 0.2)
    return potential


def perturbed_context(width: int, hidden: int | None = None, **options) -> MLPPotential:
    """One that depends on where a token starts."""
    return perturbed_mlp(width, hidden, with_context=True, **options)


def perturbed_spring(width: int, hidden: int | None = None, **options) -> MLPPotential:
    """One with a spring beside the hidden units."""
    return perturbed_mlp(width, hidden, confinement=0.4, **options)


def perturbed_confined_context(width: int, hidden: int | None = None, **options) -> MLPPotential:
    """With both, as stage 2 has it by default."""
    return perturbed_context(width, hidden, confinement=0.5, **options)


POTENTIALS: dict[str, Callable[[int], Potential]] = {
    "mlp": perturbed_mlp,
    "context": perturbed_context,
    "spring": perturbed_spring,
    "confined_context": perturbed_confined_context,
    "duffing": perturbed_duffing,
}


def some_context(potential: Potential, q: Tensor) -> tuple[Tensor, ...]:
    """The context of tokens that are at q now and started elsewhere."""
    return potential.context(0.7 * torch.randn_like(q), 0.7 * torch.randn_like(q))


def state(*shape: int, rms: float = 0.7, dtype: torch.dtype = torch.float32) -> Tensor:
    """A planar state (..., 2, D) of this root mean square."""
    *batch, width = shape
    return rms * torch.randn(*batch, 2, width, dtype=dtype)


def twin(ode: HamiltonianNeuralODE, **options) -> HamiltonianNeuralODE:
    """The same flow of a copy of the potential, with other options."""
    kept = {name: getattr(ode, name) for name in ("steps", "dt", "integrator", "gradient", "name")}
    return HamiltonianNeuralODE(copy.deepcopy(ode.potential), **(kept | options))


def in_double(ode: HamiltonianNeuralODE, gradient: str = "backprop") -> HamiltonianNeuralODE:
    """The same discrete map in float64, differentiated by plain autograd."""
    return twin(ode, gradient=gradient).double()


def moved(ode: HamiltonianNeuralODE, z: Tensor) -> Tensor:
    """Planar z after the flow."""
    return torch.stack(ode(*z.unbind(-2)), -2)


def gradients(run: Callable[[Tensor], Tensor], parameters: Iterator[Tensor], z: Tensor) -> dict[str, Tensor]:
    """The result of a flow of z, and the gradients of z and the parameters for one fixed cotangent."""
    z = z.detach().clone().requires_grad_()
    end = moved(run, z) if isinstance(run, HamiltonianNeuralODE) else run(z)
    cotangent = torch.randn(end.shape, generator=torch.Generator().manual_seed(1)).to(end.dtype)
    found = torch.autograd.grad(end, (z, *parameters), cotangent)
    return {"end": end.detach(), "z": found[0]} | {f"parameter {i}": x for i, x in enumerate(found[1:])}


def flow_gradients(ode: HamiltonianNeuralODE, z: Tensor) -> dict[str, Tensor]:
    return gradients(ode, ode.potential.parameters(), z)


def exact_gradients(ode: HamiltonianNeuralODE, z: Tensor) -> dict[str, Tensor]:
    """By float64 backpropagation through the same discrete map."""
    return flow_gradients(in_double(ode), z.double())


def relative_error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


def worst_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest relative error of a gradient (or of the result)."""
    assert found.keys() == exact.keys()
    return max(relative_error(found[name], exact[name]) for name in found)


def assert_gradients_as_accurate(ode: HamiltonianNeuralODE, z: Tensor) -> None:
    """As plain backpropagation through the same steps in the dtype of z."""
    plain, exact = twin(ode, gradient="backprop"), exact_gradients(ode, z)
    names = exact.keys() - {"end"}

    def some(gradients: dict[str, Tensor]) -> list[Tensor]:
        return [gradients[name] for name in sorted(names)]

    assert_as_accurate(some(flow_gradients(ode, z)), lambda: some(flow_gradients(plain, z)), some(exact), 8)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same bits."""
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def assert_rebuilt(ode: HamiltonianNeuralODE, z: Tensor) -> None:
    """The comparison of ``verify`` finds no difference; the state has moved in the meantime."""
    z = z.requires_grad_()
    with no_warnings():
        end = moved(ode, z)
        end.square().sum().backward()
    assert (end - z).abs().max() > 0.01
    assert z.grad.isfinite().all()
    assert flow_metrics(ode) == {"flow/fallbacks": 0.0, "flow/reconstruction_error": 0.0}
