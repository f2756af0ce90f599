"""Train a language model: ``python train.py stage=1 model=tiny data=stdlib``."""

import hydra
from omegaconf import DictConfig

from muse.cli import finish, prepare, run_job
from muse.train_run import run_training


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(composed: DictConfig) -> None:
    """Run one training."""
    run_job(composed, run_training)


if __name__ == "__main__":
    prepare()
    main()
    finish()
