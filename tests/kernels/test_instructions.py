"""Loops, counts and cycles of made-up machine code, and the page that is printed from the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernels import instructions
from kernels.instructions import describe, innermost_loops, missed, page, parse, product_of, work_of

ROOT = Path(instructions.__file__).parents[1]


def code_of(*lines: str) -> str:
    """Machine code as cuobjdump prints it, with the words of its encoding between the lines."""
    return "\n".join(
        f"        /*{16 * index:04x}*/    {line} ;    /* 0x00000a00ff017b82 */\n    /* 0x000e700000000800 */"
        for index, line in enumerate(lines)
    )


LOOP = (
    "HGMMA.64x64x16.F32.BF16 R56, gdesc[UR40], RZ, !UPT",
    "HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR12], R24, gsb0",
    "MUFU.EX2 R4, R5",
    "@!P1 FMUL R3, R3, R3",
    "LDS.128 R8, [R2]",
    "LDSM.16.M88.4 R8, [R2]",
    "SHFL.BFLY PT, R3, R4, 0x2, 0x1f",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "DEPBAR.LE SB0, 0x1",
    "F2FP.BF16.F32.PACK_AB R3, R4, R5",
)
WORK = 2 * (64 * 64 * 16 + 64 * 128 * 16)
# From the second instruction; the first and the last are outside.
CODE = code_of("MOV R1, R2", *LOOP, "@!P0 BRA 0x10", "EXIT", "BRA 0xd0")


def test_counts_and_cycles_of_a_loop():
    entry = describe(CODE, 8, WORK)
    assert entry["matrix"] == {"HGMMA.64x128x16.F32.BF16": 1, "HGMMA.64x64x16.F32.BF16": 1}
    assert entry["barriers"] == entry["copy waits"] == entry["LDS"] == entry["LDSM"] == entry["SHFL"] == 1
    assert entry["MUFU"] == entry["FP32"] == entry["conversions"] == 1
    assert entry["STS"] == entry["spills"] == 0
    assert entry["instructions"] == len(LOOP) + 1
    # Two warp groups. The first product reads two operands of 2 KiB from shared memory, the second one of 4.
    assert entry["cycles"] == {
        "matrix": 2 * (32 + 64),
        "MUFU": 8 * 2,
        "FP32": 8 * 0.25,
        "ALU": 8 * 0.5,
        "shared": 2 * (4096 + 4096) / 128 + 8 * (4 + 4 + 1),
        "issue": 8 * (len(LOOP) + 1) / 4,
    }
    assert entry["bound"] == "shared"
    assert entry["share"] == round(192 / 200, 3)
    assert entry["serial"] == round(192 / (192 + 200), 3)
    assert entry["repeated"] == 0


def test_products_that_warps_repeat_are_no_share_of_the_peak():
    whole, half = (describe(CODE, 8, work) for work in (WORK, WORK // 2))
    assert half["repeated"] == 0.5
    assert (half["share"], half["serial"]) == (round(96 / 200, 3), round(96 / 392, 3))
    assert half["cycles"] == whole["cycles"]


def test_work_is_that_of_one_innermost_loop():
    dot = "{} = tt.dot %a, %b, %c : tensor<64x32xbf16> * tensor<32x128xbf16> -> tensor<64x128xf32>"
    lines = (
        dot,
        "scf.for %i = %a to %b {",
        "  " + dot,
        "  scf.for %j = %a to %b {",
        "    scf.if %p {",
        "      " + dot,
        "    }",
        "    " + dot,
        "  }",
        "}",
    )
    assert work_of("\n".join(lines)) == 2 * 64 * 32 * 128
    assert work_of(dot) == 0


@pytest.mark.parametrize(
    ("name", "work", "bits"),
    [
        ("HMMA.16816.F32.BF16", 16 * 8 * 16, 16),
        ("HMMA.1688.F32.TF32", 16 * 8 * 8, 32),
        ("HGMMA.64x32x8.F32.TF32", 64 * 32 * 8, 32),
    ],
)
def test_products(name, work, bits):
    (one,) = parse(code_of(f"{name} R1, R2, R3, R1"))
    product = product_of(one)
    assert (product.work, product.bits) == (work, bits)


def test_older_products_do_not_reach_the_peak():
    entry = describe(code_of("HMMA.16816.F32.BF16 R1, R2, R3, R1", "BRA 0x0"), 4, 4 * 2048)
    assert entry["bound"] == "matrix"
    assert entry["share"] == instructions.OLDER


def test_the_innermost_loop_with_most_matrix_work_and_without_a_mask():
    code = code_of(
        "NOP",
        "FFMA R1, R1, R1, R1",
        "BRA 0x10",
        "HMMA.16816.F32.BF16 R1, R2, R3, R1",
        "BRA 0x30",
        "HMMA.16816.F32.BF16 R1, R2, R3, R1",
        "FSEL R1, R2, R3, P0",
        "BRA 0x50",
        "BRA 0x0",
    )
    assert [len(loop) for loop in innermost_loops(parse(code))] == [2, 2, 3]
    entry = describe(code, 4, 1)
    assert entry["instructions"] == 2
    assert entry["matrix"] == {"HMMA.16816.F32.BF16": 1}


def test_code_without_a_loop():
    with pytest.raises(ValueError, match="no loop"):
        describe(code_of("EXIT", "BRA 0x10"), 4, 1)


def test_goals():
    entry = describe(CODE, 8, WORK)
    name = "real 16 bits, d=64 forward_kernel"
    assert missed(name, entry) == []
    worse = {"matrix": {"HMMA.16816.F32.BF16": 1}, "STS": 1, "spills": 2, "barriers": 3, "share": 0.7}
    assert missed(name, entry | worse) == ["HGMMA", "stores", "spills", "barriers", "share"]
    # Less is asked of phases and of gradients, and nothing of narrow heads.
    assert missed("phase 16 bits, d=64 forward_kernel", entry | {"share": 0.7}) == []
    assert missed("real 16 bits, d=64 key_gradient_kernel", entry | {"share": 0.7}) == []
    assert missed("real 16 bits, d=64 key_gradient_kernel", entry | {"share": 0.5}) == ["share"]
    assert missed("real 16 bits, d=32 forward_kernel", entry | worse) == []
    assert missed("bfloat16 256 exact adjoint_kernel", entry | {"spills": 1}) == ["spills"]


def test_the_page_is_that_of_the_table():
    table = json.loads(instructions.TABLE.read_text(encoding="utf-8"))
    committed = (ROOT / "docs/instructions.md").read_text(encoding="utf-8")
    assert page(table) == committed, "run python -m kernels.instructions > docs/instructions.md"
