"""How accurate a computation must be in its dtype, from the maths alone: no product of a library enters.

What plain PyTorch rounds, and where, is written down in its code; what comes of it depends on the order in
which the library sums, and that on the processor. Here a function runs as it is written, in the dtypes that
it is written for, but every operation is worked out in float64 and then rounded by chance:

- each result by up to the unit roundoff of its dtype,
- each sum of n terms, as in products and reductions, by what a running sum in float32 (for float64 in
  float64) loses: it is rounded n times, by a share of what it has reached, which is between the root of the
  terms' squares and the sum itself.

Such a sample less the exact values is one error to expect, element by element. Where values cancel, where a
small |z| is divided by and near a threshold it is large by itself, because the roundings go through the same
maths, forward and backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.operator import IMPLEMENTATIONS

# Roundings three times as large make it likely that a threshold which the tested code may cross is crossed in
# some sample, too: missed once in 100,000 elements that are near enough. The largest of 32 normal errors is
# 2.4 standard deviations, so an element may be off by 7 deviations of true roundings.
FACTOR = 3.0
# By the number of samples, the root mean squares of the samples that are allowed at least: a normal error is
# larger once in 10^8 (Student's t). Few samples are for maths that takes long.
LEAST = {32: 2.5, 8: 8.0}
SAMPLES = 32
# What divides by a modulus has an error like 1 / |s|, whose tail no number of samples knows where roundings
# may take s across 0: how many of them |s| must be to be off 0.
OFF_ZERO = 32.0

# Results without a rounding: values moved, chosen, compared, or made from nothing. An operation that is in
# no list here has one rounding.
EXACT = frozenset(
    """abs alias amax amin arange argmax as_strided as_strided_scatter bernoulli cat ceil clamp clamp_max
    clamp_min clone constant_pad_nd copysign detach diagonal_scatter embedding empty empty_like empty_permuted
    empty_strided expand eye fill flip floor full full_like gather hardtanh index index_put index_select
    lift_fresh lift_fresh_copy masked_fill masked_select max maximum median min minimum native_dropout neg
    new_empty new_empty_strided new_full new_ones new_zeros normal ones ones_like permute rand randn relu
    repeat resize roll scalar_tensor scatter select_backward select_scatter set sgn sign slice_backward
    slice_scatter sort split split_with_sizes stack threshold_backward topk tril triu trunc unbind
    unfold_backward uniform unsafe_split where zero zeros zeros_like
    _reshape_alias _unsafe_view""".split()  # noqa: SIM905
)
SUMS = frozenset(
    ["addmm", "addmv", "baddbmm", "bmm", "cumsum", "dot", "mean", "mm", "mv", "nll_loss_forward", "sum"]
)


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff: half the distance of 1 from the next number."""
    return torch.finfo(dtype).eps / 2


