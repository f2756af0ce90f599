"""A small transformer of stage 3a, and the float64 reference that losses and gradients are held against."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from muse.config import ModelConfig, StageConfig, WidthConfig
from muse.models import LanguageModel, build_model

VOCAB = 97


def build(
    seed: int = 0, d_model: int = 32, layers: int = 2, heads: int = 4, d_ff: int = 64, **options
) -> LanguageModel:
    """With biases and norms that are not those of the initialisation."""
    options = {"precision": "fp32", "activation": "gelu", "tied": False} | options
    width = WidthConfig(d_model, layers, heads, heads, d_ff)
    config = ModelConfig(name="test", vocab_size=VOCAB, seq_len=32, real=width)
    model = build_model(StageConfig(number="3a", **options), config, VOCAB, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(size: int = 8, length: int = 32) -> tuple[Tensor, Tensor]:
    """Inputs and targets; with 16 channels or more a state of the batch has at least 4096 elements."""
    tokens = torch.randint(VOCAB, (size, length + 1))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model: LanguageModel, loss: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


def exact(model: LanguageModel, inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a float64 copy, by plain operations."""
    model = copy.deepcopy(model).double()
    for block in model.blocks:
        block.attention.fused = False
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    return loss.detach(), gradients(model, loss)


def relative_error(x: Tensor, reference: Tensor) -> float:
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


def joined(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


class CountingCompiler:
    """Stands for torch.compile: counts the calls of what it has compiled, and is passed through."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, function, *_, **__):
        def compiled(*arguments, **keywords):
            self.calls += 1
            return function(*arguments, **keywords)

        return compiled
