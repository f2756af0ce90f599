"""How a training step of stage 3a is executed: choices that change its speed and not its maths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.compiler import key_cache_by_vectors
from muse.config import OptimConfig
from muse.models import LanguageModel
from muse.models.transformer import TransformerBlock


@dataclass(frozen=True)
class Execution:
    """The choices; the defaults are what plain PyTorch code does.

    Attributes:
        attention: fused attention instead of products, mask and softmax written out.
        loss: the cross-entropy that never holds the logits instead of F.cross_entropy on them.
        optimizer: the fused AdamW instead of the one that torch takes unasked.
        threads: CPU threads; 0 leaves PyTorch's.
        products: bf16 matrix products under autocast instead of fp32 ones.
        compile: blocks compiled by torch.compile.
    """

    attention: bool = False
    loss: bool = False
    optimizer: bool = False
    threads: int = 0
    products: bool = False
    compile: bool = False

    def apply(self, model: LanguageModel) -> None:
        """Set what the modules of a stage-3a model themselves decide, and the threads."""
        for block in model.blocks:
            self.apply_to_block(block)
        if self.threads:
            torch.set_num_threads(self.threads)

    def apply_to_block(self, block: nn.Module) -> None:
        """Set what one block decides."""
        assert isinstance(block, TransformerBlock)
        block.attention.fused = self.attention
        if self.compile:
            key_cache_by_vectors(block.attention_norm.weight.device)
            block.compile()
        else:
            block._compiled_call_impl = None

    @contextmanager
    def eager(self, model: LanguageModel) -> Iterator[None]:
        """Leave compiled blocks aside: evaluation and decoding would compile them anew for their shapes."""
        compiled = [block._compiled_call_impl for block in model.blocks]
        try:
            for block in model.blocks:
                block._compiled_call_impl = None
            yield
        finally:
            for block, call in zip(model.blocks, compiled, strict=True):
                block._compiled_call_impl = call

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.products)

    def training_loss(
        self,
        model: LanguageModel,
        inputs: Tensor,
        targets: Tensor,
        saving: AbstractContextManager[Any] | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats of ``targets`` (B, S); ``saving`` surrounds all before the head."""
        with self.autocast(inputs.device):
            with saving or nullcontext():
                features = model.features(inputs)
            return self.head_loss(model, features, targets)

    def head_loss(self, model: LanguageModel, features: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of ``targets`` (B, S) given features (B, S, d)."""
        if self.loss:
            return model.loss_of(features, targets)
        weight, bias = model.head_parameters()
        logits = F.linear(features, weight, bias)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def build_optimizer(self, model: nn.Module, options: OptimConfig) -> torch.optim.AdamW:
        """AdamW over a model's parameters; biases, norms and other vectors do not decay."""
        parameters = list(model.parameters())
        return torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay},
                {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=options.lr,
            betas=(options.betas[0], options.betas[1]),
            eps=options.eps,
            # Not fused it is what torch takes unasked: on a CPU one parameter and operation at a time.
            fused=True if self.optimizer else None,
        )
