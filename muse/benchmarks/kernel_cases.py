"""The operations of kernels/ beside what one would use instead: is it right, how fast, how much memory.

``eager`` is the same maths as a good user of PyTorch writes it on planes in the same dtype. It is the measure
of correctness, too, and ``compiled`` is torch.compile of it. Other alternatives are SDPA on concatenated
planes, four real products, a bare one whose weight is no longer complex, and torch's own complex64.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.adamw import Coefficients, Part, adamw, coefficients, key_of
from kernels.adamw.plain import adamw as plain_adamw
from kernels.complex_activation import ACTIVATIONS, complex_activation
from kernels.complex_activation.eager import activation_floor
from kernels.complex_activation.plain import activation as plain_activation
from kernels.complex_attention import SCORES, complex_attention
from kernels.complex_attention.plain import attention as plain_attention
from kernels.complex_attention.plain import future_keys, native
from kernels.complex_linear import complex_linear, complex_linear_activated
from kernels.complex_linear.plain import by_real_form, linear, real_form
from kernels.complex_norm import add_complex_rms_norm, complex_layer_norm, complex_rms_norm
from kernels.complex_norm.plain import add_rms_norm, layer_norm, rms_norm
from kernels.complex_rotary import rotate
from kernels.complex_rotary.plain import rotate as plain_rotate
from kernels.complex_scan import complex_scan
from kernels.complex_scan.plain import complex_scan as plain_scan
from kernels.launch import eager
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_cross_entropy.plain import linear_cross_entropy as plain_cross_entropy
from kernels.planar import modulus_floor
from kernels.symplectic import symplectic_flow
from kernels.symplectic.plain import plain_flow, plain_force
from muse.benchmarks.workload import batch_shape
from muse.compiler import key_cache_by_vectors
from muse.config import BenchConfig
from muse.hardware import synchronize
from muse.measure.matrix_products import COMPLEX_ATTENTION, ProductRecorder, product_rate
from muse.measure.operations import InsideOperations
from muse.measure.passes import Passes, Times, Updates, outputs, time_passes
from muse.measure.peak_memory import GB, peak_memory
from muse.measure.timing import quantile
from muse.models.loss import linear_cross_entropy as loss_by_chunks

TIME_STEP = 0.1
# Units of the exact flow's state: 2^-22.
SCALE = 2.0**22

Function = Callable[..., Any]
Normal = Callable[..., Tensor]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measured tensors: positions are ``batch`` times ``length``."""

    batch: int
    length: int
    width: int
    heads: int
    head_dim: int
    hidden: int
    steps: int
    vocab: int


@dataclass(frozen=True)
class Case:
    """One operation on given inputs.

    Attributes:
        name: what the reports call it.
        inputs: leaves that require gradients.
        ours: the operation, called with the inputs; returns a tensor or a tuple of tensors.
        plain: the same maths in plain PyTorch.
        others: more alternatives, each with its own inputs.
        by_token: whether the plain code is a loop over the tokens, which torch.compile would write out.
        updates: whether it has no backward pass and changes its inputs, or takes them as if it did.
    """

    name: str
    inputs: Sequence[Tensor]
    ours: Function
    plain: Function
    others: dict[str, tuple[Function, Sequence[Tensor]]] = field(default_factory=dict)
    by_token: bool = False
    updates: bool = False


def sizes_of(config: BenchConfig) -> Sizes:
    """The sizes of the options, those left open as in the complex model."""
    options, widths = config.benchmark, config.model.complex
    batch, length = batch_shape(config)
    assert options.ode_steps is not None
    return Sizes(
        batch=batch,
        length=length,
        width=options.width or widths.d_model,
        heads=options.heads or widths.heads,
        head_dim=options.head_dim or widths.d_model // widths.heads,
        hidden=options.hidden or widths.d_ff,
        steps=options.ode_steps,
        vocab=config.model.vocab_size,
    )


