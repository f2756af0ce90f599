"""MUSE: language models with a complex hidden state.

What users look for is here by name, and imported when it is asked for:

- a trained model: ``load``, ``Trained``, and text from it: ``generate_text``, ``Sampling``, ``continuation``,
  ``TextStream``;
- a model to train: ``build_model``, ``LanguageModel``, ``StageConfig``, ``ModelConfig``, ``WidthConfig``;
- complex layers: ``ComplexLinear``, ``ComplexEmbedding``, ``ComplexAttention``, ``ComplexFFN``,
  ``ComplexRMSNorm``, ``ComplexLayerNorm``, ``KoopmanOperator``, ``MeraRouter``, ``ModReLU``,
  ``SplitGELU``;
- Hamiltonian flows: ``HamiltonianNeuralODE``, ``Potential``, ``MLPPotential``, ``DuffingPotential``.

Further modules: ``muse.planar``, ``muse.layers``, ``muse.models``, ``muse.dynamics``, ``muse.generation``,
``muse.data``, ``muse.evaluate``, ``muse.export``, ``muse.config``, ``muse.errors``, and the operations,
``kernels``. Examples are in docs/library.md:

.. include:: ../docs/library.md
"""

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

# Read by torch at its first allocation: large CPU tensors in huge pages. With 4 KB pages a pass over fresh
# memory spends most of its time in page faults (zeroing 100 MB: 50 ms against 16 ms).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class ForeignKernels(ImportError):
    """The package ``kernels`` that Python finds is not MUSE's; other projects have one of that name, too."""


def _require_own_kernels() -> None:
    spec = find_spec("kernels")
    if spec is not None and spec.origin is not None:
        with open(spec.origin, encoding="utf-8") as file:
            if "MUSE" in file.readline():
                return
    found = f"{spec.origin or 'a folder'} is another project's" if spec is not None else "it is not there"
    raise ForeignKernels(
        f"MUSE needs its own package kernels, and {found}; install MUSE into an environment without another "
        "package of that name (pip uninstall kernels), or start from a folder without one"
    )


def _show(kind: type[BaseException], error: BaseException, trace: object) -> None:
    if kind is ForeignKernels:
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)  # type: ignore[arg-type]


try:
    _require_own_kernels()
except ForeignKernels:
    # Nobody above catches it, in a command, and one sentence says all.
    sys.excepthook = _show
    raise


# Where each name is.
_NAMES = {
    "load": "muse.trained",
    "Trained": "muse.trained",
    "build_model": "muse.models",
    "LanguageModel": "muse.models",
    "StageConfig": "muse.config",
    "ModelConfig": "muse.config",
    "WidthConfig": "muse.config",
    "Sampling": "muse.generation",
    "continuation": "muse.generation",
    "TextStream": "muse.generation",
    "generate_text": "muse.generate",
    **dict.fromkeys(
        (
            "ComplexLinear",
            "ComplexEmbedding",
            "ComplexAttention",
            "ComplexFFN",
            "ComplexRMSNorm",
            "ComplexLayerNorm",
            "KoopmanOperator",
            "MeraRouter",
            "ModReLU",
            "SplitGELU",
        ),
        "muse.layers",
    ),
    **dict.fromkeys(
        ("HamiltonianNeuralODE", "Potential", "MLPPotential", "DuffingPotential"), "muse.dynamics"
    ),
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'muse' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_NAMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
