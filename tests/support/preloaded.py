"""What copies of a process need not do again: imports, and all that Hydra and Matplotlib do once."""

from io import BytesIO

import pytest  # noqa: F401
import torch.distributed.checkpoint._fsspec_filesystem  # noqa: F401 - else each checkpoint imports it
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure

import muse.launch.commands
import muse.training.run  # noqa: F401
from muse.config import CONF
from muse.launch.composition import prepare_hydra
from support import distributed, pictures  # noqa: F401

prepare_hydra()
with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
    compose("train", ["stage=1"])
Figure().subplots().figure.savefig(BytesIO())
