"""Complex attention with s = q conj(k) / sqrt(d), in three kinds of score, never holding the scores.

``real``: softmax(Re s) v. ``magnitude``: softmax(|s|) v. ``phase``: (softmax(|s|) * s/|s|) v, a complex
product. The running maximum and the sum of exponentials are those of flash attention (Dao et al.,
FlashAttention, 2022), taken of |s|; the phase is applied after the exponential. |s| is sqrt(Re s^2 + Im s^2 +
floor^2), so that its gradient is finite at s = 0 and the phase of 0 counts as 0.

The backward pass computes the scores again. With c = g conj(v) for the gradient g of the output, u = s/|s|, p
the weights and delta = sum p Re(conj(u) c) = Re(g conj(out)):

    magnitude   ds = p (Re c - delta) u
    phase       ds = p (Re(conj(u) c) - delta) u + p / |s| (c - u Re(conj(u) c))

and dq = ds k / sqrt(d), dk = conj(ds) q / sqrt(d), dv = conj(w) g with the weights w = p or p u.

Products of a causal call over half of the keys, FLOPs a pair of query and key: forward 4 * 2d (real), 6 * 2d
(magnitude), 8 * 2d (phase); backward, where the gradients of queries and of
keys each compute the scores again, 14 * 2d (real), 22 * 2d (magnitude), 28 * 2d (phase).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.complex_attention import eager, triton_code
from kernels.complex_attention.eager import SCORES, Mask
from kernels.complex_attention.triton_code import PINNED
from kernels.launch import fastest, target_name, tuning, use_triton
from kernels.operator import operator

__all__ = [
    "SCORES",
    "complex_attention",
    "complex_attention_backward",
    "complex_attention_forward",
    "windowed_attention",
]

# So few keys are cheaper to hold all scores of than to compute these again in the backward pass.
HELD_KEYS = 256


def complex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: str = "real",
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Attention of planar heads.

    Args:
        q: planar (B, H, S, 2, d), float32, bfloat16 or float16; float64 in the eager implementation.
        k: planar (B, H_kv, S_k, 2, d), H a multiple of H_kv.
        v: planar, as k.
        score: ``real``, ``magnitude`` or ``phase``.
        causal: whether query n sees keys 0 to n + S_k - S only: the last query sees every key, as it must
            with keys of earlier calls in a cache.
        cu_seqlens: int32 (n + 1,), the boundaries 0, ..., S of sequences packed into a batch of one;
            a query sees the keys of its own sequence only.
        max_seqlen: an upper bound of the packed lengths, by default S; it spares the kernel empty programs.

    ``real`` goes to torch's SDPA on a CPU, and on a GPU where the table beside this file says that it is
    faster or where heads are wider than the kernels take. In the backward pass of SDPA's flash kernel, and of
    its memory-efficient one, programs that hold different keys add to the gradient of a query by atomics in
    whatever order they finish, so repeated gradients differ in their last bits. All kernels here sum in one
    order; under ``torch.use_deterministic_algorithms`` they make ``real``, too.

    Returns:
        Planar (B, H, S, 2, d), in the dtype of q, k and v.

    Raises:
        TypeError: the dtypes differ, or that of cu_seqlens is not int32.
        ValueError: the score is unknown, the shapes do not belong together, or the boundaries are wrong. On a
            GPU wrong numbers in cu_seqlens are an assertion of the device instead, a RuntimeError of the next
            synchronisation.
    """
    _check(q, k, v, score, causal, cu_seqlens)
    if score == "real" and cu_seqlens is None and _takes_sdpa(q, k, v, causal):
        return eager.sdpa(q, k, v, causal)
    if cu_seqlens is None and k.shape[2] <= HELD_KEYS and not use_triton(q):
        return eager.held(q, k, v, score, eager.future_keys(q, k) if causal else None)
    out, _ = complex_attention_forward(q, k, v, score, causal, cu_seqlens, max_seqlen)
    return out


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, score: str, window: int) -> Tensor:
    """Causal attention in which a query sees the ``window`` nearest keys up to its own place only.

    In plain PyTorch on every device: it keeps its scores, of twice as many keys as are seen, and has no
    Triton kernel. Where all keys are within the window it is ``complex_attention``.

    Args:
        q: planar (B, H, S, 2, d).
        k: planar (B, H_kv, S_k, 2, d), those of the queries and at most ``window`` before.
        v: planar, as k.
        score: ``real``, ``magnitude`` or ``phase``.
        window: keys that a query sees.

    Raises:
        ValueError: more keys before, or as ``complex_attention``.
    """
    _check(q, k, v, score, True, None)
    if k.shape[2] - q.shape[2] > window:
        raise ValueError(f"{k.shape[2] - q.shape[2]} keys before the queries are more than window={window}")
    if k.shape[2] <= window:
        return complex_attention(q, k, v, score)
    return eager.windowed(q, k, v, score, window)


