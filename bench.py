"""Measure a language model: ``python bench.py stage=1 model=tiny benchmark=all``."""

import hydra
from omegaconf import DictConfig

from muse.launch.cli import run_job, start


@hydra.main(version_base="1.3", config_path="conf", config_name="bench")
def main(composed: DictConfig) -> None:
    """Run one benchmark."""
    # What is only shown or refused does not need torch.
    from muse.launch.bench import run_benchmark

    run_job(composed, run_benchmark)


if __name__ == "__main__":
    start(main)
