"""Where kernels.py still looks for the shape of a batch."""

from muse.benchmarks.workload import batch_shape

__all__ = ["batch_shape"]
