"""What torch.compile would build code with."""

from __future__ import annotations

import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

from muse.errors import ConfigError

# What torch.compile and Triton build has this header, which systems may package apart.
SOURCE = "#include <Python.h>\nint built;\n"


def find_compiler(device: torch.device) -> str | None:
    """The program that builds code for a device; None where it, or for CUDA Triton, is missing."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return None
    programs = (shlex.split(command)[:1] for command in _commands(device))
    return next(filter(None, (shutil.which(program) for (program,) in filter(None, programs))), None)


def require_compiler(device: torch.device) -> None:
    """See that torch.compile can build code for a device, and does not take what it built for another one.

    Raises:
        ConfigError: it cannot; what is missing or fails.
    """
    variable = "CC" if device.type == "cuda" else "CXX"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        why = "the package triton is not installed"
    elif (program := find_compiler(device)) is None:
        why = f"{' or '.join(_commands(device))} is not there; install it or name another one with {variable}"
    else:
        options = shlex.split(os.environ.get(variable, ""))[1:]
        reason = _failure(program, *options)
        if reason is None:
            key_cache_by_vectors(device)
            return
        why = f"{program} fails ({reason}); name another one with {variable}"
    language = "C" if device.type == "cuda" else "C++"
    raise ConfigError(
        f"hardware.compile=true needs a {language} compiler, and {why}, or choose hardware.compile=false"
    )


def key_cache_by_vectors(device: torch.device) -> None:
    """On a CPU, make the width of its vectors a part of the key under which torch.compile caches code.

    By itself torch.compile takes code from its cache that was written for other vectors, after a change of
    ATEN_CPU_CAPABILITY or on another node that shares the cache, and builds it for those of this processor:
    it then writes past the end of its results.
    """
    if device.type != "cpu":
        return
    from torch._inductor import config, cpu_vec_isa

    if config.cpp.simdlen is None:
        config.cpp.simdlen = cpu_vec_isa.pick_vec_isa().bit_width()


def _commands(device: torch.device) -> list[str]:
    """The compilers that are looked for, one after the other."""
    if device.type == "cuda":
        # Triton builds what launches its kernels with a C compiler.
        return [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]


@functools.cache
def _failure(program: str, *options: str) -> str | None:
    """Why a compiler cannot build a small library; None where it can."""
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "source.c"), Path(folder, "built")
        source.write_text(SOURCE, encoding="utf-8")
        includes = f"-I{sysconfig.get_paths()['include']}"
        try:
            done = subprocess.run(
                [program, *options, "-shared", "-fPIC", includes, str(source), "-o", str(built)],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
        except OSError as error:
            return error.strerror or str(error)
        if done.returncode == 0 and built.exists():
            return None
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        told = next((line for line in lines if "error" in line), lines[0] if lines else "")
        return told.replace(f"{source}:", "") or f"it ended with status {done.returncode} and built nothing"
