"""``python -m muse.card.machine FILE``: what a machine is, and how fast at large products and copies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from muse.config import HardwareConfig
from muse.files import write_json
from muse.hardware import describe, machine, use_hardware
from muse.measure.matrix_products import product_rate
from muse.measure.timing import quantile, times_in_turns
from muse.runs.provenance import package_version, source_hash

# Bytes that are copied to tell the bandwidth of the memory.
COPIED = {"cuda": 2**30, "cpu": 2**26}
# What nvidia-smi tells of the clocks.
CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")


def describe_machine() -> dict[str, Any]:
    """Versions, the device, its clocks, and what it reaches in large products and copies."""
    hardware = HardwareConfig()
    device = use_hardware(hardware)
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    count = COPIED[device.type] // 4
    source, target = torch.zeros(count, device=device), torch.empty(count, device=device)
    (copies,) = times_in_turns([lambda: target.copy_(source)], 2, 9, device)
    return {
        "device": describe(device),
        "python": sys.version.split()[0],
        **{name: package_version(name) for name in ("torch", "triton")},
        "cuda": torch.version.cuda,
        "source": source_hash(),
        "machine": machine(hardware, device),
        "clocks": _clocks() if device.type == "cuda" else None,
        "product_tflops": {str(dtype)[6:]: product_rate(dtype, device) / 1e12 for dtype in dtypes},
        # Read and written.
        "copy_gb_per_second": 2 * COPIED[device.type] / quantile(copies, 0.5) / 1e9,
    }


def _clocks() -> dict[str, str] | None:
    command = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(CLOCKS, (value.strip() for value in told.splitlines()[0].split(",")), strict=False))


if __name__ == "__main__":
    write_json(Path(sys.argv[1]), json.loads(json.dumps(describe_machine())))
