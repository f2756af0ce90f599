import importlib.util
import subprocess
import sys

import pytest
import torch

from muse.compiler import find_compiler, require_compiler
from muse.config import HardwareConfig
from muse.errors import ConfigError
from muse.hardware import use_hardware

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts programs of a name where they are found; there are no others."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)

    def add(name):
        program = tmp_path / name
        program.write_text("")
        program.chmod(0o755)
        return str(program)

    return add


@pytest.mark.parametrize(("device", "name"), [(CPU, "g++"), (CUDA, "gcc"), (CUDA, "clang")], ids=str)
def test_a_compiler_is_found_once_it_is_there(install, monkeypatch, device, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: module == "triton")
    assert find_compiler(device) is None
    path = install(name)
    assert find_compiler(device) == path


@pytest.mark.parametrize(("device", "variable", "name"), [(CPU, "CXX", "g++"), (CUDA, "CC", "gcc")], ids=str)
def test_the_compiler_of_the_environment_replaces_the_others(install, monkeypatch, device, variable, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: module == "triton")
    install(name)
    monkeypatch.setenv(variable, "mine")
    assert find_compiler(device) is None
    path = install("mine")
    assert find_compiler(device) == path


def test_cuda_needs_triton_and_the_cpu_does_not(install, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    expected = install("g++")
    install("gcc")
    assert find_compiler(CUDA) is None
    assert find_compiler(CPU) == expected


needs_compiler = pytest.mark.skipif(find_compiler(CPU) is None, reason="needs a C++ compiler")


@needs_compiler
def test_a_compiler_that_builds_is_enough():
    require_compiler(CPU)


@needs_compiler
def test_a_compiler_may_have_options_and_a_launcher(monkeypatch):
    monkeypatch.setenv("CXX", f"env {find_compiler(CPU)} -O1")
    require_compiler(CPU)


@pytest.mark.parametrize(
    ("device", "variable", "given", "told"),
    [
        (CPU, "CXX", "/nonexistent", "needs a C++ compiler, and /nonexistent is not there"),
        (CPU, "CXX", "false", "false fails (it ended with status 1 and built nothing); name another one"),
        (CPU, "CXX", "true", "true fails (it ended with status 0 and built nothing)"),
        (CPU, "PATH", "/nonexistent", "is not there; install it or name another one with CXX"),
        (CUDA, "CC", "/nonexistent", "needs a C compiler, and /nonexistent is not there"),
        (CUDA, "CC", "false", "false fails"),
        (CUDA, "PATH", "/nonexistent", "gcc or clang is not there; install it or name another one with CC"),
    ],
)  # fmt: skip
def test_without_a_working_compiler_compilation_is_refused(monkeypatch, device, variable, given, told):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: module == "triton")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, given)
    with pytest.raises(ConfigError) as caught:
        require_compiler(device)
    assert str(caught.value).startswith("hardware.compile=true needs a C")
    assert told in str(caught.value)
    assert str(caught.value).endswith(", or choose hardware.compile=false")
    assert "\n" not in str(caught.value)


def test_the_error_of_a_compiler_is_told(monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho warned >&2; echo 'fatal error: Python.h: not found' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(ConfigError, match=r"broken fails \(fatal error: Python\.h: not found\)"):
        require_compiler(CPU)


def test_it_is_looked_for_before_a_run_that_compiles(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    with pytest.raises(ConfigError, match=r"hardware\.compile=true needs a C"):
        use_hardware(HardwareConfig(device="cpu", compile=True))
    use_hardware(HardwareConfig(device="cpu"))


TWICE_AS_MUCH = """
import torch
from torch._dynamo.utils import counters

from muse.compiler import require_compiler

require_compiler(torch.device("cpu"))
x = torch.arange(1000.0)
torch.testing.assert_close(torch.compile(lambda x: 2 * x)(x), 2 * x)
print(counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
@needs_compiler
def test_code_for_other_vectors_is_not_taken_from_a_cache(tmp_path, monkeypatch):
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("needs a processor with vectors of two widths")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def hits(vectors):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", vectors)
        command = [sys.executable, "-c", TWICE_AS_MUCH]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    # The last one meets its own.
    assert [hits(vectors) for vectors in ("avx2", "avx512", "avx512")] == [0, 0, 1]
