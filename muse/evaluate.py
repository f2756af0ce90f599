"""Perplexity per token and word, and bits per byte, of a trained model, by the protocol of train.py.

python -m muse.evaluate outputs/train/stage1-tiny/2026-01-31_12-00-00-123 --split test
python -m muse.evaluate stage1.safetensors --text chapter.txt notes.txt --stride 32 --json result.json
python -m muse.evaluate stage1.safetensors --text chapter.txt --rolling --float32
python -m muse.evaluate stage1.safetensors --set ptb=ptb.test.txt --set c4=c4-validation.json.gz
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from muse.commands import Parser, add_model, device_of, run_command
from muse.data import Counts, load_tokens
from muse.data.evaluation_sets import counts_of, read_documents, tokens_of_files
from muse.errors import ConfigError
from muse.files import finite, write_json
from muse.hardware import autocast_dtype
from muse.trained import Trained, load
from muse.training.evaluate import Evaluation, evaluate, evaluate_rolling, evaluation_table

WINDOWS = 16


def main() -> None:
    """The command."""
    parser = Parser("muse.evaluate", __doc__)
    add_model(parser)
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--split", choices=("valid", "test"), default="valid", help="of the text it was trained on (valid)"
    )
    text.add_argument(
        "--text", nargs="+", metavar="FILE", help="other text, in UTF-8; a document each, or records"
    )
    text.add_argument(
        "--set",
        action="append",
        metavar="NAME=FILE",
        help="one of several evaluation sets, of which each has figures of its own",
    )
    windows = parser.add_mutually_exclusive_group()
    windows.add_argument("--stride", type=int, help="tokens that the window moves by (no overlap)")
    windows.add_argument(
        "--rolling",
        action="store_true",
        help="each document from an end token on, but not its end, as the lm-evaluation-harness has it",
    )
    parser.add_argument(
        "--float32", action="store_true", help="compute in float32, as an export does (the model's precision)"
    )
    parser.add_argument("--batch-size", type=int, default=WINDOWS, help=f"windows at a time ({WINDOWS})")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too; - prints nothing else")
    run_command(lambda: _command(parser.parse_args()))


def _command(arguments: argparse.Namespace) -> None:
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size {arguments.batch_size} is too small; it must be at least 1")
    if arguments.json == "-":
        # Whatever else says something on the way.
        shown, sys.stdout = sys.stdout, sys.stderr
    if arguments.rolling and not (arguments.text or arguments.set):
        raise ConfigError("--rolling needs documents; give files with --text or --set")
    sets = _sets(arguments.set or ())
    trained = load(arguments.model, arguments.which, device_of(arguments.device))
    if arguments.float32:
        trained = in_float32(trained)
    seq_len = trained.config.model.seq_len
    stride = arguments.stride
    if stride is not None and not 1 <= stride <= seq_len:
        raise ConfigError(
            f"--stride {stride} is not allowed; it must be between 1 and the {seq_len} tokens of a window"
        )
    if trained.tokenizer is None:
        raise ConfigError(f"{arguments.model} has no tokenizer, without which there are no tokens")
    texts = sets or {", ".join(arguments.text or [arguments.split]): list(map(Path, arguments.text or ()))}
    found: dict[str, Evaluation] = {}
    sizes: dict[str, int | None] = {}
    for name, paths in texts.items():
        option = f"--set {name}" if sets else "--text"
        if arguments.rolling:
            found[name], counts = evaluate_files_rolling(trained, paths, arguments.batch_size, option)
        else:
            tokens, counts = (
                tokens_of_files(trained.tokenizer, paths, option)
                if paths
                else tokens_of_split(trained, arguments.split)
            )
            found[name] = evaluate_tokens(trained, tokens, counts, stride, arguments.batch_size)
        sizes[name] = counts.bytes
    own = {name: {"bytes": sizes[name], **dataclasses.asdict(found[name])} for name in found}
    figures = {
        "model": str(arguments.model),
        **({} if sets else {"text": next(iter(own))}),
        "seq_len": seq_len,
        "stride": stride or seq_len,
        "rolling": arguments.rolling,
        **({"sets": own} if sets else next(iter(own.values()))),
    }
    if arguments.json == "-":
        sys.stdout = shown
        print(json.dumps(finite(figures), indent=2))
        return
    if arguments.json:
        try:
            write_json(Path(arguments.json), figures)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"--json {arguments.json} cannot be written: {reason}") from error
    print(evaluation_table(found, "set" if sets else "text"))
    for name, evaluation in found.items():
        if evaluation.word_ppl_reason:
            of = f" of {name}" if sets else ""
            print(f"no perplexity per word{of}: {evaluation.word_ppl_reason}")


def _sets(given: Sequence[str]) -> dict[str, list[Path]]:
    """The files of ``--set NAME=FILE`` by name."""
    sets: dict[str, list[Path]] = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not (name and equals and file) or name in sets:
            raise ConfigError(f"--set {text} must be NAME=FILE, with a name of its own")
        sets[name] = [Path(file)]
    return sets


def evaluate_tokens(
    trained: Trained,
    tokens: np.ndarray,
    counts: Counts,
    stride: int | None = None,
    windows: int = WINDOWS,
    limit: int = 0,
) -> Evaluation:
    """Evaluate a trained model on a stream of tokens, as its training evaluated a split.

    Args:
        trained: of ``muse.load``.
        tokens: (tokens,).
        counts: words and bytes of their text.
        stride: tokens that the window moves by; None for no overlap.
        windows: at a time.
        limit: tokens to evaluate, in windows spread evenly over the stream; 0 for all.
    """
    precision: torch.dtype | None = autocast_dtype(trained.config.stage.precision)
    seq_len = trained.config.model.seq_len
    return evaluate(trained.model, tokens, counts, seq_len, windows, stride, limit, precision)


def evaluate_files_rolling(
    trained: Trained, paths: list[Path], windows: int = WINDOWS, option: str = "--text"
) -> tuple[Evaluation, Counts]:
    """Evaluate files of text, each by itself, as ``loglikelihood_rolling`` of the lm-evaluation-harness does.

    The first token of a file is predicted from an end token, and no end is predicted after the last one.

    Args:
        trained: of ``muse.load``, with a tokenizer.
        paths: of the files, see ``muse.data.evaluation_sets``.
        windows: at a time.
        option: that gave them.

    Raises:
        ConfigError: a file cannot be read.
    """
    tokenizer = trained.tokenizer
    assert tokenizer is not None
    texts = read_documents(paths, option)
    documents = [np.array(tokenizer.encode(text), np.uint32) for text in texts]
    counts = counts_of(sum(map(len, documents)), texts)
    precision = autocast_dtype(trained.config.stage.precision)
    seq_len, prefix = trained.config.model.seq_len, tokenizer.end_id
    return evaluate_rolling(trained.model, documents, counts, prefix, seq_len, windows, precision), counts


def in_float32(trained: Trained) -> Trained:
    """The model with parameters and activations in float32, whatever it was trained in."""
    stage = dataclasses.replace(trained.config.stage, precision="fp32")
    config = dataclasses.replace(trained.config, stage=stage)
    return trained._replace(model=trained.model.float(), config=config)


def tokens_of_split(trained: Trained, split: str) -> tuple[np.ndarray, Counts]:
    """A split of the text that a model was trained on.

    Raises:
        ConfigError: the text is not there any more, or is another one.
    """
    config = trained.config
    data = load_tokens(config.data, config.tokenizer, config.model.vocab_size)
    own, of_text = trained.tokenizer, data.tokenizer
    if own is None or of_text is None or own.to_json() != of_text.to_json():
        raise ConfigError(
            f"the text of data={config.data.name} makes another tokenizer than the model's, so it has "
            "changed since the training; give the text with --text"
        )
    return getattr(data, split), data.counts[split]


if __name__ == "__main__":
    main()
