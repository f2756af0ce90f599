"""One page of Markdown about a card: goals, then what each part found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from muse.card.parts import GOALS, Figures, Goal

OPERATIONS = 6


def judged(goal: Goal, found: Figures) -> tuple[float | None, bool | None]:
    """The figure that a goal is of, and whether it is met; None and None where it was not measured."""
    try:
        figure = goal.figure(found)
    except (KeyError, TypeError):
        return None, None
    if figure is None:
        return None, None
    return figure, figure >= goal.target if goal.at_least else figure <= goal.target


def page(answers: Mapping[str, Mapping[str, Any]]) -> str:
    """The page.

    Args:
        answers: by part, with ``status``, ``seconds``, ``reason`` and, where it is done, ``figures``.
    """
    found: Figures = {name: answer["figures"] for name, answer in answers.items() if answer.get("figures")}
    machine = found.get("machine", {})
    title = machine.get("device") or "a machine that was not described"
    lines = [f"## {title}", ""]
    if machine:
        lines += [
            f"Python {machine['python']}, torch {machine['torch']}, Triton {machine['triton']}, CUDA "
            f"{machine['cuda'] or '-'}; large products {_rates(machine['product_tflops'])}, copies "
            f"{machine['copy_gb_per_second']:.4g} GB/s; clocks {_clocks(machine['clocks'])}; source "
            f"{machine['source'][:12]}.",
            "",
        ]
    lines += ["| goal | asked | measured | met |", "|---|---|---|---|"]
    for goal in GOALS:
        figure, met = judged(goal, found)
        asked = f"{'at least' if goal.at_least else 'at most'} {goal.target:g}"
        lines.append(f"| {goal.title} | {asked} | {_number(figure)} | {_yes(met)} |")
    lines += ["", "| part | state | seconds | |", "|---|---|---|---|"]
    for name, answer in answers.items():
        lines.append(f"| {name} | {answer['status']} | {answer['seconds']:.0f} | {answer['reason'] or ''} |")
    lines += _kernels(found) + _trainings(found) + _memory(found)
    return "\n".join(lines) + "\n"


def _kernels(found: Figures) -> list[str]:
    rows = []
    for part, figures in found.items():
        for case, row in figures.get("kernels", {}).items():
            if row.get("error"):
                rows.append(f"| {part} | {case} | - | - | {row['error']} | - |")
                continue
            ours = row["alternatives"]["ours"]
            others = ", ".join(
                f"{name} {one['training_ratio']:.2f}"
                for name, one in row["alternatives"].items()
                if one.get("training_ratio") is not None
            )
            shares = " / ".join(
                _percent(row.get(f"{when}_share_of_peak")) for when in ("forward", "backward")
            )
            rows.append(
                f"| {part} | {case} | {ours['forward_ms_p50']:.3g} | {ours['training_ms_p50']:.3g} | "
                f"{others} | {shares} |"
            )
    return _table(
        "| part | kernel | forward ms | with backward ms | time of others / ours | share of the peak |", rows
    )


def _trainings(found: Figures) -> list[str]:
    rows = []
    for part, figures in found.items():
        if "step_ms" in figures:
            shares = list(figures["operations"].items())[:OPERATIONS]
            most = ", ".join(f"{name} {share:.0%}" for name, share in shares)
            rows.append(
                f"| {part} | {figures['step_ms']:.4g} | {figures['tokens_per_second']:,.0f} | "
                f"{_percent(figures['mfu_of_measured_peak'])} | {_percent(figures['mfu_of_data_sheet'])} | "
                f"{_percent(figures['device_idle'])} | {most} |"
            )
    return _table(
        "| training | step ms | tokens/s | MFU, measured peak | MFU, data sheet | idle | most time |", rows
    )


def _memory(found: Figures) -> list[str]:
    modes = ("symplectic", "reversible", "checkpoint", "full_backprop")
    rows = [
        f"| {part} | {' | '.join(_number(figures[f'vram_{mode}_gb']) for mode in modes)} | "
        f"{_number(figures['reconstruction_error'])} |"
        for part, figures in found.items()
        if "vram_symplectic_gb" in figures
    ]
    return _table(
        "| peak memory of stage 2, GB | exact | reversible | checkpoint | full | reconstruction error |", rows
    )


def _table(header: str, rows: list[str]) -> list[str]:
    """Lines of a table after an empty one; none without rows."""
    return ["", header, "|---" * (header.count("|") - 1) + "|", *rows] if rows else []


def _rates(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{rate:.4g} TFLOPS in {name}" for name, rate in rates.items())


def _clocks(clocks: Mapping[str, str] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in clocks.items()) if clocks else "unknown"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _yes(met: bool | None) -> str:
    return "not measured" if met is None else "yes" if met else "**no**"
