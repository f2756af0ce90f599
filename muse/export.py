"""One file with the weights of a run, its tokenizer and its configuration, or a folder for transformers.

python -m muse.export outputs/train/stage1-tiny/2026-01-31_12-00-00-123 stage1.safetensors
python -m muse.export outputs/train/stage1-tiny/2026-01-31_12-00-00-123 stage1 --format transformers
python bench.py benchmark=perplexity benchmark.checkpoint=stage1.safetensors
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from muse.commands import Parser, run_command
from muse.data import Tokenizer
from muse.errors import ConfigError, RunError
from muse.files import replacement
from muse.models import LanguageModel, count_parameters
from muse.runs.checkpoints import find_damage, find_weights, load_state
from muse.runs.options import stored_options
from muse.trained import EXPORTED, TOKENIZER, Trained, load
from muse.transformers_folder import architecture, export_transformers


def export_run(run: Path, file: Path, which: str = "best") -> int:
    """Write the weights of a run's checkpoint to one file, which appears only when it is complete.

    Its metadata hold ``config`` (JSON, as in run.json), ``step`` and ``tokenizer`` (as in tokenizer.json,
    missing where the run has none): nothing else is needed to go on with a text.

    Args:
        run: folder of the run, or one of its checkpoints.
        file: ends in ``.safetensors``; one that is there is replaced.
        which: ``best`` or ``last``; a run without a best checkpoint has a last one.

    Returns:
        Finished steps of the checkpoint.

    Raises:
        ConfigError: when the folder holds no checkpoint or the file's name does not end as it should.
        RunError: when the checkpoint is damaged or the file cannot be written.
    """
    if file.suffix != EXPORTED:
        raise ConfigError(f"{file} is not a name for weights; give one that ends in .safetensors")
    checkpoint = find_weights(run, which)
    try:
        config = stored_options(run)
    except ConfigError:
        config = None
    if checkpoint is None or config is None or run.suffix == EXPORTED:
        raise ConfigError(f"{run} is not the folder of a run with a checkpoint; give one that train.py made")
    # Before anything in it is read, and to name the file that is damaged.
    damage = find_damage(checkpoint)
    if damage is not None:
        raise RunError(f"the checkpoint {checkpoint} cannot be read, it is damaged: {damage}")
    model, tokenizer, _ = load(run, which)
    step = load_state(checkpoint).step
    write_exported(file, model, config, step, tokenizer)
    return step


def write_exported(
    file: Path, model: LanguageModel, config: dict[str, Any], step: int, tokenizer: Tokenizer | None
) -> None:
    """Write such a file.

    Args:
        file: ends in ``.safetensors``; one that is there is replaced.
        model: whose weights go there.
        config: options of the run, as in run.json.
        step: finished ones.
        tokenizer: of the run; None where it has none.

    Raises:
        RunError: it cannot be written.
    """
    metadata = {"config": json.dumps(config), "step": str(step)}
    if tokenizer is not None:
        metadata[TOKENIZER] = tokenizer.to_json()
    try:
        with replacement(file) as temporary:
            save_file(model.state_dict(), temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file} could not be written: {error}") from error


def load_exported(file: Path) -> Trained:
    """``muse.load`` of a file that ``export_run`` wrote."""
    return load(file)


def main() -> None:
    """The command."""
    parser = Parser("muse.export", __doc__)
    parser.add_argument(
        "run", type=Path, help="folder of a run of train.py; of transformers also such a file"
    )
    parser.add_argument("output", type=Path, help="what to write: *.safetensors, or a folder of transformers")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="which checkpoint (best)")
    parser.add_argument(
        "--format",
        choices=("safetensors", "transformers"),
        default="safetensors",
        help="one file for MUSE, or a folder that transformers and vLLM load (safetensors)",
    )
    parser.add_argument("--force", action="store_true", help="replace a folder that has other things in it")
    run_command(lambda: _command(parser.parse_args()))


def _command(arguments: argparse.Namespace) -> None:
    if arguments.format == "safetensors":
        step = export_run(arguments.run, arguments.output, arguments.which)
        print(f"the weights after step {step} are in {arguments.output}")
        return
    trained = load(arguments.run, arguments.which)
    written = export_transformers(trained, arguments.output, arguments.force)
    print(f"{architecture(trained)} with {written:,} parameters is in {arguments.output}")
    print(
        f"the model has {count_parameters(trained.model):,}: a head that shares its rows is written apart, "
        "and a complex map as a real one of twice its numbers"
    )


if __name__ == "__main__":
    main()
