"""Planar complex layers."""

from muse.layers.activation import Cardioid, ModReLU, ModSwish, SplitGELU, ZReLU
from muse.layers.attention import ComplexAttention, KVCache
from muse.layers.embedding import ComplexEmbedding
from muse.layers.feedforward import ComplexFFN
from muse.layers.koopman import KoopmanOperator, KoopmanState
from muse.layers.linear import ComplexLinear
from muse.layers.mera import MeraRouter, MeraState
from muse.layers.norm import ComplexLayerNorm, ComplexRMSNorm
from muse.layers.rotary import rotary_table, rotate_pairs

__all__ = [
    "Cardioid",
    "ComplexAttention",
    "ComplexEmbedding",
    "ComplexFFN",
    "ComplexLayerNorm",
    "ComplexLinear",
    "ComplexRMSNorm",
    "KVCache",
    "KoopmanOperator",
    "KoopmanState",
    "MeraRouter",
    "MeraState",
    "ModReLU",
    "ModSwish",
    "SplitGELU",
    "ZReLU",
    "rotary_table",
    "rotate_pairs",
]
