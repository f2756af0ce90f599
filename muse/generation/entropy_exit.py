"""Tokens that leave out the last blocks where the model is sure already.

After a block the final norm and the head read the state as after the last one. Where the entropy of that
distribution is below a threshold it is taken, and the token's state moves no more. Later tokens look at this
one in the blocks that it has not passed, too: there the mixers' caches take in the state that it left with,
and what they would add to it is dropped. That is put off until a token passes such a block, for all that
are missing at once, and never done where none does.

Schuster et al., "Confident Adaptive Language Modeling" (2022), who train for it; here the head learned from
the last block alone. To put off what is missing: Elbayad et al., "Depth-Adaptive Transformer" (2020), copy
states alike, and Bae et al., "Fast and Robust Early-Exiting Framework" (2023), compute them together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.planar import upcast
from muse.errors import ConfigError
from muse.models import LanguageModel
from muse.models.block import Block


@dataclass
class EntropyExit:
    """Where a token may leave, and where tokens did.

    Attributes:
        below: entropy in nats below which a token leaves.
        after: blocks that every token passes; a loop's count like others.
        passed: of every token that was read by itself, the blocks that it passed.
    """

    below: float
    after: int = 1
    passed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.below > 0:
            raise ConfigError(
                f"--entropy-exit {self.below:g} is not allowed; it must be above 0 nats, below which no "
                "entropy is"
            )
        if self.after < 1:
            raise ConfigError(f"--exit-after {self.after} is too small; it must be at least 1 block")

    @property
    def mean_passed(self) -> float:
        """Blocks that a token passed on average; not a number where there was none."""
        return sum(self.passed) / len(self.passed) if self.passed else math.nan


def block_count(model: LanguageModel) -> int:
    """Blocks that a token passes, those of every loop."""
    return model.loops * len(model.blocks)


def check_exits(model: LanguageModel, exits: EntropyExit) -> None:
    """See that tokens can leave out blocks of a model.

    Raises:
        ConfigError: there are none to leave out, or they do more than add to a state that the head reads.
    """
    if model.trunk is not None or not all(isinstance(block, Block) for block in model.blocks):
        raise ConfigError(
            "--entropy-exit needs blocks that add to the state that the head reads: those of stage=0, 1, 2 "
            "or 3 with stage.mixer=attention and stage.trunk=residual"
        )
    if exits.after >= block_count(model):
        raise ConfigError(
            f"--exit-after {exits.after} leaves out none of the {block_count(model)} blocks that a token "
            "passes; it must be less"
        )


@torch.no_grad()
def exit_logits(
    model: LanguageModel,
    tokens: Tensor,
    caches: Sequence[Any],
    missing: Sequence[list[Tensor]],
    exits: EntropyExit,
) -> Tensor:
    """As ``LanguageModel.continue_logits``, but a token that comes alone may leave early.

    Args:
        model: that ``check_exits`` allows.
        tokens: (1, S); where S > 1, as of a prompt, they pass all blocks.
        caches: of the tokens before.
        missing: for each cache the states (1, 1, ...) of tokens that it has not taken in yet.
        exits: where tokens leave; notes where this one did.
    """
    alone, count = tokens.shape[1] == 1, len(model.blocks)
    state = embedded = model.embedding(tokens, caches[0].length)
    logits, passed = None, 0
    while logits is None:
        block: Any = model.blocks[passed % count]
        if passed and passed % count == 0:
            state = state + embedded
        if missing[passed]:
            mixer = block.sublayers(caches[passed])[0]
            mixer(torch.cat(missing[passed], 1))
            missing[passed].clear()
        state = block(state, caches[passed])
        passed += 1
        if passed == len(caches):
            logits = model.logits_of(state)
        elif alone and passed >= exits.after:
            read = model.logits_of(state)
            if entropy(read).item() < exits.below:
                logits = read
    for states in missing[passed:]:
        states.append(state)
    if alone:
        exits.passed.append(passed)
    return logits


def entropy(logits: Tensor) -> Tensor:
    """In nats, of distributions (..., V): (...), at least float32."""
    log_shares = upcast(logits).log_softmax(-1)
    return -(log_shares.exp() * log_shares).sum(-1)