def rounding_of(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error of rounding to ``dtype``, element by element.

    What is below the smallest normal number may become 0, as on GPUs, and as 1 / (1 + exp(x)) does where the
    exponential overflows; but for float16, whose numbers below that one are within what people compute with.
    """
    smallest = torch.finfo(dtype).smallest_normal
    return (exact.abs() * unit(dtype)).clamp_min(
        smallest * unit(dtype) if dtype == torch.float16 else smallest
    )


def terms(name: str, args: Sequence[Any], result: Tensor) -> int:
    """How many are summed for an element of the result."""
    match name:
        case "mm" | "bmm" | "mv" | "dot":
            return args[0].shape[-1]
        case "addmm" | "baddbmm" | "addmv":
            return args[1].shape[-1] + 1
        case "nll_loss_forward":
            return args[1].numel()
        case "cumsum":
            return args[0].shape[args[1]]
        case _:
            return max(1, args[0].numel() // max(1, result.numel()))


def within(func: Any, name: str, args: Sequence[Any], kwargs: Any, result: Tensor) -> Tensor | None:
    """The size of what is rounded inside an operation, in units of roundoffs of its working precision."""
    if name in SUMS:
        factors = {key: x * x if key in ("alpha", "beta") else _square(x) for key, x in kwargs.items()}
        squares = func(*map(_square, args), **factors)
        squares = squares[0] if isinstance(squares, tuple) else squares
        n = terms(name, args, result)
        if name == "mean":
            squares = squares / n
        return n**0.5 / 3 * torch.hypot(result, squares.abs().sqrt())
    x = args[0]
    match name:
        # 1 - y, 1 + erf and their like cancel.
        case "gelu" | "silu":
            return x.abs()
        case "gelu_backward" | "silu_backward":
            return x.abs() * (1 + args[1].abs())
        case "sigmoid_backward" | "tanh_backward":
            return x.abs() * args[1].abs()
        # The exponent is rounded before its exponential.
        case "_softmax":
            return result * (1 - result.clamp_min(1e-300).log())
        case "_log_softmax":
            return result.abs() + x.abs()
        case "logsumexp":
            return result.abs() + 1
        case "_softmax_backward_data":
            return args[1] * (x.abs() + (args[1] * x.abs()).sum(args[2], keepdim=True))
        case "_log_softmax_backward_data":
            return x.abs() + args[1].exp() * x.abs().sum(args[2], keepdim=True)
        case "addcmul" | "addcdiv":
            return x.abs() + (result - x).abs()
        case "exp" | "erf" | "sigmoid" | "tanh" | "rsqrt" | "pow" | "log" | "sin" | "cos":
            return result.abs()
    return None


def _square(x: Any) -> Any:
    return x * x if isinstance(x, float) or (isinstance(x, Tensor) and x.is_floating_point()) else x


def _wide(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.to(torch.float64, copy=True) if x.is_floating_point() else x
    if isinstance(x, list | tuple):
        return type(x)(map(_wide, x))
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


def _tensors(result: Any) -> list[Tensor]:
    return [x for x in (result if isinstance(result, list | tuple) else [result]) if isinstance(x, Tensor)]


@functools.cache
def traits(func: Any) -> tuple[str, bool, bool, bool]:
    """The name of an operation, whether it is made of others, rounds nothing and changes an argument."""
    name = func.overloadpacket.__name__
    name = name if name.endswith("__") else name.removesuffix("_")
    composite = func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return name, composite, func.is_view or name in EXACT, func._schema.is_mutable


class RandomRounding(TorchDispatchMode):
    """Inside, every operation is worked out in float64 and rounded by chance, ``factor`` times as much."""

    def __init__(self, generator: torch.Generator, factor: float = 1.0):
        super().__init__()
        self.generator = generator
        self.factor = factor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in IMPLEMENTATIONS:
            with self:
                return IMPLEMENTATIONS[func](*args, **kwargs)
        name, composite, exactly, mutable = traits(func)
        if composite:
            with self:
                return func.decompose(*args, **kwargs)
        if exactly:
            return func(*args, **kwargs)
        if name == "round":
            noise = torch.rand(args[0].shape, generator=self.generator).to(args[0]) - 0.5
            whole = (args[0] + self.factor * noise).round()
            return args[0].copy_(whole) if mutable else whole
        if name in ("_to_copy", "copy"):
            source = args[-1 if name == "_to_copy" else 1]
            wide = source.double()
            result = func(*args, **kwargs)
            narrower = result.is_floating_point() and (
                not source.is_floating_point() or unit(source.dtype) < unit(result.dtype)
            )
            if not narrower:
                return result
            # What fits is not rounded.
            fits = result.double() == wide
            return result.copy_(
                torch.where(fits, result, self._round(result.clone(), wide.expand_as(result)))
            )
        wide_args, wide_kwargs = _wide(args), {key: _wide(x) for key, x in kwargs.items()}
        before = _wide(args) if mutable else wide_args
        result = func(*args, **kwargs)
        rounded = _tensors(result)
        assert not any(x.is_complex() for x in rounded), f"{name} of complex numbers: write it on planes"
        if not any(x.is_floating_point() for x in rounded):
            return result
        exact = _tensors(func(*wide_args, **wide_kwargs))
        for index, (x, y) in enumerate(zip(rounded, exact, strict=True)):
            if x.is_floating_point() and x.numel():
                inner = within(func, name, before, wide_kwargs, y) if index == 0 else None
                self._round(x, y.double(), inner)
        return result

    def _round(self, result: Tensor, exact: Tensor, inner: Tensor | None = None) -> Tensor:
        size = rounding_of(exact, result.dtype)
        if inner is not None:
            working = max(result.dtype, torch.float32, key=lambda x: -unit(x))
            # sqrt(3): a uniform error has a third of the variance of its largest value.
            size = torch.hypot(size, inner * (3**0.5 * unit(working)))
        noise = torch.rand(exact.shape, generator=self.generator).to(exact.device)
        error = noise.mul_(2).sub_(1) * size
        # What is exactly 0 is so because nothing was added up, or by a threshold.
        inexact = (exact != 0) & (exact.abs() < torch.inf)
        rounded = torch.where(inexact, exact + error.mul_(self.factor), exact)
        return result.copy_(rounded)


def errors_to_expect(
    function: Callable[[], Sequence[Tensor]], exact: Sequence[Tensor], samples: int = SAMPLES, seed: int = 0
) -> list[Tensor]:
    """Absolute errors (samples, *shape) of each result of ``function``, under FACTOR times the roundings."""
    generator = torch.Generator().manual_seed(seed)
    errors: list[list[Tensor]] = [[] for _ in exact]
    with sdpa_kernel(SDPBackend.MATH):
        for _ in range(samples):
            with RandomRounding(generator, FACTOR):
                results = function()
            for kept, result, truth in zip(errors, results, exact, strict=True):
                kept.append((result.detach().double() - truth).abs())
    return [torch.stack(kept) for kept in errors]


def assert_as_accurate(
    results: Sequence[Tensor],
    plain: Callable[[], Sequence[Tensor]],
    exact: Sequence[Tensor],
    samples: int = SAMPLES,
) -> None:
    """Check that results are about as accurate as the same maths in plain PyTorch.

    Args:
        results: of the code under test, in its dtypes.
        plain: makes the same results by the maths in plain PyTorch in the same dtypes.
        exact: the values in float64.
        samples: 32 or 8; with 8 an element may be off by three times as much.
    """
    for index, (result, truth, errors) in enumerate(
        zip(results, exact, errors_to_expect(plain, exact, samples), strict=True)
    ):
        assert result.shape == truth.shape
        if truth.numel():
            fault = find_fault(result.detach(), truth.detach(), errors)
            assert fault is None, f"tensor {index} of {len(results)}: {fault}"


def allowed_errors(exact: Tensor, errors: Tensor, dtype: torch.dtype) -> Tensor:
    """Of single elements."""
    least = LEAST[len(errors)] * errors.square().mean(0).sqrt()
    return torch.maximum(errors.amax(0), least) + rounding_of(exact, dtype)


def find_fault(result: Tensor, exact: Tensor, errors: Tensor) -> str | None:
    """What is wrong with a result, if anything, given ``errors_to_expect``."""
    rounding, allowed = rounding_of(exact, result.dtype), allowed_errors(exact, errors, result.dtype)
    found = (result.double() - exact).abs()
    share = found / allowed
    at = share.nan_to_num(torch.inf).argmax()
    if not share.flatten()[at] <= 1:
        where = tuple(int(i) for i in torch.unravel_index(at, exact.shape))
        return (
            f"error {found.flatten()[at]:.3e} at {where}, where {exact.flatten()[at]:.3e} is right; "
            f"allowed {allowed.flatten()[at]:.3e}"
        )
    shared, least = root_mean_square(torch.stack((share, rounding / allowed)))
    expected = root_mean_square(errors / allowed) / FACTOR
    # Of few elements it varies.
    varying = expected.mean() + LEAST[len(errors)] * FACTOR * expected.std()
    bound = torch.maximum(2 * expected.max(), varying) + 2 * least
    if not shared <= bound:
        return (
            f"the root mean square error is {shared:.3f} of what is allowed to single elements, "
            f"allowed {bound:.3f}"
        )
    return None


def clearance(q: Tensor, k: Tensor) -> Tensor:
    """|s| of attention in units of what rounding q once, to its dtype, changes in s: (B, H, S, S_k)."""
    wide, keys = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    rows = torch.view_as_complex(wide.mT.contiguous())
    columns = torch.view_as_complex(keys.mT.contiguous())
    changed = (rows.abs().square() @ columns.abs().square().mT).sqrt() * unit(q.dtype)
    return (rows @ columns.mH).abs() / changed


def keep_scores_off_zero(q: Tensor, k: Tensor) -> None:
    """Change signs in queries, at random, until no score of theirs is near 0; all sizes stay what they were.

    Args:
        q: planar queries (B, H, S, 2, d) without zeros, in the dtype of the maths.
        k: planar keys (B, H_kv, S_k, 2, d).
    """
    for _ in range(1000):
        near = (clearance(q, k) < OFF_ZERO).any(-1)
        if not near.any():
            break
        q[near] = torch.where(torch.rand(q[near].shape, device=q.device) < 0.5, q[near], -q[near])
    assert (clearance(q, k) >= OFF_ZERO).all()


def fixed_point(x: Tensor, scale: float) -> Tensor:
    """Rounded to a multiple of 1 / scale, as a state in fixed point is; the gradient goes through."""
    whole = (x.detach() * scale).round() / scale
    return x + (whole - x.detach())


def root_mean_square(x: Tensor) -> Tensor:
    """Of each row."""
    return x.square().reshape(len(x), -1).mean(1).sqrt()
