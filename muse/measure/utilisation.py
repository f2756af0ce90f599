"""Model FLOPs utilisation (MFU): how much of a device's peak a training step makes use of.

MFU is the time that the step's model FLOPs would take at the peak rate of their dtype, divided by the time
that the step took (Chowdhery et al., "PaLM", 2022, appendix B). Model FLOPs are the multiplications and
additions of the matrix products of the forward pass, and twice as many for the backward pass, whatever
is computed again in it: a flow that rebuilds its states is not credited for that, nor a selection of tokens
for its scores.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TypeVar

import torch

from muse.config import RunConfig
from muse.hardware import autocast_dtype, describe
from muse.measure.device_peaks import data_sheet
from muse.measure.matrix_products import COMPLEX_ATTENTION, ProductRecorder, product_rate
from muse.measure.operations import InsideOperations
from muse.measure.timing import quantile
from muse.models import build_model
from muse.processes.ranks import ranks

T = TypeVar("T")
BACKWARD = 2
FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Utilisation:
    """MFU and what it is made of; rates in FLOP/s, by the format of the products' factors.

    Attributes:
        device: the device's name.
        model_flops: model FLOPs of a step.
        step_seconds: median time of a step without a profiler.
        measured_peak: rates of a large square product on this device.
        mfu_of_measured_peak: MFU with these rates.
        data_sheet_peak: rates of the device's data sheet; None without one.
        mfu_of_data_sheet: MFU with these.
        data_sheet: which sheet, or why there is none.
    """

    device: str
    model_flops: dict[str, int]
    step_seconds: float
    measured_peak: dict[str, float]
    mfu_of_measured_peak: float
    data_sheet_peak: dict[str, float] | None
    mfu_of_data_sheet: float | None
    data_sheet: str

    def sentences(self) -> str:
        """What the terminal shows: each MFU with the peak that it refers to."""
        flops = ", ".join(f"{count:.4g} in {name}" for name, count in self.model_flops.items())
        lines = [
            f"model FLOPs of a step: {flops}; median step without profiler: {1e3 * self.step_seconds:.4g} ms",
            f"MFU {100 * self.mfu_of_measured_peak:.3g} % of the peak measured here, "
            f"{_rates(self.measured_peak)}",
        ]
        if self.mfu_of_data_sheet is None or self.data_sheet_peak is None:
            lines.append(f"MFU of a data sheet: none, {self.data_sheet}")
        else:
            rates = _rates(self.data_sheet_peak)
            lines.append(f"MFU {100 * self.mfu_of_data_sheet:.3g} % of the {self.data_sheet}, {rates}")
        return "\n".join(lines)


def measure_utilisation(
    flops: dict[torch.dtype, int], seconds: list[float], device: torch.device
) -> Utilisation:
    """MFU of steps that took ``seconds`` each, by a product timed on ``device`` and by its data sheet."""
    step = quantile(seconds, 0.5)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        measured = {dtype: product_rate(dtype, device) for dtype in flops}
    listed, explanation = _listed_peaks(list(flops), device)

    def named(values: dict[torch.dtype, T]) -> dict[str, T]:
        return {_format(dtype, device): value for dtype, value in values.items()}

    return Utilisation(
        device=describe(device),
        model_flops=named(flops),
        step_seconds=step,
        measured_peak=named(measured),
        mfu_of_measured_peak=utilisation(flops, measured, step),
        data_sheet_peak=named(listed) if listed is not None else None,
        mfu_of_data_sheet=utilisation(flops, listed, step) if listed is not None else None,
        data_sheet=explanation,
    )


def utilisation(flops: dict[torch.dtype, int], peaks: dict[torch.dtype, float], seconds: float) -> float:
    """Share of ``seconds`` that the FLOPs would take at the peaks of their dtypes."""
    return sum(count / peaks[dtype] for dtype, count in flops.items()) / seconds


def model_flops(config: RunConfig, vocab_size: int, device: torch.device) -> dict[torch.dtype, int]:
    """Model FLOPs of a rank's training step by the dtype of the products' factors.

    They are counted on a model of its own and one window, so that the training notices nothing. Fused
    attention counts the half of its keys that a causal mask leaves.
    """
    model = build_model(config.stage, config.model, vocab_size, config.seed).to(device).eval()
    tokens = torch.zeros(1, config.model.seq_len, dtype=torch.int64, device=device)
    cast = autocast_dtype(config.stage.precision)
    # As many as a selection keeps.
    kept = max(1, round(config.optim.kept_share * tokens.numel()))
    with (
        torch.no_grad(),
        torch.autocast(device.type, cast, enabled=cast is not None),
        ProductRecorder() as recorder,
        InsideOperations(closed=COMPLEX_ATTENTION),
    ):
        model.loss(tokens, tokens, select=lambda *_: torch.arange(kept, device=device))
    windows = config.train.batch_size * config.optim.accumulation // ranks()
    flops: Counter[torch.dtype] = Counter()
    for product, count in (recorder.products + recorder.attention_products).items():
        flops[product.dtype] += (1 + BACKWARD) * windows * count * product.flops()
    return dict(flops)


def _listed_peaks(
    dtypes: list[torch.dtype], device: torch.device
) -> tuple[dict[torch.dtype, float] | None, str]:
    """Rates of the device's data sheet, and which sheet or why none."""
    if device.type != "cuda":
        return None, "the data sheets are of GPUs and this is a CPU"
    name = torch.cuda.get_device_name(device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    sheet = data_sheet(name, processors)
    if sheet is None:
        return None, f"no sheet is of exactly this device, {name} with {processors} multiprocessors"
    return {dtype: 1e12 * getattr(sheet, _format(dtype, device)) for dtype in dtypes}, sheet.source


def _format(dtype: torch.dtype, device: torch.device) -> str:
    """Format in which products of a dtype take their factors."""
    if dtype == torch.float32 and device.type == "cuda" and torch.version.hip is None:
        rounded = torch.get_float32_matmul_precision() != "highest"
        return "tf32" if rounded and torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return FORMATS[dtype]


def _rates(rates: dict[str, float]) -> str:
    return ", ".join(f"{rate / 1e12:.4g} TFLOP/s in {name}" for name, rate in rates.items())
