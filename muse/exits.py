"""What it costs and saves to let tokens leave early: tokens a second and perplexity by the threshold.

python -m muse.exits outputs/train/stage2-tiny/2026-01-31_12-00-00-123
python -m muse.exits stage2.safetensors --text chapter.txt --thresholds 1 2 4 --exit-after 2 --tokens 10000

Every token of the text is read by itself, as ``muse.generate`` reads those that it has drawn, whatever would
have been drawn in its place.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from torch import Tensor

from muse.commands import Parser, add_model, device_of, run_command
from muse.data import evaluation_batches
from muse.errors import ConfigError
from muse.evaluate import tokens_of_files, tokens_of_split
from muse.generation.decoder import Decoder
from muse.generation.entropy_exit import EntropyExit, block_count, check_exits
from muse.report.table import table
from muse.trained import Trained, load
from muse.training.evaluate import perplexity

THRESHOLDS = (1.0, 2.0, 3.0, 4.0, 5.0)


class Measured(NamedTuple):
    """What one way to decode gave.

    Attributes:
        blocks: that a token passed on average.
        tokens_per_second: median over the windows.
        ppl: perplexity per token.
    """

    blocks: float
    tokens_per_second: float
    ppl: float


def main() -> None:
    """The command."""
    parser = Parser("muse.exits", __doc__)
    add_model(parser)
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--split", choices=("valid", "test"), default="valid", help="of the text it was trained on (valid)"
    )
    text.add_argument("--text", nargs="+", metavar="FILE", help="other text, in UTF-8; a document each")
    parser.add_argument(
        "--thresholds",
        nargs="+",
        type=float,
        metavar="NATS",
        default=THRESHOLDS,
        help=f"as --entropy-exit of muse.generate ({' '.join(f'{value:g}' for value in THRESHOLDS)})",
    )
    parser.add_argument("--exit-after", type=int, default=1, metavar="BLOCKS", help="that all pass (1)")
    parser.add_argument(
        "--tokens", type=int, default=4096, help="of the text, in windows spread evenly over it (4096)"
    )
    run_command(lambda: _command(parser.parse_args()))


def _command(arguments: argparse.Namespace) -> None:
    if arguments.tokens < 1:
        raise ConfigError(f"--tokens {arguments.tokens} is too small; it must be at least 1")
    ways = [EntropyExit(below, arguments.exit_after) for below in arguments.thresholds]
    trained = load(arguments.model, arguments.which, device_of(arguments.device))
    check_exits(trained.model, ways[0])
    if trained.tokenizer is None:
        raise ConfigError(f"{arguments.model} has no tokenizer, without which there are no tokens")
    if arguments.text:
        tokens, _ = tokens_of_files(trained.tokenizer, [Path(name) for name in arguments.text])
    else:
        tokens, _ = tokens_of_split(trained, arguments.split)
    whole, *others = measure_exits(trained, tokens, ways, arguments.tokens)
    rows = [
        (
            name,
            found.blocks,
            found.tokens_per_second,
            found.tokens_per_second / whole.tokens_per_second,
            found.ppl,
        )
        for name, found in zip(
            ["none", *map("{:g}".format, arguments.thresholds)], [whole, *others], strict=True
        )
    ]
    print(table(("threshold [nats]", "blocks a token", "tokens/s", "of all blocks", "perplexity"), rows))


def measure_exits(
    trained: Trained, tokens: np.ndarray, ways: Sequence[EntropyExit], limit: int
) -> list[Measured]:
    """Read the same windows through all blocks and by each of the ways, in turns.

    Args:
        trained: that ``check_exits`` allows.
        tokens: of a text, (tokens,).
        ways: to leave early.
        limit: tokens to read, in windows spread evenly over the text.

    Returns:
        Of all blocks first, then of each way.
    """
    seq_len = trained.config.model.seq_len
    every = [None, *ways]
    losses: list[list[float]] = [[] for _ in every]
    speeds: list[list[float]] = [[] for _ in every]
    for inputs, targets, counted in evaluation_batches(tokens, seq_len, 1, limit=limit):
        count = int(counted.sum())
        for way, loss, speed in zip(every, losses, speeds, strict=True):
            seconds, own = _read(Decoder(trained.model, seq_len, way), inputs[0, :count], targets[0, :count])
            loss += own
            speed.append(count / seconds)
    blocks = [float(block_count(trained.model)), *(way.mean_passed for way in ways)]
    return [
        Measured(passed, median(speed), perplexity(sum(loss) / len(loss)))
        for passed, loss, speed in zip(blocks, losses, speeds, strict=True)
    ]


def _read(decoder: Decoder, inputs: Tensor, targets: Tensor) -> tuple[float, list[float]]:
    """Seconds to read tokens one by one, and the losses of those that follow them."""
    began = time.perf_counter()
    logits = [decoder.read([token]) for token in inputs.tolist()]
    seconds = time.perf_counter() - began
    wanted = targets.tolist()
    return seconds, [-float(own.log_softmax(-1)[w]) for own, w in zip(logits, wanted, strict=True)]


if __name__ == "__main__":
    main()
