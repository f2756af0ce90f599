from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from support.configs import SEQ_LEN, VOCAB, stage_config
from support.training import run_config

from muse.config import RunConfig
from muse.measure import utilisation as module
from muse.measure.utilisation import measure_utilisation, model_flops, utilisation

CPU = torch.device("cpu")
TOKENS = 2 * SEQ_LEN


def count(config: RunConfig) -> dict[torch.dtype, int]:
    return model_flops(config, VOCAB, CPU)


def by_hand(number: int) -> int:
    """Three times the multiplications and additions of a forward pass of ``run_config``'s model."""
    width, layers, heads, kv_heads, hidden = 8, 2, 2, 1, 16
    head = width // heads
    planes = 1 if number == 0 else 2
    projections = width * (heads + 2 * kv_heads) * head + width * width + 2 * width * hidden
    per_token = layers * planes**2 * projections + planes * width * VOCAB
    attention = layers * 2 * 2 * heads * SEQ_LEN * (SEQ_LEN // 2) * planes * head
    return 3 * 2 * (TOKENS * per_token + attention)


@pytest.mark.parametrize("number", [0, 1])
def test_the_count_equals_one_by_hand(number):
    assert count(run_config(number, "fp32")) == {torch.float32: by_hand(number)}


def test_an_update_from_several_micro_batches_has_as_many_times_the_flops():
    one, three = (count(run_config(1, "bf16", {"accumulation": pieces})) for pieces in (1, 3))
    assert three == {torch.bfloat16: 3 * one[torch.bfloat16]}


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed", "fp16-mixed"])
def test_flops_count_for_the_dtype_that_the_products_run_in(precision):
    expected = torch.float16 if precision == "fp16-mixed" else torch.bfloat16
    assert count(run_config(0, precision)) == {expected: by_hand(0)}


def test_what_a_flow_computes_again_is_not_counted():
    counts = []
    for gradient in ("backprop", "checkpoint", "reversible", "exact"):
        config = run_config(2, "bf16")
        config.stage = stage_config(2, "bf16", gradient=gradient, ode_steps=2)
        counts.append(count(config))
    assert counts[1:] == counts[:1] * 3
    # The forces are float32 products.
    assert set(counts[0]) == {torch.bfloat16, torch.float32}


def test_the_head_of_a_selection_counts_for_the_tokens_that_it_keeps():
    whole = count(run_config(1, "fp32"))[torch.float32]
    kept = count(run_config(1, "fp32", {"selection": "high", "selection_share": 0.25}))[torch.float32]
    head = 3 * 2 * TOKENS * 2 * 8 * VOCAB
    assert kept == whole - 3 * head // 4
    assert count(run_config(1, "fp32", {"selection_share": 0.25})) == {torch.float32: whole}


def test_counting_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    count(run_config(2, "bf16"))
    assert torch.equal(torch.get_rng_state(), before)


def test_utilisation_is_the_time_at_the_peak_of_each_dtype_by_the_time_taken():
    flops = {torch.bfloat16: 600, torch.float32: 100}
    peaks = {torch.bfloat16: 300.0, torch.float32: 100.0}
    assert utilisation(flops, peaks, 6.0) == 0.5


def test_the_measured_peak_is_of_this_machine_and_a_cpu_has_no_data_sheet(monkeypatch):
    monkeypatch.setattr("muse.measure.matrix_products.PEAK_SIDE", {"cpu": 64})
    state = torch.get_rng_state()
    measured = measure_utilisation({torch.float32: 1000}, [4.0, 1.0, 2.0], CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert measured.step_seconds == 2.0
    assert measured.mfu_of_measured_peak == 1000 / measured.measured_peak["fp32"] / 2.0
    assert measured.data_sheet_peak is None
    assert measured.mfu_of_data_sheet is None
    assert "this is a CPU" in measured.sentences()


def pretend(monkeypatch, name: str, processors: int, capability: tuple[int, int]) -> torch.device:
    """Let torch report a GPU."""
    properties = SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return torch.device("cuda", 0)


@pytest.mark.parametrize(("precision", "peak"), [("highest", 66.9e12), ("high", 494.7e12)])
def test_float32_products_are_held_against_the_format_they_run_in(monkeypatch, precision, peak):
    device = pretend(monkeypatch, "NVIDIA H100 80GB HBM3", 132, (9, 0))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    peaks, source = module._listed_peaks([torch.bfloat16, torch.float32], device)
    assert peaks == pytest.approx({torch.bfloat16: 989.4e12, torch.float32: peak})
    assert "H100" in source


def test_a_gpu_that_is_not_listed_has_no_utilisation_of_a_data_sheet(monkeypatch):
    device = pretend(monkeypatch, "NVIDIA H100 PCIe", 132, (9, 0))
    peaks, sentence = module._listed_peaks([torch.bfloat16], device)
    assert peaks is None
    assert sentence == "no sheet is of exactly this device, NVIDIA H100 PCIe with 132 multiprocessors"


def test_both_figures_are_told_with_the_peak_they_refer_to():
    told = module.Utilisation(
        "GPU", {"bf16": 10**12}, 0.01, {"bf16": 4e14}, 0.25, {"bf16": 1e15}, 0.1, "a sheet"
    )
    _, first, second = told.sentences().splitlines()
    assert first == "MFU 25 % of the peak measured here, 400 TFLOP/s in bf16"
    assert second == "MFU 10 % of the a sheet, 1000 TFLOP/s in bf16"
    assert (
        "none, no reason"
        in dataclasses.replace(
            told, data_sheet_peak=None, mfu_of_data_sheet=None, data_sheet="no reason"
        ).sentences()
    )