def measure_kernels(family: str, config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Measure a family of operations in every dtype of ``benchmark.dtypes``.

    Returns:
        ``cases``: for each case, e.g. ``attention real, bfloat16``, what ``measure_case`` returns.
    """
    cases = {}
    for name in config.benchmark.dtypes:
        dtype = getattr(torch, name)
        peak = product_rate(dtype, device)
        for case in FAMILIES[family](sizes_of(config), dtype, normal_leaves(config.seed, dtype, device)):
            label = f"{case.name}, {name}"
            row = {"family": family, "operation": case.name, "dtype": name, "peak_tflops": peak / 1e12}
            try:
                row |= measure_case(case, config, device, peak)
            except torch.OutOfMemoryError:
                row |= {"correct": None, "error": "out of GPU memory; choose a smaller benchmark.batch_size"}
            except Exception as error:  # noqa: BLE001 - an operation that fails hides no other
                traceback.print_exc()
                row |= {"correct": False, "error": f"failed: {_first_line(error)}"}
            cases[label] = row
            print(f"  {label}: {summary(row)}", flush=True)
    return {"cases": cases}


def summary(row: dict[str, Any]) -> str:
    """One line about a measured case."""
    if row["error"] is not None:
        return str(row["error"])
    ours, plain = row["alternatives"]["ours"], row["alternatives"]["eager"]
    return (
        f"{ours['forward_ms_p50']:.3g} ms, {ours['training_ms_p50']:.3g} ms with backward, "
        f"{plain['training_ratio']:.2f} x as fast as eager"
    )


def measure_case(case: Case, config: BenchConfig, device: torch.device, peak: float) -> dict[str, Any]:
    """Check an operation and, if it is right, time it in turns with its alternatives.

    Args:
        case: the operation.
        config: ``warmup`` untimed rounds, ``repeats`` timed ones, and whether to ``compile``.
        device: where the inputs are.
        peak: FLOPs a second of a large product in the same dtype.

    Returns:
        ``correct``, ``error`` (a sentence, or None), ``deviation`` (the largest error over the error allowed)
        and ``deviation_of``; for a right operation also ``forward_gflop`` and ``backward_gflop``, the
        arithmetic (None without matrix products), ``forward_share_of_peak`` and ``backward_share_of_peak``,
        and ``alternatives``: for ``ours``, ``eager`` and every other one the quantiles of its times, the
        median over rounds of its time over ours, its memory.
    """
    deviation, where = largest_deviation(case)
    row: dict[str, Any] = {"correct": deviation <= 1, "deviation": deviation, "deviation_of": where}
    if not row["correct"]:
        return row | {"error": f"wrong: {where} is off by {deviation:.3g} times the error allowed"}
    functions = {"ours": (case.ours, case.inputs), "eager": (case.plain, case.inputs), **case.others}
    notes: dict[str, dict[str, Any]] = {}
    if config.benchmark.compile and not case.by_token:
        compiled, notes["compiled"] = _compile(case, device)
        if compiled is not None:
            functions["compiled"] = (compiled, case.inputs)
    passes = Updates if case.updates else Passes
    calls = {name: passes(*function) for name, function in functions.items()}
    times = time_passes(calls, config.benchmark.warmup, config.benchmark.repeats, device)
    memory = {name: memory_of(call.training, device, name) for name, call in calls.items()}
    alternatives = {name: _figures(times, memory, name) for name in times}
    for name, note in notes.items():
        alternatives[name] = alternatives.get(name, {}) | note
    return row | {"error": None, **_shares(calls["ours"], times["ours"], peak), "alternatives": alternatives}


def _shares(call: Passes, times: dict[str, list[float]], peak: float) -> dict[str, float | None]:
    """Arithmetic of both passes, and the rate over the peak; that of the backward pass by difference."""
    forward, training = flops(call.forward), flops(call.training)
    forward_seconds, seconds = (quantile(times[part], 0.5) for part in ("forward", "training"))
    shares: dict[str, float | None] = {}
    for name, arithmetic, taken in (
        ("forward", forward, forward_seconds),
        ("backward", training - forward, seconds - forward_seconds),
    ):
        shares[f"{name}_gflop"] = arithmetic / 1e9 if arithmetic else None
        shares[f"{name}_share_of_peak"] = arithmetic / taken / peak if arithmetic and taken > 0 else None
    return shares


def largest_deviation(case: Case) -> tuple[float, str]:
    """The worst error of outputs and gradients over the error allowed, and where it is.

    Errors are root mean squares against the plain code in float64. Allowed is twice the error of the plain
    code in the same dtype plus one unit in the last place of the largest value.
    """
    if case.updates:
        return _worst(*_updated(case))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        outs = outputs(case.plain(*case.inputs))
    gradients = [torch.randn(out.shape, generator=generator).to(out) for out in outs]
    inputs = [x.detach().double().requires_grad_() for x in case.inputs]
    exact = _results(case.plain, inputs, gradients)
    ours, plain = (_results(function, case.inputs, gradients) for function in (case.ours, case.plain))
    places = [f"output {n}" for n in range(len(gradients))]
    places += [f"the gradient of input {n}" for n in range(len(inputs))]
    return _worst(places, ours, plain, exact)


def _updated(case: Case) -> tuple[list[str], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Names and values of the outputs: ours, the plain ones, and these in float64."""
    ours, plain = (
        outputs(function(*(x.clone() for x in case.inputs))) for function in (case.ours, case.plain)
    )
    exact = outputs(case.plain(*(x.double() for x in case.inputs)))
    return [f"output {n}" for n in range(len(exact))], ours, plain, exact


def _worst(
    places: Sequence[str], ours: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]
) -> tuple[float, str]:
    worst, where = 0.0, "nothing"
    for place, result, other, reference in zip(places, ours, plain, exact, strict=True):
        error, error_of_plain = (_rms(x.double() - reference) for x in (result, other))
        allowed = 2 * error_of_plain + torch.finfo(result.dtype).eps * reference.abs().max().item()
        deviation = error / allowed if allowed else error
        if not deviation <= worst:
            worst, where = deviation, place
        if math.isnan(deviation):
            return math.inf, place
    return worst, where


