import gzip
import io
import json
import math
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from datasets import load_dataset
from support.processes import ROOT
from support.trained import make_trained

import muse
from muse.data import load_tokens
from muse.data.reading import read_text
from muse.evaluate import tokens_of_files
from muse.training.evaluate import evaluate
from muse.transformers_folder import export_transformers

# Where transformers keeps the code of a folder; of each process for itself, and not the user's.
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp())


@pytest.fixture(scope="module", params=["0", "2"])
def run(request, tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("trained"), request.param)[0]


@pytest.fixture
def command(told_by):
    return partial(told_by, "muse.evaluate")


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


def test_each_of_several_sets_has_the_figures_that_it_has_alone(run, command, tmp_path):
    texts = [f"Line {n} says\n    that {n * n} is the square of {n}.\n" for n in range(20)]
    (tmp_path / "a.txt").write_text("".join(texts), encoding="utf-8")
    records = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(records.encode()))
    for options in ([], ["--stride", "5"], ["--rolling"]):
        status, out, err = command(
            run,
            "--set",
            f"a={tmp_path / 'a.txt'}",
            "--set",
            f"b={tmp_path / 'b.json.gz'}",
            *options,
            "--json",
            "-",
        )
        assert status == 0, err
        found = json.loads(out)
        assert list(found["sets"]) == ["a", "b"]
        for name, file in (("a", "a.txt"), ("b", "b.json.gz")):
            alone = json.loads(command(run, "--text", tmp_path / file, *options, "--json", "-")[1])
            assert found["sets"][name].items() <= alone.items()
        # A text of each record, with an end of its own.
        assert found["sets"]["a"]["bytes"] == found["sets"]["b"]["bytes"]
        assert (found["sets"]["b"]["tokens"] == found["sets"]["a"]["tokens"] + 19) == (
            "--rolling" not in options
        )


def rolling_windows(tokens, prefix, length):
    """Inputs and targets of the lm-evaluation-harness (get_rolling_token_windows with a context of 1)."""
    yield [prefix, *tokens[: min(length, len(tokens)) - 1]], tokens[:length]
    for done in range(length, len(tokens), length):
        end = min(done + length, len(tokens))
        yield tokens[end - length - 1 : end - 1], tokens[done:end]


@pytest.mark.parametrize(
    "options", [{"stage": "0"}, {"stage": "1", "precision": "bf16"}, {"stage": "2"}], ids=str
)
def test_rolling_has_the_bits_per_byte_of_the_harness_through_transformers(options, command, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the extra interop is not installed")
    run, *_ = make_trained(tmp_path, **options)
    found = muse.load(run)
    export_transformers(found, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    # Below a window, and some windows with a rest.
    texts = ["7", "Line 7 says\n    that 49 is the square of 7.\nand naïve 你好 too\n" * 3]
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    total, predicted = 0.0, 0
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
        length = tokenizer.model_max_length
        tokens = tokenizer.encode(text)
        assert text == "7" or len(tokens) > 2 * length + 1
        assert len(tokens) % length
        with torch.no_grad():
            for inputs, targets in rolling_windows(tokens, tokenizer.eos_token_id, length):
                logits = model(torch.tensor([inputs])).logits[0, -len(targets) :]
                total += F.cross_entropy(logits, torch.tensor(targets), reduction="sum").item()
                predicted += len(targets)
    size = sum(len(text.encode()) for text in texts)
    result = tmp_path / "result.json"
    status, _, err = command(run, "--text", *files, "--rolling", "--float32", "--json", result)
    assert status == 0, err
    figures = json.loads(result.read_text())
    assert figures["rolling"]
    assert figures["bytes"] == size
    assert figures["tokens"] == predicted
    assert figures["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=2e-6)


def test_the_task_file_of_the_docs_reads_a_file_as_text_of_muse(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    task = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    assert task["output_type"] == "loglikelihood_rolling"
    monkeypatch.chdir(tmp_path)
    file = Path(task["dataset_kwargs"]["data_files"]["test"])
    file.parent.mkdir()
    file.write_bytes("Line 1\r\n\n  [你好]  \n\nLine 4\n".encode())
    options = {**task["dataset_kwargs"], "cache_dir": str(tmp_path / "cache")}
    (document,) = load_dataset(task["dataset_path"], **options)[task["test_split"]]
    assert document[task["doc_to_target"]] == read_text(file)


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
        (["--rolling"], "--rolling needs documents; give files with --text or --set"),
        (["--set", "a"], "--set a must be NAME=FILE"),
        (["--set", "a=x", "--set", "a=y"], "--set a=y must be NAME=FILE, with a name of its own"),
        (["--set", "a=nowhere.jsonl"], "--set a nowhere.jsonl is not readable"),
        (["--set", "a=x", "--text", "y"], "not allowed with argument"),
        (["--rolling", "--text", "nowhere.txt"], "--text nowhere.txt is not readable"),
        (["--rolling", "--stride", "4"], "not allowed with argument"),
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
