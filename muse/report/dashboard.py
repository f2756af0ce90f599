"""The W&B dashboard of a project: python -m muse.report.dashboard --project=muse --entity=<user or team>."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from muse.commands import Parser, run_command
from muse.config import LoggerConfig
from muse.errors import RunError
from muse.report.wandb_run import STEP


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: what stands above it.
        kind: ``lines`` over the training step, ``bars`` (a run's last value), ``images`` or ``table``, which
            W&B heads with the name of its key.
        keys: what it shows, by the names under which runs log it.
    """

    title: str
    kind: str
    keys: tuple[str, ...]


LAYOUT: dict[str, tuple[Panel, ...]] = {
    "training": (
        Panel("loss [nats per token]", "lines", ("train/loss", "valid/loss")),
        Panel("validation perplexity", "lines", ("valid/ppl",)),
        Panel("validation loss, whole split", "lines", ("valid/whole_loss",)),
        Panel("validation perplexity, whole split", "lines", ("valid/whole_ppl",)),
        Panel("gradient norm", "lines", ("train/grad_norm", "train/max_grad_norm")),
        Panel("learning rate", "lines", ("train/lr",)),
        Panel("speed [tokens/s]", "lines", ("train/tokens_per_second",)),
    ),
    "flow": (
        Panel("mean energy", "lines", ("flow/energy",)),
        Panel("energy drift over the flows' own steps", "lines", ("flow/drift_max", "flow/drift_mean")),
        Panel("largest curvature times dt^2", "lines", ("flow/curvature_dt2",)),
        Panel("share of flows that have fallen back", "lines", ("flow/fallback_share",)),
        Panel("flows", "images", ("flow",)),
        Panel("fallbacks", "lines", ("flow/fallbacks", "trunk/fallbacks")),
        Panel("reconstruction error", "lines", ("flow/reconstruction_error",)),
        Panel("fallbacks, benchmark", "bars", ("fallback_count",)),
        Panel("reconstruction error, benchmark", "bars", ("reconstruction_error",)),
        Panel("energy drift", "bars", ("max_drift", "max_drift_untrained", "max_drift_leapfrog")),
        Panel("energy drift over time", "images", ("energy",)),
    ),
    "memory": (
        Panel("peak, stage 1 and its baselines [GB]", "bars", ("vram_gb", "vram_baseline_gb")),
        Panel(
            "peak by gradient mode [GB]",
            "bars",
            ("vram_symplectic_gb", "vram_reversible_gb", "vram_checkpoint_gb", "vram_full_backprop_gb"),
        ),
        Panel("what holds it", "images", ("vram",)),
        Panel("what holds it [GB]", "table", ("tables/memory",)),
    ),
    "comparison": (
        Panel("criteria", "table", ("tables/criteria",)),
        Panel(
            "perplexity",
            "bars",
            ("ppl", "ppl_baseline", "stage3_ppl", "stage2_ppl", "stage1_ppl", "stage0_ppl"),
        ),
        Panel("speed [tokens/s]", "bars", ("tokens_per_second",)),
        Panel("time saved by the stack [%]", "bars", ("speedup_pct", "speedup_paired_pct")),
        Panel("models", "table", ("tables/perplexity",)),
        Panel("the stack", "table", ("tables/speedup",)),
        Panel("kernels", "table", ("tables/kernels",)),
        Panel("kernels, time / ours", "images", ("kernels",)),
    ),
}


def build_workspace(project: str, entity: str) -> Any:
    """The workspace of ``LAYOUT``, which ``save`` sends to W&B; nothing else goes online.

    Raises:
        RunError: when wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise RunError(
            'the dashboard needs the package wandb-workspaces; pip install -e ".[wandb]" installs it'
        ) from error

    def panel(of: Panel) -> Any:
        keys: list[Any] = list(of.keys)
        if of.kind == "lines":
            return reports.LinePlot(title=of.title, x=STEP, y=keys)
        if of.kind == "bars":
            return reports.BarPlot(title=of.title, metrics=keys)
        if of.kind == "images":
            return reports.MediaBrowser(title=of.title, media_keys=keys)
        return reports.WeavePanelSummaryTable(table_name=of.keys[0])

    sections = [
        workspaces.Section(name=name, panels=[panel(of) for of in panels], is_open=True)
        for name, panels in LAYOUT.items()
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="MUSE",
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=STEP),
    )


def save_dashboard(project: str, entity: str | None) -> str:
    """Make the dashboard in W&B and return its address; ``entity`` None is the account's own.

    Raises:
        RunError: when wandb-workspaces is not installed or W&B refuses, because nobody is logged in for one.
    """
    workspace = build_workspace(project, entity or "")
    import wandb

    try:
        workspace.entity = entity or wandb.Api().default_entity
        return str(workspace.save().url)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"W&B did not take the dashboard: {first}") from error


def main() -> None:
    """The command."""
    parser = Parser(
        "muse.report.dashboard",
        "Make the W&B dashboard of a project (docs/dashboard.md); each call makes a new view.",
    )
    parser.add_argument("--project", default=LoggerConfig().project, help="logger.project of the runs")
    parser.add_argument("--entity", help="logger.entity of the runs; by default the account's own")
    options = parser.parse_args()
    run_command(lambda: print(save_dashboard(options.project, options.entity)))


if __name__ == "__main__":
    main()
