from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from typing import Any

import pytest

from muse.config import BenchConfig, RunConfig
from muse.runs import provenance as module
from muse.runs.provenance import PACKAGES, commit, identity, provenance, source_hash


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all options."""
    if not dataclasses.is_dataclass(value):
        return [path]
    names = [field.name for field in dataclasses.fields(value)]
    return [leaf for name in names for leaf in leaves(getattr(value, name), (*path, name))]


def changed(path: tuple[str, ...], config: RunConfig) -> RunConfig:
    """A configuration with another value for one option, unchecked."""
    owner: Any = config
    for name in path[:-1]:
        owner = getattr(owner, name)
    value = getattr(owner, path[-1])
    other = {
        bool: lambda: not value,
        int: lambda: value + 1,
        float: lambda: value + 0.125,
        str: lambda: value + "x",
        list: lambda: [*value, 0.5],
        dict: lambda: {**value, "x": "x"},
        type(None): lambda: 1,
    }[type(value)]()
    setattr(owner, path[-1], other)
    return config


@pytest.mark.parametrize("path", leaves(RunConfig()), ids=".".join)
def test_identity_changes_with_every_option_that_decides_numbers(path):
    before, after = identity(RunConfig()), identity(changed(path, RunConfig()))
    unidentifying = ("logger", "hardware", "output_root", "resume", "profile")
    elsewhere = path[0] in unidentifying or path in (("data", "cache"), ("train", "async_checkpoint"))
    assert (before == after) == elsewhere


@pytest.mark.parametrize("path", [("benchmark", "rerun"), ("benchmark", "repeats")], ids=".".join)
def test_what_is_measured_again_has_the_identity_of_the_measurement_before(path):
    same = identity(BenchConfig()) == identity(changed(path, BenchConfig()))
    assert same == (path[-1] == "rerun")


def test_identity_is_the_same_in_every_process():
    code = "import muse.runs.provenance as p, muse.config as c; print(p.identity(c.RunConfig()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=module.ROOT
    )
    assert done.stdout.strip() == identity(RunConfig())
    assert re.fullmatch(r"[0-9a-f]{16}", identity(RunConfig()))


def test_identity_depends_on_what_is_added():
    assert identity(RunConfig(), "a") not in (identity(RunConfig()), identity(RunConfig(), "b"))


def test_provenance_is_complete_and_json():
    config = RunConfig(seed=5)
    told = json.loads(json.dumps(provenance(config)))
    assert told["seed"] == 5
    assert told["config"] == dataclasses.asdict(config)
    assert told["identity"] == identity(config)
    assert set(told["versions"]) == {"python", *PACKAGES}
    assert told["versions"]["python"] == sys.version.split()[0]
    for name in ("torch", "numpy", "hydra-core"):
        assert re.match(r"\d+\.\d+", told["versions"][name])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", told["time"])


def test_commit_is_that_of_the_checkout():
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=module.ROOT, capture_output=True, text=True, check=False
    )
    if head.returncode:
        assert commit() is None
    else:
        assert commit() in (head.stdout.strip(), head.stdout.strip() + "-dirty")


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.CalledProcessError(128, "git")])
def test_without_git_there_is_no_commit(monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(module.subprocess, "run", fail)
    assert commit.__wrapped__() is None


def test_a_package_that_is_missing_has_no_version(monkeypatch):
    monkeypatch.setattr(module, "PACKAGES", ("torch", "no-such-package-of-muse"))
    versions = provenance(RunConfig())["versions"]
    assert versions["no-such-package-of-muse"] is None
    assert versions["torch"] is not None


def test_the_source_hash_follows_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    hashes = []
    (tmp_path / "muse" / "inner").mkdir(parents=True)
    for path, text in (("a.py", "1"), ("a.py", "2"), ("inner/b.py", "1"), ("note.txt", "1")):
        (tmp_path / "muse" / path).write_text(text)
        hashes.append(source_hash.__wrapped__())
    assert len(set(hashes[:3])) == 3
    assert hashes[3] == hashes[2]
    (tmp_path / "muse" / "a.py").rename(tmp_path / "muse" / "c.py")
    assert source_hash.__wrapped__() not in hashes


def test_the_source_hash_follows_the_launch_configurations(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    hashes = []
    for name in ("flow.json", "flow.json", "resources.json"):
        with open(tmp_path / "kernels" / name, "a") as file:
            file.write("{}")
        hashes.append(source_hash.__wrapped__())
    assert hashes[0] != hashes[1] == hashes[2]
