"""What a test needs of the machine, beside a GPU."""

from __future__ import annotations

import os

import pytest

needs_vectors = pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") == "default",
    reason="with ATEN_CPU_CAPABILITY=default torch.compile itself writes vector code that does not compile",
)
