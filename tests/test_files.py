"""Files among folders that come and go."""

import os

from muse.files import find_files


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
