"""The command that kills a training at random moments."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.processes import ROOT, environment_apart


@pytest.mark.slow
def test_a_run_that_is_killed_at_a_random_moment_ends_as_if_it_had_not_been():
    command = [sys.executable, str(ROOT / "tests" / "random_kills.py"), "ddp", "--kills=1"]
    done = subprocess.run(command, env=environment_apart(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ddp: 1 kills" in done.stdout
    assert "the bits are those of an undisturbed run" in done.stdout
