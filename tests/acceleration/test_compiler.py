import importlib.util

import pytest
import torch

from muse.acceleration.compiler import find_compiler

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
