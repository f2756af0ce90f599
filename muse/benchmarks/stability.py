"""Whether outputs are finite and gradients have sane sizes."""

from __future__ import annotations

import torch

from muse.benchmarks.model import benchmark_model, random_tokens
from muse.benchmarks.workload import batch_shape
from muse.config import BenchConfig
from muse.hardware import autocast_dtype

GRADIENT_RANGE = (1e-6, 1e3)


@torch.no_grad()
def measure_stability(config: BenchConfig, device: torch.device) -> dict[str, float]:
    """Count NaN and Inf in the logits of ``benchmark.inputs`` random inputs of random lengths."""
    model = benchmark_model(config, device).eval()
    cast = autocast_dtype(config.stage.precision)
    generator = torch.Generator().manual_seed(config.seed)
    _, longest = batch_shape(config)
    nan = inf = 0
    for _ in range(config.benchmark.inputs):
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        tokens = torch.randint(config.model.vocab_size, (1, length), generator=generator).to(device)
        with torch.autocast(device.type, cast, enabled=cast is not None):
            logits = model(tokens)
        nan += int(logits.isnan().sum())
        inf += int(logits.isinf().sum())
    return {"inputs": config.benchmark.inputs, "nan_count": nan, "inf_count": inf}


def measure_gradients(config: BenchConfig, device: torch.device) -> dict[str, float | str]:
    """Smallest and largest gradient norm of a parameter after one backward pass on random tokens."""
    model = benchmark_model(config, device).train()
    inputs, targets = random_tokens(config, device, config.seed)
    cast = autocast_dtype(config.stage.precision)
    with torch.autocast(device.type, cast, enabled=cast is not None):
        loss = model.loss(inputs, targets)
    loss.backward()
    norms = {
        name: 0.0 if p.grad is None else torch.linalg.vector_norm(p.grad, dtype=torch.float32).item()
        for name, p in model.named_parameters()
    }
    smallest, largest = min(norms, key=norms.__getitem__), max(norms, key=norms.__getitem__)
    return {
        "grad_norm_min": norms[smallest],
        "grad_norm_max": norms[largest],
        "grad_norm_min_parameter": smallest,
        "grad_norm_max_parameter": largest,
    }
