"""Go on with a text by a trained model, token by token.

python -m muse.generate outputs/train/stage1-tiny/2026-01-31_12-00-00-123 --prompt "The river"
python -m muse.generate stage1.safetensors --file chapter.txt --tokens 500 --top-p 0.95
python -m muse.generate stage2.safetensors --prompt "The river" --trajectory energy.png
python -m muse.generate stage2.safetensors --prompt "The river" --entropy-exit 2
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from muse.commands import Parser, add_model, device_of, run_command
from muse.dynamics import flows_of, recorded_flows
from muse.dynamics.energy import DRIFT_TARGET, energies_by_halves, halves
from muse.errors import ConfigError
from muse.generation import EntropyExit, Sampling, TextStream, continuation
from muse.generation.entropy_exit import block_count, check_exits
from muse.report.trajectory_plot import plot_trajectories
from muse.trained import Trained, load

SIZES = (
    ("--temperature", float, "divides the logits; 0 takes the likeliest token"),
    ("--top-k", int, "only the so many likeliest tokens; 0 for all"),
    ("--top-p", float, "only the likeliest tokens that together have this probability"),
    ("--min-p", float, "only tokens with at least this share of the likeliest one's probability"),
    ("--repetition-penalty", float, "divides positive logits of tokens that were there"),
)


def main() -> None:
    """The command."""
    parser = Parser("muse.generate", __doc__)
    add_model(parser)
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", help="the text to go on with")
    text.add_argument("--file", help="a file with that text; - for standard input")
    parser.add_argument("--tokens", type=int, default=128, help="to generate (128)")
    for name, kind, meaning in SIZES:
        default = getattr(Sampling, name[2:].replace("-", "_"))
        parser.add_argument(name, type=kind, default=default, help=f"{meaning} ({default:g})")
    parser.add_argument("--greedy", action="store_true", help="as --temperature 0")
    parser.add_argument("--seed", type=int, default=0, help="of the first text; the next ones follow (0)")
    parser.add_argument("--stop", action="append", default=[], help="a text that ends it; may be repeated")
    parser.add_argument("--count", type=int, default=1, help="texts (1)")
    parser.add_argument(
        "--entropy-exit",
        type=float,
        metavar="NATS",
        help="a token leaves out the other blocks once the entropy of its distribution is below that",
    )
    parser.add_argument(
        "--exit-after", type=int, metavar="BLOCKS", help="that every token passes with --entropy-exit (1)"
    )
    parser.add_argument(
        "--trajectory",
        type=Path,
        metavar="FILE.png",
        help="of stages 2 and 3, draw the energy of each token along the flows",
    )
    run_command(lambda: generate(parser.parse_args()))


def generate(arguments: argparse.Namespace) -> None:
    """Print texts as they come; how fast is told on standard error.

    Raises:
        ConfigError: an argument is not allowed, or the model cannot be used.
        RunError: the model is damaged, or its logits are not finite.
    """
    for name, least in (("tokens", 1), ("count", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            given = getattr(arguments, name)
            raise ConfigError(f"--{name} {given} is too small; it must be at least {least}")
    sampling = Sampling(
        0.0 if arguments.greedy else arguments.temperature,
        arguments.top_k,
        arguments.top_p,
        arguments.min_p,
        arguments.repetition_penalty,
    )
    prompt = _prompt(arguments)
    if prompt is None and not sys.stdin.isatty():
        raise ConfigError("there is no text to go on with; give --prompt TEXT, --file FILE or --file -")
    picture: Path | None = arguments.trajectory
    if picture is not None and picture.suffix != ".png":
        raise ConfigError(f"--trajectory {picture} is not a name for a picture; give one that ends in .png")
    if picture is not None and (prompt is None or arguments.count > 1):
        raise ConfigError("--trajectory draws one text; give --prompt or --file, and no --count")
    exits = None
    if arguments.entropy_exit is not None:
        exits = EntropyExit(
            arguments.entropy_exit, 1 if arguments.exit_after is None else arguments.exit_after
        )
        if picture is not None:
            raise ConfigError(
                "--trajectory draws all flows of a token, of which --entropy-exit leaves some out; "
                "give one of them"
            )
    elif arguments.exit_after is not None:
        raise ConfigError("--exit-after is of --entropy-exit; give both")
    trained = load(arguments.model, arguments.which, device_of(arguments.device))
    if exits is not None:
        check_exits(trained.model, exits)
    if picture is not None:
        _see_that_it_can_be_drawn(trained, picture)
    if prompt is not None:
        _tell_of_window(trained, prompt, arguments.tokens)
        if picture is None:
            _continue(trained, prompt, sampling, arguments, exits)
            return
        with recorded_flows(trained.model) as starts:
            _continue(trained, prompt, sampling, arguments, exits)
        _draw(trained, starts, picture)
        return
    print("a text to go on with, or Ctrl-D to end", file=sys.stderr)
    for line in _lines():
        try:
            _continue(trained, line, sampling, arguments, exits)
        except KeyboardInterrupt:
            print(file=sys.stderr)


def generate_text(
    trained: Trained,
    prompt: str,
    tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int = 0,
    stops: Sequence[str] = (),
    exits: EntropyExit | None = None,
) -> Iterator[str]:
    """Yield the text that follows ``prompt``, a piece for each token, empty where it ends no character.

    Args:
        trained: of ``muse.load``.
        prompt: text to go on with, at least a token.
        tokens: to generate at most.
        sampling: how a token is drawn; as ``Sampling()`` if None.
        seed: of the draw.
        stops: texts that end it, and are not in it.
        exits: where a token may leave out the last blocks; None for nowhere.

    Raises:
        ConfigError: there is no tokenizer, no token in the prompt, or blocks that cannot be left out.
        RunError: a logit is not finite.
    """
    tokenizer, seq_len = trained.tokenizer, trained.config.model.seq_len
    if tokenizer is None:
        raise ConfigError("the model has no tokenizer, without which there is no text")
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ConfigError("the text to go on with has no token in it; give at least a word")
    stream = TextStream(tokenizer, stops)
    drawn = continuation(trained.model, ids, tokens, seq_len, sampling or Sampling(), seed, exits)
    for number, token in enumerate(drawn):
        text = stream.push(token)
        ended = stream.stopped or number == tokens - 1
        yield text + (stream.end() if ended else "")
        if stream.stopped:
            return


def _prompt(arguments: argparse.Namespace) -> str | None:
    """The text that a command names; None where it names none."""
    if arguments.file is None:
        text: str | None = arguments.prompt
    elif arguments.file == "-":
        text = sys.stdin.read()
    else:
        try:
            text = Path(arguments.file).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise ConfigError(f"--file {arguments.file} cannot be read: {error}") from error
    if text == "":
        raise ConfigError("the text to go on with is empty; give at least a character")
    return text


def _tell_of_window(trained: Trained, prompt: str, tokens: int) -> None:
    seq_len = trained.config.model.seq_len
    count = len(trained.tokenizer.encode(prompt)) if trained.tokenizer is not None else 0
    if count + tokens > seq_len:
        print(
            f"the model sees {seq_len} tokens at a time: of the {count} of the prompt and {tokens} to come "
            "the oldest are forgotten as its window slides",
            file=sys.stderr,
        )


def _see_that_it_can_be_drawn(trained: Trained, picture: Path) -> None:
    """Before the text is there, which would be lost.

    Raises:
        ConfigError: the model has no flow, or the file cannot be written.
    """
    if not flows_of(trained.model):
        number = trained.config.stage.number
        raise ConfigError(
            f"--trajectory draws the energy along Hamiltonian flows, and stage={number} has none; "
            "give a model of stage=2 or 3"
        )
    try:
        if picture.is_dir():
            raise IsADirectoryError("it is a folder")
        picture.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=picture.parent):
            pass
    except OSError as error:
        raise _cannot_be_written(picture, error) from error


def _draw(trained: Trained, starts: dict[str, list[Tensor]], picture: Path) -> None:
    """Draw the energies of the states that ``recorded_flows`` kept.

    Raises:
        ConfigError: the file cannot be written.
    """
    stage, loops = trained.config.stage, trained.model.loops
    energies = {}
    for flow in flows_of(trained.model):
        for loop in range(loops):
            # Of each token every loop in turn.
            q, p = torch.stack(starts[flow.name][loop::loops]).unbind(1)
            name = flow.name.replace("blocks.", "block ").replace(".flow.", ", flow ")
            name += f", loop {loop}" if loops > 1 else ""
            energies[name] = energies_by_halves(flow, q, p).cpu().numpy()
    names = [name for name, _ in halves(stage.integrator, stage.dt)]
    limit = f"{DRIFT_TARGET:g}, what benchmark=energy allows in steps of 0.1", DRIFT_TARGET
    try:
        plot_trajectories(
            picture,
            energies,
            names,
            stage.dt,
            limit,
            "how far the energy of each generated token moves along its flows",
        )
    except OSError as error:
        raise _cannot_be_written(picture, error) from error
    print(f"the energy along the flows is in {picture}", file=sys.stderr)


def _cannot_be_written(picture: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--trajectory {picture} cannot be written: {error.strerror or error}")


def _lines() -> Iterator[str]:
    """What a person types, until there is no more."""
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if line:
            yield line


def _continue(
    trained: Trained,
    prompt: str,
    sampling: Sampling,
    arguments: argparse.Namespace,
    exits: EntropyExit | None,
) -> None:
    if exits is not None:
        exits.passed.clear()
    made, began = 0, time.perf_counter()
    for number in range(arguments.count):
        if number:
            print("\n---")
        seed = arguments.seed + number
        for text in generate_text(trained, prompt, arguments.tokens, sampling, seed, arguments.stop, exits):
            made += 1
            print(text, end="", flush=True)
    seconds = time.perf_counter() - began
    print(flush=True)
    told = f"{made} tokens in {seconds:.1f} s, {made / seconds:.0f} tokens/s"
    if exits is not None and exits.passed:
        told += f", {exits.mean_passed:.2f} of {block_count(trained.model)} blocks a token"
    print(told, file=sys.stderr)


if __name__ == "__main__":
    main()
