"""Planar complex layers."""

from muse.layers.activation import Cardioid, ModReLU, ModSwish, SplitGELU, ZReLU
from muse.layers.attention import ComplexAttention, complex_attention
from muse.layers.embedding import ComplexEmbedding
from muse.layers.feedforward import ComplexFFN
from muse.layers.linear import ComplexLinear, complex_linear
from muse.layers.norm import ComplexLayerNorm, ComplexRMSNorm
from muse.layers.rotary import rotary_table, rotate, rotate_pairs

__all__ = [
    "Cardioid",
    "ComplexAttention",
    "ComplexEmbedding",
    "ComplexFFN",
    "ComplexLayerNorm",
    "ComplexLinear",
    "ComplexRMSNorm",
    "ModReLU",
    "ModSwish",
    "SplitGELU",
    "ZReLU",
    "complex_attention",
    "complex_linear",
    "rotary_table",
    "rotate",
    "rotate_pairs",
]
