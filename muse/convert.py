"""Stage 3 from a trained stage 2: what both have is kept, and what is new adds nothing at first.

python -m muse.convert outputs/train/stage2-tiny/2026-01-31_12-00-00-123 stage=3 stage.koopman=add
python train.py train.init=outputs/train/stage2-tiny/2026-01-31_12-00-00-123/stage3.safetensors
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from muse.commands import Parser, device_of, run_command
from muse.config import STAGE_3_PARTS, StageConfig
from muse.errors import ConfigError
from muse.evaluate import evaluate_tokens, tokens_of_split
from muse.export import write_exported
from muse.launch.bench import composed_stage
from muse.layers import ComplexAttention, KoopmanOperator
from muse.layers.mera import MeraRouter
from muse.models import build_model
from muse.models.hamiltonian import HamiltonianBlock
from muse.models.integrated import IntegratedBlock
from muse.runs.checkpoints import find_weights, finished_steps
from muse.runs.folder import run_of
from muse.runs.options import stored_options
from muse.trained import EXPORTED, Trained, load

FILE = f"stage3{EXPORTED}"


def main() -> None:
    """The command."""
    parser = Parser("muse.convert", __doc__)
    parser.add_argument(
        "model", metavar="RUN|FILE", type=Path, help="folder of a run of stage 2, or a file of muse.export"
    )
    parser.add_argument(
        "options", nargs="+", help="stage=3, and options of what it adds, e.g. stage.koopman=add"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar=f"FILE{EXPORTED}",
        help=f"what to write, as muse.export does ({FILE} in the folder of the run)",
    )
    parser.add_argument("--which", choices=("best", "last"), default="best", help="which checkpoint (best)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    run_command(lambda: _command(parser.parse_args()))


def _command(arguments: argparse.Namespace) -> None:
    output: Path | None = arguments.output
    if output is not None and output.suffix != EXPORTED:
        raise ConfigError(f"--output {output} is not a name for weights; give one that ends in {EXPORTED}")
    trained = load(arguments.model, arguments.which, device_of(arguments.device))
    made = converted(trained, stage_3(trained.config.stage, arguments.options))
    weights = find_weights(arguments.model, arguments.which)
    assert weights is not None
    if output is None:
        exported = weights.suffix == EXPORTED
        output = (arguments.model.parent if exported else run_of(arguments.model)) / FILE
    if output.resolve() == arguments.model.resolve():
        raise ConfigError(f"--output {output} is the file of stage 2; give another one")
    options = {**stored_options(arguments.model), "stage": dataclasses.asdict(made.config.stage)}
    try:
        tokens, counts = tokens_of_split(trained, "valid")
    except ConfigError as error:
        print(f"what the change costs cannot be told: {error}")
    else:
        limit = trained.config.train.eval_tokens
        losses = [evaluate_tokens(one, tokens, counts, limit=limit).loss for one in (trained, made)]
        print(f"validation loss before the first step: stage 2 {losses[0]:.4f}, stage 3 {losses[1]:.4f}")
    write_exported(output, made.model, options, finished_steps(weights), made.tokenizer)
    data = trained.config.data
    told = [f"train.init={output}", f"data={data.name}", *([f"data.path={data.path}"] if data.path else [])]
    print(f"stage 3 is in {output}; go on with python train.py {shlex.join(told)}")


def stage_3(stage: StageConfig, options: list[str]) -> StageConfig:
    """The options of a run of stage 2 with what stage 3 adds, as its file and a command have it.

    Args:
        stage: of the run.
        options: ``stage=3`` and such as ``stage.koopman=add``.

    Raises:
        ConfigError: the run is not of stage 2, or an option is not of what stage 3 adds.
    """
    if stage.number != "2":
        raise ConfigError(f"the run is of stage {stage.number}; muse.convert makes stage 3 of stage 2")
    given = dict(option.partition("=")[::2] for option in options)
    if given.pop("stage", None) != "3":
        raise ConfigError("muse.convert makes stage 3 of stage 2; give stage=3")
    # The parts and options of theirs; all others stay those of the run.
    added = [name for name in OmegaConf.structured(StageConfig) if name.startswith(tuple(STAGE_3_PARTS))]
    file = composed_stage("3")
    values: dict[str, Any] = {name: getattr(file, name) for name in added}
    for name, value in given.items():
        if name.removeprefix("stage.") not in added or not name.startswith("stage."):
            known = ", ".join(f"stage.{one}" for one in added)
            raise ConfigError(f"{name}={value} is not of what stage 3 adds; give some of {known}")
        try:
            values[name.removeprefix("stage.")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{name}={value} cannot be read") from error
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(dataclasses.replace(stage, number="3")), OmegaConf.create(values)
        )
        return cast(StageConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"stage.{error.full_key} has a value that it cannot have: {reason}") from error


def converted(trained: Trained, stage: StageConfig) -> Trained:
    """A model of stage 3 with the weights of one of stage 2.

    Operators and routers give 0 at the start, until their output maps have learned: beside attention they
    change nothing, and a block whose attention one of them replaces mixes no tokens. An antithesis begins as
    0 by itself.

    Args:
        trained: of stage 2.
        stage: of ``stage_3``.
    """
    config, old = trained.config, trained.model
    model = build_model(stage, config.model, len(old.head_parameters()[0]), config.seed)
    model.to(next(old.parameters()).device)
    for block, former in zip(model.blocks, old.blocks, strict=True):
        assert isinstance(block, IntegratedBlock)
        assert isinstance(former, HamiltonianBlock)
        _copy(former.attention_norm, block.mixer_norm)
        _copy(former.flow_norm, block.flow_norm)
        _copy(former.flow, block.flow)
        for part in block.mixer.modules():
            if isinstance(part, ComplexAttention):
                _copy(former.attention, part)
            elif isinstance(part, KoopmanOperator | MeraRouter):
                nn.init.zeros_(part.output.weight)
    rest = {name: tensor for name, tensor in old.state_dict().items() if not name.startswith("blocks.")}
    model.load_state_dict({**model.state_dict(), **rest})
    return trained._replace(model=model.eval(), config=dataclasses.replace(config, stage=stage))


def _copy(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict())


if __name__ == "__main__":
    main()
