"""The built wheel holds all that MUSE needs, and works away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import muse

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "model.complex.d_model=8",
    "model.complex.layers=1",
    "model.complex.heads=1",
    "model.complex.kv_heads=1",
    "model.complex.d_ff=8",
    "model.seq_len=16",
    "model.vocab_size=300",
    "logger=none",
    "hardware=cpu",
    "data=text",
    "data.path=text",
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the contents of the wheel, and one to work in."""
    place = tmp_path_factory.mktemp("package")
    source, site, work = place / "source", place / "site", place / "work"
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("muse", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", place, source]
    built = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = place.glob("muse-*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    (work / "text").mkdir(parents=True)
    for split in ("train", "valid", "test"):
        (work / "text" / f"{split}.txt").write_text("the state turns and comes back again. " * 60)
    return site, work


def run(installed, *arguments, status=0):
    site, work = installed
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=work, env=environment, capture_output=True, text=True
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def command(installed, name, *options):
    """What the console command ``name`` of the wheel's metadata does."""
    site, _ = installed
    (entries,) = site.glob("muse-*.dist-info/entry_points.txt")
    targets = dict(line.split(" = ") for line in entries.read_text().splitlines() if " = " in line)
    module, _, function = targets[name].partition(":")
    code = f"import sys; sys.argv[0] = {name!r}; from {module} import {function}; {function}()"
    return run(installed, "-c", code, *options)


@pytest.mark.slow
def test_a_wheel_trains_measures_exports_and_loads(installed):
    command(installed, "muse-train", "stage=2", "train.steps=2", "train.batch_size=2", *SMALL)
    _, work = installed
    (result,) = (work / "outputs" / "train").rglob("result.json")
    told = json.loads(result.read_text())
    assert told["steps"] == 2
    assert told["commit"] is None
    command(installed, "muse-bench", "stage=2", "benchmark=stability", "benchmark.inputs=1", *SMALL)
    (result_of_bench,) = (work / "outputs" / "bench").rglob("result.json")
    assert json.loads(result_of_bench.read_text())["nan_count"] == 0
    code = (
        "import runpy, pathlib, muse; runpy.run_module('muse.export', run_name='__main__', alter_sys=True); "
        "from muse import load; "
        "print(muse.__file__, load(pathlib.Path('model.safetensors')).config.stage.number)"
    )
    shown = run(installed, "-c", code, str(result.parent), "model.safetensors").stdout.split()[-2:]
    assert shown == [str(installed[0] / "muse" / "__init__.py"), "2"]


def test_a_package_of_the_same_name_as_the_kernels_is_told_in_one_sentence(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text('"""Load compute kernels from the Hub."""\n')
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(muse.__file__).parents[1])]),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from muse.launch.commands import train; train()"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"error: MUSE needs its own package kernels, and {tmp_path}")
