"""The optimisation stack of stage 3a: execution, compressed activations, speculative decoding."""

from muse.acceleration.execution import Execution
from muse.acceleration.inference_scaling import InferenceScalingEngine, greedy_decode
from muse.acceleration.kernel_optimizer import KernelOptimizer
from muse.acceleration.semantic_compressor import SemanticCompressor

__all__ = ["Execution", "InferenceScalingEngine", "KernelOptimizer", "SemanticCompressor", "greedy_decode"]