def _results(function: Function, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    outs = outputs(function(*inputs))
    at_outs = [grad.to(out.dtype) for grad, out in zip(gradients, outs, strict=True)]
    return *(out.detach() for out in outs), *torch.autograd.grad(outs, inputs, at_outs)


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _compile(case: Case, device: torch.device) -> tuple[Function | None, dict[str, Any]]:
    """torch.compile of the plain code after its first call, and its ``compile_s``, or why there is none."""
    torch._dynamo.reset()
    key_cache_by_vectors(device)
    compiled = torch.compile(case.plain, dynamic=False)
    start = time.perf_counter()
    passes = Updates if case.updates else Passes
    try:
        passes(compiled, case.inputs).training()
    # Whatever a compiler raises; without a C++ compiler there is no torch.compile on a CPU.
    except Exception as error:  # noqa: BLE001
        return None, {"note": f"torch.compile failed: {_first_line(error)}"}
    synchronize(device)
    return compiled, {"compile_s": time.perf_counter() - start}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _figures(times: Times, memory: dict[str, float | None], name: str) -> dict[str, float | None]:
    figures: dict[str, float | None] = {}
    for part, seconds in times[name].items():
        for percent in (20, 50, 80):
            figures[f"{part}_ms_p{percent}"] = 1e3 * quantile(seconds, percent / 100)
        if name != "ours":
            ratios = [s / ours for s, ours in zip(seconds, times["ours"][part], strict=True)]
            figures[f"{part}_ratio"] = quantile(ratios, 0.5)
    own, ours = memory[name], memory["ours"]
    figures["peak_gb"] = None if own is None else own / GB
    if name != "ours":
        figures["peak_ratio"] = own / ours if own and ours else None
    return figures


def memory_of(train: Callable[[], None], device: torch.device, name: str = "") -> float | None:
    """Bytes that forward and backward need at their peak beyond what is there before.

    None on a CPU for compiled code, into which nothing can see there.
    """
    if device.type != "cuda" and name == "compiled":
        return None
    with peak_memory(device) as meter:
        train()
        return float(meter.peak() - meter.before)


def flops(train: Callable[[], None]) -> int:
    """Arithmetic of the matrix products of the eager implementations that a call runs, causal ones halved."""
    with ProductRecorder() as recorder, InsideOperations(closed=COMPLEX_ATTENTION):
        train()
    products = recorder.products + recorder.attention_products
    return sum(product.flops() * count for product, count in products.items())


def normal_leaves(seed: int, dtype: torch.dtype, device: torch.device) -> Normal:
    """A function that makes random inputs: shape, and optionally their ``scale`` and ``dtype``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator).mul_(scale)
        return values.to(device, dtype).requires_grad_()

    return normal


# --- Attention -------------------------------------------------------------------------------------------


def attention_cases(sizes: Sizes, dtype: torch.dtype, normal: Normal) -> Iterator[Case]:
    """Causal attention in every kind of score."""
    shape = (sizes.batch, sizes.heads, sizes.length, 2, sizes.head_dim)
    for score in SCORES:
        q, k, v = (normal(*shape) for _ in range(3))
        future = future_keys(q, k)
        others: dict[str, tuple[Function, Sequence[Tensor]]] = {}
        if score == "real":
            others["SDPA"] = (sdpa, (q, k, v))
        if dtype == torch.float32:
            inputs = [as_complex(x) for x in (q, k, v)]
            others["complex64"] = (partial(native, score=score, future=future), inputs)
        plain = partial(plain_attention, score=score, future=future, floor=modulus_floor(dtype))
        ours = partial(complex_attention, score=score)
        yield Case(f"attention {score}", (q, k, v), ours, plain, others)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``real`` as one call on concatenated planes."""
    q, k, v, d = q.flatten(-2), k.flatten(-2), v.flatten(-2), q.shape[-1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=d**-0.5)
    return out.unflatten(-1, (2, d))


def as_complex(z: Tensor, plane: int = -2) -> Tensor:
    """A planar tensor as one of torch's, a leaf."""
    re, im = z.detach().unbind(plane)
    return torch.complex(re, im).requires_grad_()


# --- Linear ----------------------------------------------------------------------------------------------


def linear_cases(sizes: Sizes, dtype: torch.dtype, normal: Normal) -> Iterator[Case]:
    """The product, and the product with bias, activation and residual."""
    x = normal(sizes.batch, sizes.length, 2, sizes.width)
    weight = normal(2, sizes.hidden, sizes.width, scale=(2 * sizes.width) ** -0.5)
    bias = normal(2, sizes.hidden, scale=0.1)
    residual = normal(sizes.batch, sizes.length, 2, sizes.hidden)
    # A weight that is twice as large and not bound to be complex.
    form = real_form(weight).detach().requires_grad_()

    def case(name: str, ours: Function, epilogue: Function, *rest: Tensor) -> Case:
        def before(product: Function) -> Function:
            return lambda x, weight, *rest: epilogue(product(x, weight), *rest)

        others: dict[str, tuple[Function, Sequence[Tensor]]] = {
            "4 products": (before(linear), (x, weight, *rest)),
            "bare": (before(by_real_form), (x, form, *rest)),
        }
        if dtype == torch.float32:
            inputs = [as_complex(x), as_complex(weight, 0), *(as_complex(y) for y in rest)]
            others["complex64"] = (before(F.linear), inputs)
        return Case(name, (x, weight, *rest), ours, before(one_product), others)

    yield case("linear", complex_linear, lambda y: y)
    yield case("linear + split_gelu", activated, gelu_and_residual, bias, residual)


def one_product(x: Tensor, weight: Tensor) -> Tensor:
    """On concatenated planes, the weight's real form built on the way."""
    return by_real_form(x, real_form(weight))


def activated(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """The fused product without its second output."""
    active, _ = complex_linear_activated(x, weight, bias, activation="split_gelu", residual=residual)
    return active


def gelu_and_residual(y: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """Bias, GELU on each plane, residual; of planar tensors or of torch's complex ones."""
    y = y + bias
    active = torch.complex(F.gelu(y.real), F.gelu(y.imag)) if y.is_complex() else F.gelu(y)
    return active + residual


# --- Norms, activations, rotation ------------------------------------------------------------------------


def pointwise_cases(sizes: Sizes, dtype: torch.dtype, normal: Normal) -> Iterator[Case]:
    """Norms and activations of the hidden state, and the rotation of queries."""
    shape = (sizes.batch, sizes.length, 2, sizes.width)
    z, branch, gain, beta = normal(*shape), normal(*shape), normal(2, sizes.width), normal(2, sizes.width)
    gamma = normal(3, sizes.width)
    yield Case("rms norm", (z, gain), complex_rms_norm, rms_norm)
    yield Case("add rms norm", (z, branch, gain), add_complex_rms_norm, add_rms_norm)
    yield Case("layer norm", (z, gamma, beta), complex_layer_norm, layer_norm)
    for kind, count in ACTIVATIONS.items():
        parameters = [normal(sizes.width) for _ in range(count)]
        plain = partial(plain_activation, floor=activation_floor(z, kind))
        ours, plain = (partial(of_inputs, f, kind) for f in (complex_activation, plain))
        yield Case(kind, (z, *parameters), ours, plain)
    q = normal(sizes.batch, sizes.heads, sizes.length, 2, sizes.head_dim)
    angle = normal(sizes.length, sizes.head_dim, dtype=torch.float32).detach()
    table = torch.stack((angle.cos(), angle.sin()), -2)
    yield Case("rotary", (q,), partial(rotate, table=table), partial(plain_rotate, table=table))


def of_inputs(function: Function, kind: str, z: Tensor, *parameters: Tensor) -> Tensor:
    """An activation with its parameters behind the state."""
    return function(z, kind, *parameters)


# --- Symplectic flow -------------------------------------------------------------------------------------


def symplectic_cases(sizes: Sizes, dtype: torch.dtype, normal: Normal) -> Iterator[Case]:
    """The exact flow by leapfrog steps; the state is float32, the products have the dtype of the weights.

    Once with one b1 and once as in stage 2, with a b1 of each token and a spring.
    """
    kicks = [TIME_STEP / 2, *[TIME_STEP] * (sizes.steps - 1), TIME_STEP / 2]
    drifts = [TIME_STEP] * sizes.steps + [0.0]
    shape = (sizes.batch, sizes.length, sizes.width)
    q, p = (normal(*shape, dtype=torch.float32) for _ in range(2))
    w1 = normal(sizes.hidden, sizes.width, scale=sizes.width**-0.5)
    # Forces of order one.
    w2 = normal(sizes.hidden, scale=(sizes.width / sizes.hidden) ** 0.5)
    for name, b1, spring in (
        ("symplectic flow", normal(sizes.hidden, scale=0.1), 0.0),
        ("flow, b1 by token", normal(*shape[:2], sizes.hidden), 0.5),
    ):
        ours, plain, checkpointed, fixed_point = (
            partial(function, kicks=kicks, drifts=drifts, confinement=spring)
            for function in (flow, plain_flow, checkpointed_flow, fixed_point_flow)
        )
        inputs = (q, p, w1, b1, w2)
        others: dict[str, tuple[Function, Sequence[Tensor]]] = {
            "fixed point": (fixed_point, inputs),
            "checkpoint": (checkpointed, inputs),
        }
        yield Case(name, inputs, ours, plain, others)


def flow(
    q: Tensor, p: Tensor, *parameters: Tensor, kicks: list[float], drifts: list[float], confinement: float
) -> tuple[Tensor, Tensor]:
    """The operation without its peak."""
    w1, b1, w2 = parameters
    q, p, _ = symplectic_flow(q, p, w1, b1, w2, kicks, drifts, confinement=confinement, scale=SCALE)
    return q, p


def checkpointed_flow(
    q: Tensor, p: Tensor, *parameters: Tensor, kicks: list[float], drifts: list[float], confinement: float
) -> tuple[Tensor, Tensor]:
    """Autograd that keeps the state of every stage only."""
    for kick, drift in zip(kicks, drifts, strict=True):
        stage = partial(plain_flow, kicks=[kick], drifts=[drift], confinement=confinement)
        q, p = checkpoint(stage, q, p, *parameters, use_reentrant=False)
    return q, p


def fixed_point_flow(
    q: Tensor, p: Tensor, *parameters: Tensor, kicks: list[float], drifts: list[float], confinement: float
) -> tuple[Tensor, Tensor]:
    """The maths of ours: whole numbers are added, and subtracted again in the backward pass."""
    q, p = _FixedPoint.apply(q, p, *parameters, kicks, drifts, confinement)
    return q, p


class _FixedPoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        p: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        kicks: list[float],
        drifts: list[float],
        confinement: float,
    ) -> tuple[Tensor, Tensor]:
        whole_q, whole_p = (torch.round(x * SCALE).int() for x in (q, p))
        for kick, drift in zip(kicks, drifts, strict=True):
            force = plain_force(whole_q / SCALE, w1, b1, w2, confinement=confinement)
            whole_p = whole_p + torch.round(kick * SCALE * force).int()
            if drift:
                whole_q = whole_q + torch.round(drift * whole_p).int()
        ctx.save_for_backward(whole_q, whole_p, w1, b1, w2)
        ctx.scheme = kicks, drifts, confinement
        return whole_q / SCALE, whole_p / SCALE

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_p: Tensor) -> tuple[Tensor | None, ...]:
        q, p, *parameters = ctx.saved_tensors
        kicks, drifts, confinement = ctx.scheme
        sums = [torch.zeros_like(x) for x in parameters]
        for kick, drift in reversed(list(zip(kicks, drifts, strict=True))):
            if drift:
                q = q - torch.round(drift * p).int()
                grad_p = grad_p + drift * grad_q
            leaves = [x.detach().requires_grad_() for x in (q / SCALE, *parameters)]
            with torch.enable_grad():
                at, w1, b1, w2 = leaves
                force = plain_force(at, w1, b1, w2, confinement=confinement)
            change, *changes = torch.autograd.grad(force, leaves, kick * grad_p)
            grad_q = grad_q + change
            sums = [total + x for total, x in zip(sums, changes, strict=True)]
            p = p - torch.round(kick * SCALE * force.detach()).int()
        return grad_q, grad_p, *sums, None, None, None


# --- Scan ------------------------------------------------------------------------------------------------


def scan_cases(sizes: Sizes, dtype: torch.dtype, normal: Normal) -> Iterator[Case]:
    """The recurrence with complex eigenvalues; decays are float32, as in a Koopman operator."""
    u = normal(sizes.batch, sizes.length, 2, sizes.width)
    gate = normal(sizes.batch, sizes.length, sizes.width, dtype=torch.float32)
    angle = normal(sizes.width, dtype=torch.float32)
    ours, plain = (partial(gated_scan, scan) for scan in (complex_scan, plain_scan))
    yield Case("scan", (u, gate, angle), ours, plain, by_token=True)


def gated_scan(scan: Function, u: Tensor, gate: Tensor, angle: Tensor) -> Tensor:
    """A scan by decays of which the gate may be any number."""
    return scan(u, -F.softplus(gate), angle)[0]


# --- Loss ------------------------------------------------------------------------------------------------


def loss_cases(sizes: Sizes, dtype: torch.dtype, normal: Normal) -> Iterator[Case]:
    """The loss of each token under a planar head.

    ``checkpoint`` makes all logits again in the backward pass, as ours makes tiles of them. ``chunks`` and
    ``torch`` are means whose logits are made by chunks of tokens, with their gradients: as in the models
    where this operation is not taken, and by torch where it has that.
    """
    x = normal(sizes.batch * sizes.length, 2 * sizes.width)
    weight = normal(sizes.vocab, 2, sizes.width, scale=(2 * sizes.width) ** -0.5)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(sizes.vocab, (len(x),), generator=generator).to(x.device)
    functions = {"checkpoint": checkpointed_loss, "chunks": mean_by_chunks}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # Since torch 2.13.
        functions["torch"] = mean_of_torch
    ours, plain = (partial(f, targets=targets) for f in (linear_cross_entropy, plain_cross_entropy))
    others: dict[str, tuple[Function, Sequence[Tensor]]] = {
        name: (partial(f, targets=targets), (x, weight)) for name, f in functions.items()
    }
    yield Case("head loss", (x, weight), ours, plain, others)


def checkpointed_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Autograd that keeps no logits."""
    losses: Tensor = checkpoint(plain_cross_entropy, x, weight, targets, use_reentrant=False)
    return losses


def mean_by_chunks(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss of the models where no kernel makes it."""
    with eager():
        return loss_by_chunks(x, weight, targets)


def mean_of_torch(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's own function, by chunks."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight.flatten(1), targets, options=options)


# --- Optimiser -------------------------------------------------------------------------------------------


def adamw_cases(sizes: Sizes, dtype: torch.dtype, normal: Normal) -> Iterator[Case]:
    """AdamW over the weight of a linear map in bfloat16; other dtypes are left to torch.

    Ours rounds parameters stochastically, and so does ``rounded``, as one would write it; all others round to
    nearest. torch's fused AdamW in float32 moves twice the bytes.
    """
    if dtype != torch.bfloat16:
        return
    shape = (2, sizes.hidden, sizes.width)
    w, g, m = (normal(*shape, scale=scale).detach() for scale in (0.1, 1.0, 0.1))
    inputs = (w, g, m, m.square())
    plain = partial(plain_adamw, **ADAMW)
    others: dict[str, tuple[Function, Sequence[Tensor]]] = {
        f"fused {str(kind).removeprefix('torch.')}": (
            fused_adamw,
            tuple(x.to(kind, copy=True) for x in inputs),
        )
        for kind in (torch.float32, torch.bfloat16)
    }
    others["rounded"] = (rounded_adamw, tuple(x.clone() for x in inputs))
    ours = partial(adamw_step, numbers=coefficients(**ADAMW), key=key_of(0, 0, "weight"))
    yield Case("adamw", inputs, ours, plain, others, updates=True)


# A rate at which an update is far larger than what rounding may do.
ADAMW: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "updates": 3}


def adamw_step(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, *, numbers: Coefficients, key: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The operation on one parameter."""
    adamw([Part(w, m, v, decays=True)], [g], [key], numbers)
    return w, m, v


def rounded_adamw(w: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The plain code, and bits added to the parameter of which bfloat16 cuts the lower 16 off."""
    moved, first, second = plain_adamw(w.float(), g, m, v, **ADAMW)
    noise = torch.randint(2**16, moved.shape, dtype=torch.int32, device=w.device)
    bits = moved.view(torch.int32).add_(noise).bitwise_and_(-(2**16))
    return bits.view(torch.float32).to(w.dtype), first.to(m.dtype), second.to(v.dtype)


def fused_adamw(w: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What torch.optim.AdamW(fused=True) calls."""
    first, second = ADAMW["betas"]
    # It is told the number of the update.
    steps = [torch.tensor(float(ADAMW["updates"]), device=w.device)]
    torch._fused_adamw_(
        [w], [g], [m], [v], [], steps, lr=ADAMW["lr"], beta1=first, beta2=second,
        weight_decay=ADAMW["weight_decay"], eps=ADAMW["eps"], amsgrad=False, maximize=False,
    )  # fmt: skip
    return w, m, v


FAMILIES: dict[str, Callable[[Sizes, torch.dtype, Normal], Iterator[Case]]] = {
    "attention": attention_cases,
    "linear": linear_cases,
    "pointwise": pointwise_cases,
    "symplectic": symplectic_cases,
    "scan": scan_cases,
    "loss": loss_cases,
    "adamw": adamw_cases,
}
