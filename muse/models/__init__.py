"""The language models of every stage."""

from __future__ import annotations

import torch

from muse.config import ModelConfig, StageConfig
from muse.models.complex import complex_decoder
from muse.models.hamiltonian import hamiltonian_decoder
from muse.models.integrated import integrated_decoder
from muse.models.language_model import LanguageModel, count_parameters
from muse.models.loss import linear_cross_entropy
from muse.models.real import real_decoder
from muse.models.transformer import transformer_decoder
from muse.models.trunk import ReversibleTrunk


def build_model(stage: StageConfig, model: ModelConfig, vocab_size: int, seed: int = 0) -> LanguageModel:
    """Build the model of a stage on the CPU, initialised by ``seed`` and stored in the stage's dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if stage.number == "0":
            built = real_decoder(stage, model.real, vocab_size)
        elif stage.number == "3a":
            built = transformer_decoder(stage, model.real, vocab_size)
        elif stage.number == "2":
            built = hamiltonian_decoder(stage, model.complex, vocab_size)
        elif stage.number == "3":
            built = integrated_decoder(stage, model.complex, vocab_size)
        else:
            built = complex_decoder(stage, model.complex, vocab_size, model.seq_len)
    if stage.trunk == "reversible":
        # A mixer of tokens and a feed-forward map or flows.
        built.trunk = ReversibleTrunk(2 * len(built.blocks), stage.trunk_decay)
    built.loops = stage.loops
    built.recompute = stage.recompute_blocks if stage.recompute == "block" else 0
    return built.to(torch.bfloat16) if stage.precision == "bf16" else built


__all__ = ["LanguageModel", "build_model", "count_parameters", "linear_cross_entropy"]