def _check(q: Tensor, k: Tensor, v: Tensor, score: str, causal: bool, cu_seqlens: Tensor | None) -> None:
    if score not in SCORES:
        raise ValueError(f"score={score} is not known; choose {', '.join(SCORES)}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"queries, keys and values of one dtype are needed, not {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if q.ndim != 5 or k.shape != v.shape or (q.shape[0], *q.shape[3:]) != (k.shape[0], *k.shape[3:]):
        raise ValueError(
            "planar queries (B, H, S, 2, d) and keys and values (B, H_kv, S_k, 2, d) are needed, not "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key and value heads")
    if causal and k.shape[2] < q.shape[2]:
        raise ValueError(f"causal attention of {q.shape[2]} queries needs as many keys, not {k.shape[2]}")
    if cu_seqlens is None:
        return
    if q.shape[0] != 1 or k.shape[2] != q.shape[2]:
        raise ValueError("packed sequences need a batch of one and as many keys as queries")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, not {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.device != q.device:
        raise ValueError(
            f"cu_seqlens must be (n + 1,) on {q.device}, not {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        )


def _takes_sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    """Whether ``real`` goes to SDPA.

    On a GPU that is pinned by architecture, and measured with MUSE_TUNE_KERNELS=1. Heads that are too wide
    for the kernels always do. Otherwise gradients must not differ from call to call in torch's deterministic
    mode, and the shift of a causal call with cached keys would take a mask of all queries and keys.
    On a CPU float32 does, and bfloat16 does not, because SDPA computes its products in float32 there.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    if not use_triton(q):
        return not deterministic if q.is_cuda else q.dtype != torch.bfloat16
    if not PINNED.covers("real forward", q, q.shape[-1]):
        return True
    if deterministic or (causal and 1 < q.shape[2] < k.shape[2]):
        return False
    if not tuning(q):
        return bool(PINNED.table["dispatch"][target_name(q)][str(8 * q.element_size())]["real"] == "sdpa")
    leaves = [torch.randn_like(x, requires_grad=True) for x in (q, k, v)]
    grad = torch.randn_like(q)

    def train(attention: Callable[..., Any]) -> None:
        with torch.enable_grad():
            torch.autograd.grad(attention(*leaves), leaves, grad)

    key = ("complex_attention real", *q.shape, *k.shape[1:3], q.dtype, causal)
    candidates = {
        "sdpa": lambda: train(lambda q, k, v: eager.sdpa(q, k, v, causal)),
        "triton": lambda: train(lambda q, k, v: complex_attention_forward(q, k, v, "real", causal)[0]),
    }
    return fastest(key, candidates) == "sdpa"


@operator
def complex_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: str,
    causal: bool,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The output, and what the Triton kernels keep of the softmax, float32 (B, H, S); nothing in eager."""
    mask = Mask(causal, cu_seqlens, max_seqlen)
    if use_triton(q):
        return triton_code.forward(q, k, v, score, mask)
    return eager.forward(q, k, v, score, mask), q.new_empty(0, dtype=torch.float32)


@complex_attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    kept = q.shape[:3] if use_triton(q) else (0,)
    return q.new_empty(q.shape, dtype=v.dtype), q.new_empty(kept, dtype=torch.float32)


@operator
def complex_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    score: str,
    causal: bool,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    mask = Mask(causal, cu_seqlens, max_seqlen)
    if out is not None:
        return triton_code.backward(grad, q, k, v, out, lse, score, mask)
    return eager.backward(grad, q, k, v, score, mask)


@complex_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.score, ctx.causal, cu_seqlens, ctx.max_seqlen = inputs
    out, lse = output
    # The eager backward pass does without the output.
    ctx.save_for_backward(q, k, v, out if use_triton(q) else None, lse, cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate_attention(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    *kept, cu_seqlens = ctx.saved_tensors
    grads = complex_attention_backward(grad, *kept, ctx.score, ctx.causal, cu_seqlens, ctx.max_seqlen)
    return (*grads, None, None, None, None)


complex_attention_forward.register_autograd(_differentiate_attention, setup_context=_keep_attention)
