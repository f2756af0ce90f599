"""Losses of a linear head and their gradients in Triton, by tiles of logits that stay on the chip.

N tokens, V entries of the vocabulary, E features of e bytes; a program holds BLOCK_M rows of one side and
passes over BLOCK_N at a time of the other. Programs that run together pass over the same rows, which come
from memory once and then from the L2 cache: what is said of traffic is that between cache and programs. Where
a side has too few blocks for the GPU the other one is split among programs, and what they sum is summed in
turn: partial log-sum-exps, 8 bytes a token and split, and gradients in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.launch import Options, ceil_div, contiguous, launch, next_power_of_2, pinned_beside
from kernels.linear_cross_entropy.eager import shares_of
from kernels.triton_import import jit, tl

PINNED = pinned_beside(__file__)
# Programs that fill a large GPU: where there are fewer, each passes over a part of the other side.
PROGRAMS = 256
# Losses are pinned for features that a program holds, and for all others.
WIDEST = 1024
LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
# Below any logit, and finite, so that the difference of two is never not a number.
LEAST: tl.constexpr = tl.constexpr(-1.0e38)


@jit
def _load_rows(matrix, rows, stride, last, columns, depth, EVEN: tl.constexpr):
    """Rows of a matrix, that of the last one for those behind it; 0 in columns that it has not."""
    pointers = matrix + tl.minimum(rows, last).to(tl.int64)[:, None] * stride + columns[None, :]
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=(columns < depth)[None, :], other=0.0)


@jit
def _losses_kernel(
    X, W, BIAS, TARGETS, LSE, CHOSEN, tokens, vocab, depth, x_row, w_row, split,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of the logits x W^T + b over ``split`` words, and the logit of the target if among them.

    X (tokens, depth), W (vocab, depth), LSE (splits, tokens), CHOSEN (tokens,). The maximum and the sum of
    exponentials are those of the logits so far. With WHOLE all features are one block, loaded once. Traffic:
    V E e bytes for every BLOCK_M tokens, and N E e once, without WHOLE for every BLOCK_N words.
    """
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * split
    last = tl.minimum(first + split, vocab)
    k = tl.arange(0, BLOCK_K)
    there = token < tokens
    target = tl.load(TARGETS + token, mask=there, other=-1)
    most = tl.full((BLOCK_M,), LEAST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    chosen = tl.zeros((BLOCK_M,), tl.float32)
    if WHOLE:
        x = _load_rows(X, token, x_row, tokens - 1, k, depth, EVEN)
    for start in range(first, last, BLOCK_N):
        word = start + tl.arange(0, BLOCK_N)
        logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if WHOLE:
            w = _load_rows(W, word, w_row, vocab - 1, k, depth, EVEN)
            logits = tl.dot(x, tl.trans(w), logits, input_precision="ieee")
        else:
            for at in range(0, depth, BLOCK_K):
                x = _load_rows(X, token, x_row, tokens - 1, at + k, depth, EVEN)
                w = _load_rows(W, word, w_row, vocab - 1, at + k, depth, EVEN)
                logits = tl.dot(x, tl.trans(w), logits, input_precision="ieee")
        if BIAS is not None:
            logits += tl.load(BIAS + tl.minimum(word, vocab - 1)).to(tl.float32)[None, :]
        logits = tl.where((word < last)[None, :], logits, float("-inf"))
        chosen += tl.sum(tl.where(word[None, :] == target[:, None], logits, 0.0), 1)
        larger = tl.maximum(most, tl.max(logits, 1))
        total *= tl.exp2((most - larger) * LOG2_E)
        total += tl.sum(tl.exp2((logits - larger[:, None]) * LOG2_E), 1)
        most = larger
    tl.store(LSE + tl.program_id(1).to(tl.int64) * tokens + token, most + tl.log(total), mask=there)
    tl.store(CHOSEN + token, chosen, mask=there & (target >= first) & (target < last))


@jit
def _gradient_kernel(
    OWN, OTHER, BIAS, TARGETS, LSE, SHARES, SCALE, OUT, SUMS, rows, others, depth, own_row, other_row, split,
    OF_WEIGHT: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The gradient of x, whose OWN (rows, depth) are the tokens and OTHER (others, depth) the words.

    OF_WEIGHT: that of W, with the sides the other way round, and of the bias in SUMS (splits, rows), which
    may be None. OUT (splits, rows, depth) is the sum over ``split`` of the others. The gradient of a logit,
    softmax less 1 at the target, times the token's share, is rounded to the dtype of OTHER for the product;
    SCALE comes to the sum. A program holds its rows and their sums, all features wide. Traffic: OTHER once
    for every BLOCK_M rows, that is V E e bytes for every block of tokens and N E e for every block of words;
    OWN and OUT once. 4 N V E FLOPs.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * split
    last = tl.minimum(first + split, others)
    e = tl.arange(0, BLOCK_E)
    there = row < rows
    own = _load_rows(OWN, row, own_row, rows - 1, e, depth, EVEN)
    if OF_WEIGHT:
        word = row[:, None]
        if BIAS is not None:
            bias = tl.load(BIAS + row, mask=there, other=0.0).to(tl.float32)[:, None]
    else:
        lse = tl.load(LSE + row, mask=there, other=0.0)[:, None]
        target = tl.load(TARGETS + row, mask=there, other=-1)[:, None]
        share = tl.load(SHARES + row, mask=there, other=0.0)[:, None]
    out = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(first, last, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = column < last
        other = _load_rows(OTHER, column, other_row, others - 1, e, depth, EVEN)
        logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        logits = tl.dot(own, tl.trans(other), logits, input_precision="ieee")
        if OF_WEIGHT:
            lse = tl.load(LSE + column, mask=inside, other=0.0)[None, :]
            target = tl.load(TARGETS + column, mask=inside, other=-1)[None, :]
            share = tl.load(SHARES + column, mask=inside, other=0.0)[None, :]
        else:
            word = column[None, :]
            if BIAS is not None:
                bias = tl.load(BIAS + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if BIAS is not None:
            logits += bias
        slope = tl.exp2((logits - lse) * LOG2_E)
        slope = tl.where(word == target, slope - 1.0, slope) * share
        slope = tl.where(inside[None, :], slope, 0.0)
        out = tl.dot(slope.to(other.dtype), other, out, input_precision="ieee")
        if SUMS is not None:
            sums += tl.sum(slope, 1)
    scale = tl.load(SCALE)
    at = tl.program_id(1).to(tl.int64) * rows + row
    pointers = OUT + at[:, None] * depth + e[None, :]
    tl.store(pointers, (out * scale).to(OUT.dtype.element_ty), mask=there[:, None] & (e < depth)[None, :])
    if SUMS is not None:
        tl.store(SUMS + at, sums * scale, mask=there)


def _as_rows(x: Tensor) -> Tensor:
    """A matrix whose features lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _splits(blocks: int, others: int, block: int) -> tuple[int, int]:
    """Into how many parts to split the other side, and how many of its rows, a multiple of a block, each has.

    At least four blocks, because each costs a write and a read of what is summed.
    """
    wanted = max(1, min(PROGRAMS // max(1, blocks), ceil_div(others, 4 * block)))
    rows = block * max(1, ceil_div(ceil_div(others, wanted), block))
    return max(1, ceil_div(others, rows)), rows


def losses(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and log-sum-exp of each token."""
    x, matrix, bias, targets = (
        _as_rows(x),
        _as_rows(weight.flatten(1)),
        contiguous(bias),
        targets.contiguous(),
    )
    (tokens, depth), vocab = x.shape, len(matrix)
    # A target outside of the vocabulary is seen: its loss is not a number.
    chosen = x.new_full((tokens,), math.nan, dtype=torch.float32)

    def run(chosen_options: Options) -> Tensor:
        options = dict(chosen_options)
        block = max(16, min(options.pop("BLOCK_K"), next_power_of_2(depth)))
        blocks = ceil_div(tokens, options["BLOCK_M"])
        splits, split = _splits(blocks, vocab, options["BLOCK_N"])
        partial_lse = x.new_empty(splits, tokens, dtype=torch.float32)
        launch(
            _losses_kernel,
            (blocks, splits),
            *(x, matrix, bias, targets, partial_lse, chosen),
            *(tokens, vocab, depth, x.stride(0), matrix.stride(0), split),
            WHOLE=depth <= block,
            EVEN=depth % block == 0,
            BLOCK_K=block,
            **options,
        )
        return partial_lse

    options = PINNED.choose("losses", x, min(depth, WIDEST), run, tokens, vocab, depth)
    parts = run(options)
    lse = parts[0] if len(parts) == 1 else parts.logsumexp(0)
    return (lse - chosen).where(targets >= 0, 0.0), lse


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    of_x: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the weight and of the bias; empty where not asked for."""
    matrix, bias, targets = _as_rows(weight.flatten(1)), contiguous(bias), targets.contiguous()
    shares, scale = shares_of(grad, targets)
    of_token = (bias, targets, lse, shares, scale)
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    grad_bias = weight.new_empty(0) if bias is None else bias.new_empty(0)
    if of_x:
        grad_x, _ = _gradient(_as_rows(x), matrix, of_token, of_weight=False)
    if of_weight:
        grad_weight, sums = _gradient(matrix, _as_rows(x), of_token, of_weight=True)
        grad_weight = grad_weight.view(weight.shape)
        grad_bias = grad_bias if sums is None else sums.sum(0).to(grad_bias.dtype)
    return grad_x, grad_weight, grad_bias


def _gradient(
    own: Tensor, other: Tensor, of_token: tuple[Tensor | None, ...], of_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """That of ``own``, and of the weight the sums for the bias, (splits, V), if there is one."""
    (rows, depth), others = own.shape, len(other)
    block = max(16, next_power_of_2(depth))

    def run(options: Options) -> tuple[Tensor, Tensor | None]:
        blocks = ceil_div(rows, options["BLOCK_M"])
        splits, split = _splits(blocks, others, options["BLOCK_N"])
        dtype = own.dtype if splits == 1 else torch.float32
        out = own.new_empty(splits, rows, depth, dtype=dtype)
        sums = None
        if of_weight and of_token[0] is not None:
            sums = own.new_empty(splits, rows, dtype=torch.float32)
        launch(
            _gradient_kernel,
            (blocks, splits),
            *(own, other, *of_token, out, sums),
            *(rows, others, depth, own.stride(0), other.stride(0), split),
            OF_WEIGHT=of_weight,
            EVEN=depth == block,
            BLOCK_E=block,
            **options,
        )
        return out, sums

    options = PINNED.choose("gradient", own, depth, run, rows, others, depth, of_weight)
    out, sums = run(options)
    return out[0] if len(out) == 1 else out.sum(0).to(own.dtype), sums


def compile_cases() -> dict[str, Callable[[], object]]:
    """The launches to compile ahead of time: each pinned configuration, some with features to spare, too."""
    # Of 1024 features the losses alone.
    kinds = ((torch.bfloat16, (128, 256, 512, 1024)), (torch.float32, (128, 1024)))
    cases: dict[str, Callable[[], object]] = {}
    for dtype, widths in kinds:
        name = str(dtype).removeprefix("torch.")
        for width in widths:
            cases[f"{name} {width}"] = partial(_compile, dtype, width)
            if width in (128, 512):
                cases[f"{name} {width} uneven"] = partial(_compile, dtype, width - 16, biased=True)
    return cases


def _compile(dtype: torch.dtype, width: int, biased: bool = False) -> None:
    x, weight = torch.empty(4096, width, dtype=dtype), torch.empty(32768, width, dtype=dtype)
    bias = torch.empty(32768) if biased else None
    targets, grad = torch.empty(4096, dtype=torch.int64), torch.empty(4096)
    _, lse = losses(x, weight, bias, targets)
    if PINNED.covers("gradient", x, width):
        gradients(grad, x, weight, bias, targets, lse, True, True)
