"""Train a language model: ``python train.py stage=1 model=tiny data=stdlib``."""

from muse.launch.commands import train

if __name__ == "__main__":
    train()
