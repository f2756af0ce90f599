"""Runs the tests of the Triton code in Triton's interpreter, in two processes, as one takes long to begin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).with_name("triton_code").glob("test_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1])
def test_triton_code(first: int) -> None:
    options = ["-q", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, FILES[first::2])],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
