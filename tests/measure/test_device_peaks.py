from __future__ import annotations

import pytest

from muse.measure.device_peaks import DATA_SHEETS, data_sheet

NAMES = [(name, sheet) for sheet in DATA_SHEETS for name in sheet.names]
# Other devices, slices of listed ones and spellings that torch does not use.
OTHERS = (
    "",
    "NVIDIA",
    "NVIDIA A100",
    "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
    "NVIDIA GeForce RTX 3070 Laptop GPU",
    "NVIDIA GeForce RTX 3070 Ti",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA H100",
    "NVIDIA H100 80GB HBM2e",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA H20",
    "NVIDIA L40",
    "AMD Instinct MI300A",
    "AMD Instinct MI300X VF",
    "nvidia h200",
)


@pytest.mark.parametrize(("name", "sheet"), NAMES, ids=[name for name, _ in NAMES])
def test_a_device_has_its_own_sheet_and_a_slice_of_it_has_none(name, sheet):
    assert data_sheet(name, sheet.processors) is sheet
    for processors in (0, 1, sheet.processors - 1, sheet.processors + 1):
        assert data_sheet(name, processors) is None


@pytest.mark.parametrize("name", OTHERS)
def test_a_device_that_is_not_listed_never_takes_the_sheet_of_another(name):
    assert all(data_sheet(name, sheet.processors) is None for sheet in DATA_SHEETS)


def test_cards_of_one_chip_have_different_sheets():
    assert len({name for name, _ in NAMES}) == len(NAMES)
    sxm, pcie = data_sheet("NVIDIA H100 80GB HBM3", 132), data_sheet("NVIDIA H100 PCIe", 114)
    assert pcie.bf16 < 0.8 * sxm.bf16


@pytest.mark.parametrize("sheet", DATA_SHEETS, ids=lambda sheet: sheet.names[0])
def test_the_figures_of_a_sheet_fit_together(sheet):
    """TF32 has half the rate of half precision on all of these; one figure with sparsity would not fit."""
    assert sheet.bf16 == sheet.fp16
    assert sheet.bf16 / sheet.tf32 == pytest.approx(2, rel=0.02)
    assert sheet.fp32 <= sheet.tf32
