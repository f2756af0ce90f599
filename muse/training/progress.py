"""What a terminal shows of a training while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from muse.config import RunConfig
from muse.processes.ranks import rank

# Where there is no bar, a line for so many lines of metrics.
LINES = 10


class Progress:
    """A bar with an estimate, or from time to time a line where standard error is no terminal.

    Args:
        config: of the run.
        bar: of its steps.
        prints: whether lines are printed instead of the bar.
    """

    def __init__(self, config: RunConfig, bar: tqdm, prints: bool) -> None:
        self._config, self._bar, self._prints = config, bar, prints

    def advance(self) -> None:
        """Count a step."""
        self._bar.update()

    def show(self, step: int, loss: float, speed: float, tokens_per_step: int) -> None:
        """Show the loss after a step, and the speed in tokens a second."""
        self._bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
        steps = self._config.train.steps
        if self._prints and step % (LINES * self._config.logger.log_every) == 0:
            left = tqdm.format_interval((steps - step) * tokens_per_step / speed)
            print(
                f"step {step}/{steps}  loss {loss:.3f}  {speed:,.0f} tokens/s  {left} left",
                flush=True,
            )

    def tell(self, text: str) -> None:
        """Write a line above the bar, on the first rank."""
        if rank() == 0:
            self._bar.write(text)


@contextmanager
def shown_progress(config: RunConfig, start: int, shown: bool) -> Iterator[Progress]:
    """The progress of a run that begins after step ``start``; ``shown`` is whether anything of it is."""
    shown = shown and rank() == 0
    with tqdm(
        total=config.train.steps,
        initial=start,
        unit="step",
        disable=None if shown else True,
        dynamic_ncols=True,
    ) as bar:
        yield Progress(config, bar, shown and bool(bar.disable))
