"""What a training step takes on 1 to thousands of GPUs, by formulas (docs/scaling.md).

Options of train.py choose the run; the machine is what the options below say, nothing else is assumed:

python -m muse.scaling stage=2 model=seed --windows 8 --card h200 --mfu 0.4 --network-gbs 50
"""

from __future__ import annotations

import argparse
import dataclasses

from hydra import compose, initialize_config_dir

from muse.commands import Parser, run_command
from muse.config import CONF, RunConfig, build_config
from muse.errors import ConfigError
from muse.launch.composition import prepare_hydra
from muse.report.table import table
from muse.scaling.counts import forward_flops, parameters, step_flops
from muse.scaling.memory import Memory, element_bytes
from muse.scaling.prediction import CARDS, Machine, Prediction, predict

GIGA, TERA = 1e9, 1e12
OF_CARD = {
    "memory_gb": "memory of a card [GB]",
    "peak_tflops": "peak of bfloat16 products [TFLOPS]",
    "peak_tflops_fp32": "peak of float32 products, or TF32 [TFLOPS]",
    "link_gbs": "bandwidth of a card inside its node, one direction [GB/s]",
}


def main() -> None:
    """The command."""
    parser = Parser("muse.scaling", __doc__)
    parser.add_argument("options", nargs="*", help="options of train.py, e.g. stage=2 model=seed")
    parser.add_argument("--ranks", default="1,8,64,512,1000", help="numbers of GPUs, default %(default)s")
    parser.add_argument("--windows", type=int, help="windows a GPU; default train.batch_size / ranks")
    parser.add_argument("--card", choices=tuple(CARDS), help="data sheet that the next four are taken from")
    for name, text in OF_CARD.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help=text)
    parser.add_argument("--mfu", type=float, required=True, help="share of the peak that is reached, 0 to 1")
    parser.add_argument(
        "--network-gbs",
        type=float,
        required=True,
        help="bandwidth for each card between nodes, one way [GB/s]",
    )
    parser.add_argument("--node", type=int, default=8, help="cards in a node, default %(default)s")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="whose attention, default %(default)s"
    )
    parser.add_argument("--latency-us", type=float, default=0.0, help="of a message, default %(default)s")
    run_command(lambda: print(report(parser.parse_intermixed_args())))


def report(arguments: argparse.Namespace) -> str:
    """The text that the command prints.

    Raises:
        ConfigError: an option is not known or not allowed.
    """
    config = _composed(arguments.options)
    machine = _machine(arguments)
    stage, model = config.stage, config.model
    counts = _ranks(arguments.ranks)
    parallel = config.hardware.parallel if config.hardware.parallel != "none" else "ddp"
    rows = [
        predict(
            stage,
            model,
            arguments.windows * ranks if arguments.windows else config.train.batch_size,
            config.optim.accumulation,
            parallel,
            ranks,
            machine,
            arguments.device,
            config.optim.kept_share,
        )
        for ranks in counts
    ]
    header = (
        *("ranks", "windows", "tokens", "memory [GB]", "TFLOP", "compute [ms]", "sent [GB]", "comm. [ms]"),
        *("step [ms]", "or", "efficiency", "or", "limits"),
    )
    parts = (
        "\n".join((_what(config, parallel), _assumed(machine, arguments.card))),
        table(header, [_cells(row) for row in rows]),
        "step: communication beside the products, or after them; efficiency: products / step",
        table(("memory of a rank [GB]", *(str(row.ranks) for row in rows)), _holders(rows)),
    )
    return "\n\n".join(parts)


def _what(config: RunConfig, parallel: str) -> str:
    stage, model = config.stage, config.model
    forward = forward_flops(stage, model, model.vocab_size, model.seq_len)
    step = step_flops(stage, model, model.vocab_size, model.seq_len, config.optim.kept_share)
    flows = f", of these {step.forces:.4g} in {stage.force_precision} forces" if step.forces else ""
    return (
        f"stage {stage.number}, {model.name}, {stage.precision}, windows of {model.seq_len} tokens, "
        f"vocabulary {model.vocab_size}, ranks joined by {parallel}\n"
        f"{parameters(stage, model, model.vocab_size):,} parameters; FLOPs of a token: {forward.total:.4g} "
        f"forward, {step.total:.4g} in a training step{flows}"
    )


def _assumed(machine: Machine, card: str | None) -> str:
    source = f", memory, peaks and links from the data sheet of {card} unless given" if card else ""
    return (
        f"assumed{source}: {machine.memory / GIGA:g} GB a card, {machine.peak / TERA:g} TFLOPS in bf16 and "
        f"{machine.peak_fp32 / TERA:g} in float32, {machine.link / GIGA:g} GB/s inside a node of "
        f"{machine.node}, {machine.network / GIGA:g} GB/s a card beyond, {machine.utilisation:g} of the peak "
        f"reached, {1e6 * machine.latency:g} us a message"
    )


def _cells(row: Prediction) -> list[object]:
    windows = int(row.windows) if row.windows == int(row.windows) else row.windows
    return [
        row.ranks, windows, row.tokens, row.memory.peak / GIGA, row.flops / TERA, 1e3 * row.compute,
        row.sent / GIGA, 1e3 * row.communication, 1e3 * row.hidden, 1e3 * row.apart,
        f"{row.compute / row.hidden:.0%}", f"{row.compute / row.apart:.0%}", ", ".join(row.limits) or "none",
    ]  # fmt: skip


def _holders(rows: list[Prediction]) -> list[list[object]]:
    names = [field.name for field in dataclasses.fields(Memory) if field.name != "gradients"]
    return [[name, *(getattr(row.memory, name) / GIGA for row in rows)] for name in names]


def _composed(options: list[str]) -> RunConfig:
    prepare_hydra()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config: RunConfig = build_config(compose("train", options))
    element_bytes(config.stage)
    return config


def _ranks(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise ConfigError(f"--ranks {text} is not allowed; give whole numbers from 1, as in 1,8,64")
    return counts


def _machine(arguments: argparse.Namespace) -> Machine:
    sheet = CARDS.get(arguments.card or "", {})
    of_card = {}
    for name in OF_CARD:
        given = getattr(arguments, name)
        value = sheet.get(name) if given is None else given
        option = f"--{name.replace('_', '-')}"
        if value is None:
            raise ConfigError(f"{option} is not given; give it, or --card ({', '.join(CARDS)})")
        of_card[option] = value
    for option, value in (
        *of_card.items(), ("--network-gbs", arguments.network_gbs), ("--node", arguments.node),
    ):  # fmt: skip
        if not value > 0:
            raise ConfigError(f"{option} {value:g} is not allowed; it must be greater than 0")
    if not 0 < arguments.mfu <= 1:
        raise ConfigError(f"--mfu {arguments.mfu:g} is not allowed; it must be above 0 and at most 1")
    if not arguments.latency_us >= 0:
        raise ConfigError(f"--latency-us {arguments.latency_us:g} is not allowed; it must be at least 0")
    if arguments.windows is not None and arguments.windows < 1:
        raise ConfigError(f"--windows {arguments.windows} is not allowed; it must be at least 1")
    memory_gb, peak, peak_fp32, link = of_card.values()
    return Machine(
        memory=memory_gb * GIGA,
        peak=peak * TERA,
        peak_fp32=peak_fp32 * TERA,
        utilisation=arguments.mfu,
        link=link * GIGA,
        network=arguments.network_gbs * GIGA,
        node=arguments.node,
        latency=arguments.latency_us * 1e-6,
    )


if __name__ == "__main__":
    main()
