import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.commands import run_here
from support.trained import make_trained

import muse
from muse.data import load_tokens
from muse.evaluate import tokens_of_files
from muse.training.evaluate import evaluate


@pytest.fixture(scope="module", params=["0", "2"])
def run(request, tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("trained"), request.param)[0]


@pytest.fixture
def command(capsys):
    """Status, standard output and standard error of the command."""

    def measure(*arguments):
        status = run_here("muse.evaluate", list(map(str, arguments)))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return measure


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("stride", [None, 5])
def test_a_split_has_the_figures_of_its_training(run, command, split, stride, tmp_path):
    options = ["--stride", stride] if stride else []
    file = tmp_path / "result.json"
    status, out, err = command(run, "--split", split, *options, "--json", file)
    assert status == 0, err
    model, _, config = muse.load(run)
    data = load_tokens(config.data, config.tokenizer, config.model.vocab_size)
    wanted = evaluate(model, getattr(data, split), data.counts[split], config.model.seq_len, 16, stride)
    found = json.loads(file.read_text())
    for key in ("loss", "ppl", "word_ppl", "bits_per_byte", "tokens"):
        assert found[key] == getattr(wanted, key)
    assert f"{wanted.ppl:.4g}" in out


def test_the_loss_of_a_file_is_that_of_its_tokens_one_by_one(run, command, tmp_path):
    text = "Line 7 says\n    that 49 is the square of 7.\nand naïve 你好 too\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_text("Line 8", encoding="utf-8")
    status, out, err = command(run, "--text", tmp_path / "a.txt", tmp_path / "b.txt", "--json", "-")
    assert status == 0, err
    found = json.loads(out)
    model, tokenizer, config = muse.load(run)
    tokens = [*tokenizer.encode(text), tokenizer.end_id, *tokenizer.encode("Line 8"), tokenizer.end_id]
    length, total = config.model.seq_len, 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, length):
            window = torch.tensor(tokens[start : start + length + 1])
            total += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    assert found["tokens"] == len(tokens) - 1
    assert found["loss"] == pytest.approx(total / (len(tokens) - 1), rel=1e-5)
    size = len(text.encode()) + len(b"Line 8")
    assert found["bytes"] == size
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)


def test_a_file_of_text_has_the_tokens_of_a_split(run):
    _, tokenizer, config = muse.load(run)
    tokens, counts = tokens_of_files(tokenizer, [Path(config.data.path)])
    data = load_tokens(config.data, config.tokenizer, config.model.vocab_size)
    assert counts.tokens == len(tokens)
    splits = np.concatenate([data.train, data.valid, data.test])
    # A file that is cut into splits has three ends.
    assert len(splits) - 4 <= len(tokens) <= len(splits)


def test_a_text_that_has_changed_is_no_split_of_the_model(tmp_path, command):
    run, config, _ = make_trained(tmp_path)
    with open(config.data.path, "a", encoding="utf-8") as file:
        file.write("zebra zebra zebra quagga quagga quagga\n" * 50)
    status, out, err = command(run)
    assert status == 1
    assert "makes another tokenizer than the model's" in err
    assert out == "" or "Traceback" not in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--text", "nowhere.txt"], "--text nowhere.txt is not readable"),
        (["--stride", "0"], "--stride 0 is not allowed"),
        (["--stride", "17"], "must be between 1 and the 16 tokens"),
        (["--stride", "x"], "argument --stride: invalid int value"),
        (["--batch-size", "0"], "--batch-size 0 is too small"),
        (["--split", "train"], "invalid choice: 'train'"),
        (["--json", "/proc/nowhere/x.json"], "--json /proc/nowhere/x.json cannot be written"),
    ],
)
def test_bad_arguments_are_one_sentence(run, command, arguments, told, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    status, _, err = command(run, *arguments)
    assert status == 1
    assert told in err
    assert err.strip().splitlines()[-1].startswith("error: ")
