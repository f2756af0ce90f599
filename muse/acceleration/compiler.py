"""What torch.compile would build code with."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

import torch


def find_compiler(device: torch.device) -> str | None:
    """The program that builds code for a device; None where it, or for CUDA Triton, is missing."""
    if device.type == "cuda":
        # Triton builds what launches its kernels with a C compiler.
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
        if importlib.util.find_spec("triton") is None:
            return None
    else:
        names = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    return next(filter(None, map(shutil.which, names)), None)
