"""The folder of Hydra's files."""

from __future__ import annotations

from pathlib import Path

# They travel with the package.
CONF = Path(__file__).parents[1] / "conf"
