"""Cross-entropy of a linear head without the (tokens x vocabulary) logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import linear_cross_entropy as kernel
from kernels.planar import precise, upcast
from kernels.products import addmm, linear, mm
from muse.models.dialectic import Antithesis, Argument

# Logits held at a time: rows of a chunk x vocabulary. Larger chunks cost memory, smaller ones speed and,
# because the weight's gradient is summed over chunks in its own dtype, accuracy.
CHUNK_ELEMENTS = 2**25
# Elements whose softmax is worked out at a time: few enough for the last-level cache.
SOFTMAX_ELEMENTS = 2**22


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are worked out chunk by chunk in the forward pass: three products, none repeated."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: Tensor,
        antithesis: Antithesis | None,
        *against: Tensor,
    ) -> Tensor:
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        tokens, vocab = x.shape[0], weight.shape[0]
        matrix = weight.flatten(1)
        chunk = max(1, CHUNK_ELEMENTS // vocab)
        total = torch.zeros_like(scale)
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.zeros(vocab, dtype=total.dtype, device=x.device) if needs_bias else None
        argument = None
        if antithesis is not None:
            of_matrix = grad_weight.zero_().flatten(1) if grad_weight is not None else None
            sums = tuple(torch.zeros_like(w, dtype=total.dtype) for w in against)
            needed = any(ctx.needs_input_grad)
            argument = Argument(antithesis, matrix, against, sums if needed else None, of_matrix)
        # One buffer for all chunks: fresh memory costs more than the pass over it.
        buffer = x.new_empty(min(chunk, tokens), vocab)
        for start in range(0, tokens, chunk):
            rows = slice(start, min(start + chunk, tokens))
            logits = mm(x[rows], matrix.t(), out=buffer[: rows.stop - start])
            if bias is not None:
                logits += bias
            counted = targets[rows] >= 0
            own = None
            if argument is None:
                losses = _softmax_gradient_(logits, targets[rows].clamp(min=0), any(ctx.needs_input_grad))
            else:
                given = (x[rows], logits, targets[rows].clamp(min=0), counted)
                losses, own = argument.losses_(*given, _softmax_gradient_)
            total += losses.masked_fill_(~counted, 0).sum()
            if grad_x is not None:
                mm(logits, matrix, out=grad_x[rows])
                grad_x[rows].mul_(counted[:, None])
                if own is not None:
                    grad_x[rows].add_(own)
            if grad_weight is not None:
                # Rows that do not count are left out of the smaller factor.
                counted_x = x[rows] * counted[:, None]
                out = grad_weight.flatten(1)
                beta = float(start > 0 or argument is not None)
                addmm(out, logits.t(), counted_x, beta=beta, out=out)
            if grad_bias is not None:
                grad_bias += (counted.to(logits.dtype) @ logits).to(grad_bias.dtype)
        ctx.gradients = (grad_x, grad_weight, None if grad_bias is None else grad_bias.to(weight.dtype))
        ctx.own = ()
        if argument is not None and argument.gradients is not None:
            ctx.own = tuple(g.to(w.dtype) for g, w in zip(argument.gradients, against, strict=True))
        ctx.save_for_backward(scale)
        return total * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy has no second derivative (create_graph=True)")
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy can be differentiated only once; call it again instead")
        gradients, own = ctx.gradients, ctx.own
        ctx.gradients = ctx.own = None
        (scale,) = ctx.saved_tensors
        # Scaled only here, so that a loss scale comes before float16 could underflow.
        factor = grad * scale
        of_head = (None if g is None else g.mul_(factor) for g in gradients)
        return *of_head, None, None, None, *(g.mul_(factor) for g in own)


def _softmax_gradient_(logits: Tensor, targets: Tensor, needs_grad: bool) -> Tensor:
    """Losses (rows,) of a chunk in float32; replaces ``logits`` by their gradient in place.

    With gradients the softmax is rounded to the dtype of the logits, as its gradient is anyway; a loss is
    then off by at most that rounding of one probability, and unbiased.
    """
    losses = torch.empty(logits.shape[0], dtype=precise(logits), device=logits.device)
    block = min(max(1, SOFTMAX_ELEMENTS // logits.shape[1]), logits.shape[0])
    buffer = logits.new_empty(block, logits.shape[1])
    for start in range(0, logits.shape[0], block):
        rows = slice(start, min(start + block, logits.shape[0]))
        values, index = logits[rows], targets[rows, None]
        chosen = upcast(values.gather(1, index))
        if not needs_grad:
            losses[rows] = (upcast(values).logsumexp(-1, keepdim=True) - chosen)[:, 0]
            continue
        probability = torch.softmax(values, -1, out=buffer[: rows.stop - start])
        # The largest probability never underflows, so the log-sum-exp needs no pass of its own.
        log_sum = upcast(values.amax(-1, keepdim=True)) - upcast(probability.amax(-1, keepdim=True)).log()
        losses[rows] = (log_sum - chosen)[:, 0]
        # Indexing, because scatter copies the whole matrix on a CPU.
        probability[torch.arange(len(index), device=index.device), index[:, 0]] -= 1
        logits[rows] = probability
    return losses


@torch.no_grad()
def linear_losses(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of each token, and if asked for the entropy of its distribution: nats, no gradients.

    Args:
        x: (N, E).
        weight: (V, E) or (V, 2, E / 2), as in ``linear_cross_entropy``.
        targets: (N,) int64; the loss of a negative one means nothing.
        bias: (V,).
        entropy: whether that is asked for.

    Returns:
        Losses and entropies (N,), in float32 (float64 where ``x`` is).
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    if not entropy and kernel.takes_triton(x, training=False):
        return kernel.linear_cross_entropy(x, weight, targets, bias), None
    matrix = weight.flatten(1)
    losses = torch.empty(len(x), dtype=precise(x), device=x.device)
    entropies = torch.empty_like(losses) if entropy else None
    # Few enough for the last-level cache, as their float32 copies are held, too.
    chunk = max(1, SOFTMAX_ELEMENTS // weight.shape[0])
    with torch.autocast(device, enabled=False):
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            values = upcast(linear(x[rows], matrix, bias))
            log_sum = values.logsumexp(-1)
            losses[rows] = log_sum - values.gather(1, targets[rows, None].clamp(min=0))[:, 0]
            if entropies is not None:
                entropies[rows] = log_sum - ((values - log_sum[:, None]).exp() * values).sum(-1)
    return losses, entropies


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    reduction: str = "mean",
    antithesis: Antithesis | None = None,
) -> Tensor:
    """Cross-entropy in nats of softmax(x W^T + b) against ``targets``, in float32.

    On a GPU, where ``kernels.linear_cross_entropy`` is pinned for it, by that, else by chunks of tokens; with
    an antithesis, which asks for logits, always by chunks.

    torch.nn.functional.linear_cross_entropy does the same, but its chunked form takes 1.8 times (float32)
    to 5 times (bfloat16) as long as the three matrix products alone on a CPU, and does not exist before
    torch 2.13.

    Args:
        x: (N, E).
        weight: (V, E), or (V, 2, E / 2) as a planar embedding holds it: autograd can add to the gradient of a
            whole tensor in place, to that of a view it cannot.
        targets: (N,) int64; negative targets are not counted.
        bias: (V,).
        reduction: ``mean`` over the counted targets, or ``sum``.
        antithesis: makes of that softmax, the thesis, the synthesis that the cross-entropy is then of.

    Raises:
        ValueError: for another reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction} is not known; choose mean or sum")
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    if reduction == "mean":
        scale = 1 / (targets >= 0).sum().clamp(min=1).to(precise(x))
    else:
        scale = torch.ones((), dtype=precise(x), device=x.device)
    if antithesis is None and kernel.takes_triton(x, training=torch.is_grad_enabled()):
        return kernel.linear_cross_entropy(x, weight, targets, bias).sum() * scale
    against = [] if antithesis is None else [own.to(x.dtype) for own in antithesis.weights()]
    if not torch.is_grad_enabled():
        # A parameter asks for its gradient even here, and working it out costs twice the loss.
        x, weight, bias = x.detach(), weight.detach(), None if bias is None else bias.detach()
        against = [own.detach() for own in against]
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(x, weight, bias, targets, scale, antithesis, *against)
