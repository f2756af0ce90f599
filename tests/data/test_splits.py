from __future__ import annotations

import random
import re

import pytest

from muse.data.splits import MIN_CHARACTERS, find_splits, hold_out
from muse.errors import ConfigError


def names_by_split(root, names: list[str]) -> dict[str, list[str]]:
    """What is found among files and, with a slash at their end, folders."""
    for name in names:
        if name.endswith("/"):
            (root / name).mkdir()
        else:
            (root / name).write_text("text", encoding="utf-8")
    return {split: [path.name for path in paths] for split, paths in find_splits(root, "data.path=x").items()}


@pytest.mark.parametrize(
    ("train", "valid", "test"),
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("Train.TXT", "Validation.txt", "TEST.txt"),
        ("training", "val", "testing"),
        ("train.md", "dev.md", "test.md"),
        ("train/", "validation/", "test/"),
        ("train.txt", "dev/", "test.raw"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("stories-train.txt", "stories-valid.txt", "stories-test.txt"),
        ("V2-GPT4 train.txt", "V2-GPT4 val.txt", "V2-GPT4 test.txt"),
        ("train_clean.txt", "dev_clean.txt", "test_clean.txt"),
        ("train.en", "dev.en", "test.en"),
    ],
)
def test_names_of_splits(tmp_path, train, valid, test):
    found = names_by_split(tmp_path, [test, train, valid, "README.md", ".train.txt", "night_train.txt"])
    assert found == {
        split: [name.rstrip("/")] for split, name in (("train", train), ("valid", valid), ("test", test))
    }


@pytest.mark.parametrize(
    "shards",
    [
        ["train-00000-of-00002.txt", "train-00001-of-00002.txt"],
        ["train_1.txt", "train_2.txt"],
        ["train.1.txt", "train.2.txt"],
        ["train01.txt", "train02.txt"],
    ],
)
def test_the_shards_of_a_split_belong_together(tmp_path, shards):
    assert names_by_split(tmp_path, [*shards, "valid.txt"]) == {"train": shards, "valid": ["valid.txt"]}


@pytest.mark.parametrize(
    "names",
    [
        ["how_to_train.txt", "acid_test.txt", "test results.txt"],
        ["train.py", "test.py", "train.yaml", "test.sh", "dev.toml"],
        ["trains.txt", "latest.txt", "devices.txt", "contest/", "constrain/", "tests/"],
        ["train-test-split.txt", "train.test.txt"],
        [".train", ".test/"],
    ],
)
def test_other_names_are_no_splits(tmp_path, names):
    assert names_by_split(tmp_path, names) == {}


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["train.txt", "valid.txt", "dev.txt"], "dev.txt and valid.txt, both the validation"),
        (["train.txt", "train/"], "train and train.txt, both the training"),
        (["train.en", "train.de"], "train.de and train.en, both the training"),
        (["train.txt", "stories-train.txt", "stories-test.txt"], "stories-train.txt and train.txt"),
        (["valid.txt", "a.txt", "b.txt", "c.txt"], "holds valid.txt, by its name the validation split"),
        (["test/", "a.txt", "b.txt", "c.txt"], "holds test, by its name the test split"),
    ],
)
def test_names_that_contradict_each_other_are_refused_by_name(tmp_path, names, told):
    with pytest.raises(ConfigError, match=re.escape(told)) as raised:
        names_by_split(tmp_path, names)
    assert str(raised.value).startswith("data.path=x holds")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("count", [1, 2])
def test_documents_are_held_out_by_their_names(count):
    files = {f"{n}.txt": f"text {n}" for n in range(1000)}
    parts = hold_out(files, count)
    assert sorted(text for part in parts for text in part) == sorted(files.values())
    assert all(len(part) == pytest.approx(50, abs=25) for part in parts[1:])
    # Neither what they say nor which others there are moves a document.
    fewer = hold_out({name: text + "." for name, text in files.items() if name != "7.txt"}, count)
    assert [[text.rstrip(".") for text in part] for part in fewer] == [
        [text for text in part if text != "text 7"] for part in parts
    ]


TEXTS = {
    "lines": "a line of some words\n" * 500,
    "few lines": "\n".join(["some words " * 400] * 3),
    "one line": "some words " * 800,
    "no white space": "ACGT" * 2000,
    "Chinese": "".join(random.Random(0).choices("漢字文仮名", k=6000)),
    "beyond 16 bits": "🙂" * 3000,
    "combining": "e\u0301\u0323" * 2000,
    "short": "ACGT" * (MIN_CHARACTERS // 4),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_text_is_cut_near_its_end_wherever_it_can_be(name, count):
    text = TEXTS[name]
    parts = [part for (part,) in hold_out({"a.txt": text}, count)]
    assert "".join(parts) == text
    for part in parts[1:]:
        assert len(part) == pytest.approx(0.05 * len(text), rel=0.55)
    for part in parts[:-1]:
        if name == "lines":
            assert part.endswith("\n")
        elif name in ("few lines", "one line"):
            assert part[-1].isspace()
    assert all(part[0] == "e" for part in parts if name == "combining")


def test_two_documents_are_both_cut():
    parts = hold_out({"a.txt": "a" * 1000, "b.txt": "b" * 2000}, 2)
    assert parts == [["a" * 900, "b" * 1800], ["a" * 50, "b" * 100], ["a" * 50, "b" * 100]]
    # One that is too short for that stays whole.
    assert hold_out({"a.txt": "a" * 1000, "b.txt": "b"}, 1) == [["a" * 950, "b"], ["a" * 50]]


@pytest.mark.parametrize("text", ["a" * (MIN_CHARACTERS - 1), "a" * 200 + " " * 100])
def test_a_text_without_enough_to_hold_out_is_told_apart(text):
    assert hold_out({"a.txt": text}, 2) is None
    assert hold_out({"a.txt": text}, 0) == [[text]]
