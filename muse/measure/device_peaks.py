"""Peak rates of matrix products from the vendors' data sheets, for exactly the devices they are of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataSheet:
    """Peaks of one device in TFLOP/s (10^12): dense products, accumulated in float32 as PyTorch does.

    Attributes:
        names: the device as ``torch.cuda.get_device_name`` calls it.
        processors: multiprocessors (compute units) of the whole device; a slice of it has fewer.
        bf16: of bfloat16.
        fp16: of float16.
        tf32: of float32 whose products are rounded to TF32.
        fp32: of float32.
        source: where the figures are from. A sheet that gives them with 2:4 sparsity counts half.
    """

    names: tuple[str, ...]
    processors: int
    bf16: float
    fp16: float
    tf32: float
    fp32: float
    source: str


HOPPER = "NVIDIA H100 architecture white paper"
DATA_SHEETS = (
    DataSheet(("NVIDIA H200",), 132, 989.5, 989.5, 494.5, 67.0, "NVIDIA H200 data sheet"),
    DataSheet(("NVIDIA H200 NVL",), 132, 835.5, 835.5, 417.5, 60.0, "NVIDIA H200 data sheet"),
    DataSheet(("NVIDIA H100 80GB HBM3",), 132, 989.4, 989.4, 494.7, 66.9, HOPPER),
    DataSheet(("NVIDIA H100 PCIe",), 114, 756.5, 756.5, 378.0, 51.0, "NVIDIA H100 data sheet"),
    DataSheet(("NVIDIA H100 NVL",), 132, 835.5, 835.5, 417.5, 60.0, "NVIDIA H100 data sheet"),
    DataSheet(
        (
            "NVIDIA A100-SXM4-40GB",
            "NVIDIA A100-SXM4-80GB",
            "NVIDIA A100-PCIE-40GB",
            "NVIDIA A100 80GB PCIe",
        ),
        108,
        312.0,
        312.0,
        156.0,
        19.5,
        "NVIDIA A100 data sheet",
    ),
    DataSheet(("NVIDIA L4",), 58, 121.0, 121.0, 60.0, 30.3, "NVIDIA L4 data sheet"),
    DataSheet(("NVIDIA L40S",), 142, 362.05, 362.05, 183.0, 91.6, "NVIDIA L40S data sheet"),
    DataSheet(
        ("NVIDIA GeForce RTX 4090",), 128, 165.2, 165.2, 82.6, 82.6, "NVIDIA Ada white paper, appendix A"
    ),
    DataSheet(
        ("NVIDIA GeForce RTX 3090",), 82, 71.0, 71.0, 35.6, 35.6, "NVIDIA GA102 white paper, appendix A"
    ),
    DataSheet(
        ("NVIDIA GeForce RTX 3070",), 46, 40.6, 40.6, 20.3, 20.3, "NVIDIA GA102 white paper, appendix A"
    ),
    DataSheet(
        ("AMD Instinct MI300X", "AMD Instinct MI300X OAM"),
        304,
        1307.4,
        1307.4,
        653.7,
        163.4,
        "AMD Instinct MI300X data sheet",
    ),
)


def data_sheet(name: str, processors: int) -> DataSheet | None:
    """The sheet of exactly this device; None for every other one, however alike their names are.

    Args:
        name: of ``torch.cuda.get_device_name``.
        processors: its ``multi_processor_count``.
    """
    for sheet in DATA_SHEETS:
        if name in sheet.names and processors == sheet.processors:
            return sheet
    return None
