"""MUSE's operations: a folder for each, with its public functions, eager implementation and Triton code.

The configuration of every launch is pinned in the JSON beside its Triton code. Nothing here imports muse, and
nothing touches a GPU at import.
"""

# The operations; the modules beside them are what these share.
__all__ = [
    "adamw",
    "complex_activation",
    "complex_attention",
    "complex_linear",
    "complex_norm",
    "complex_rotary",
    "complex_scan",
    "linear_cross_entropy",
    "symplectic",
]
