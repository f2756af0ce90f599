"""Files among folders that come and go, and on disks that are full."""

import errno
import os
import subprocess
import sys

import pytest

from muse.errors import RunError
from muse.files import DISK_FULL, claimed, disk_full_as_run_error, find_files, write_atomically


def test_files_are_found_at_every_depth(tmp_path):
    for folder in ("a", "b/c", "b/c/d"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "run.json").touch()
    (tmp_path / "b" / "other.json").touch()
    found = find_files(tmp_path, "run.json")
    assert len(found) == 3
    assert set(found) == {tmp_path / folder / "run.json" for folder in ("a", "b/c", "b/c/d")}
    assert find_files(tmp_path / "nowhere", "run.json") == []


def test_a_folder_that_vanishes_meanwhile_costs_nothing(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder / "checkpoints").mkdir(parents=True)
        (tmp_path / folder / "run.json").touch()
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("checkpoints"):
            os.rmdir(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert len(find_files(tmp_path, "run.json")) == 2
    assert not (tmp_path / "a" / "checkpoints").exists()


@pytest.mark.parametrize("number", DISK_FULL)
def test_a_full_disk_is_one_sentence_that_names_the_file(tmp_path, monkeypatch, number):
    def full(descriptor):
        raise OSError(number, os.strerror(number))

    path = tmp_path / "result.json"
    path.write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(RunError, match=f"no space is left for {path}") as caught,
        disk_full_as_run_error(tmp_path),
    ):
        write_atomically(path, "after")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["result.json"]
    assert path.read_text() == "before"


def test_another_error_of_the_system_is_left_as_it_is(tmp_path):
    with pytest.raises(OSError, match="Input/output") as caught, disk_full_as_run_error(tmp_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert caught.value.filename is None


def test_a_file_is_held_by_one_alone_until_it_ends(tmp_path):
    path = tmp_path / "new" / "claim"
    with claimed(path) as first:
        assert first
        with claimed(path) as second:
            assert not second
    held = f"import fcntl, sys, time\nf = open({str(path)!r}, 'a')\nfcntl.flock(f, fcntl.LOCK_EX)\n"
    holder = subprocess.Popen(
        [sys.executable, "-c", held + "print('held', flush=True)\ntime.sleep(600)"], stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with claimed(path) as other:
        assert not other
    holder.kill()
    holder.communicate()
    with claimed(path, wait=True) as after:
        assert after
