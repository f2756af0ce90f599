from __future__ import annotations

import subprocess
import sys

import pytest
from support.waiting import PATIENCE

# As OmegaConf does where a value is taken into a container.
STARTING = """
import atexit, os, signal
from muse.processes import signals
atexit.register(print, "left")
signals.install_command_handlers()
try:
    os.kill(os.getpid(), signal.{signal})
    old = 1
finally:
    print(old)
"""


@pytest.mark.parametrize(("signal", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_a_command_that_only_starts_whatever_code_it_meets(signal, status):
    done = subprocess.run(
        [sys.executable, "-c", STARTING.format(signal=signal)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, "left\n", "")
