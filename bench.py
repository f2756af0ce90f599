"""Measure a language model: ``python bench.py stage=1 model=tiny benchmark=all``."""

from muse.launch.commands import bench

if __name__ == "__main__":
    bench()
