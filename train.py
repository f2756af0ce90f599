"""Train a language model: ``python train.py stage=1 model=tiny data=stdlib``."""

import hydra
from omegaconf import DictConfig

from muse.launch.cli import run_job, start
from muse.launch.train import run_train, validation_loss


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(composed: DictConfig) -> float:
    """Run one training; return its validation loss for a sweeper that searches."""
    run_job(composed, run_train)
    return validation_loss()


if __name__ == "__main__":
    start(main)
