"""What the innermost loop of a kernel asks of a multiprocessor, read off its machine code, without a GPU.

``python -m kernels.resources`` keeps instructions.json up to date, for sm_90 and 16 bits;
``python -m kernels.instructions`` prints docs/instructions.md from it. A loop is what a backward branch goes
round. A kernel's loop is the innermost one with most matrix work and, of those with as much, the one with
fewest instructions: that over whole blocks, without a mask.

The cycles are those of one iteration of one program, were each pipe all that there is: no latency, no bank
conflict, no cache miss is in them, so that a share of the peak is a bound and no forecast. ``serial`` is the
share that is left where the matrix instructions overlap with nothing, as in a program that waits for each of
its products; two warp groups that take turns come near the bound.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).with_suffix(".json")
TARGET = "sm_90"
# Operations whose kernels multiply matrices; the others wait for memory.
OPERATIONS = ("complex_attention", "complex_linear", "linear_cross_entropy", "symplectic")
# Launches whose products Hopper has instructions for: labels of cases to compile.
IN_16_BITS = re.compile(r"16 bits|bfloat16")

GUIDE = "CUDA C++ Programming Guide, throughput of native arithmetic instructions, 9.0"
WHITE_PAPER = "NVIDIA H100 architecture white paper: 989.4 TFLOPS, 132 multiprocessors at 1.83 GHz"


class Rate(NamedTuple):
    """Results that a multiprocessor makes a cycle.

    Attributes:
        pipe: what is busy meanwhile.
        pattern: of the names of the instructions.
        threads: of a warp's 32, served in a cycle.
        source: where the figure is from.
    """

    pipe: str
    pattern: str
    threads: int
    source: str


# The first that matches counts; whatever matches none costs its issue only.
RATES = (
    Rate("MUFU", r"MUFU|F2I|I2F|F2F", 16, GUIDE),
    Rate("FP32", r"FADD|FMUL|FFMA|HADD2|HMUL2|HFMA2", 128, GUIDE),
    Rate("FP32", r"IMAD", 64, GUIDE + " (an integer product occupies the pipe of FFMA)"),
    Rate("ALU", r"FMNMX|FSETP|FSEL|FSET|F2FP|I2FP|FCHK", 64, GUIDE),
    Rate("ALU", r"IADD3|LOP3|ISETP|SEL|LEA|SHF|PRMT|PLOP3|IABS|IMNMX|VIADD|VIADDMNMX|SGXT|MOV", 64, GUIDE),
    Rate("shared", r"SHFL", 32, GUIDE),
)
ISSUE = Rate("issue", "", 128, "four schedulers a multiprocessor, an instruction of a warp each")
# Of shared memory a cycle: 32 banks of 4 bytes, CUDA C++ Programming Guide.
SHARED_BYTES = 128
# Multiply-adds a cycle of the matrix units, by bits of the operands.
MATRIX = {16: 2048, 32: 1024}
# Of that, what the products before Hopper's reach: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper
# GPU Architecture via Microbenchmarking" (arXiv:2402.13499), 62.9 % on average.
OLDER = 0.629

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


class Instruction(NamedTuple):
    """One line of machine code."""

    address: int
    name: str
    operands: str


def parse(code: str) -> list[Instruction]:
    """The instructions that ``cuobjdump --dump-sass`` prints."""
    found = filter(None, map(_INSTRUCTION.match, code.splitlines()))
    return [Instruction(int(one[1], 16), one[2], one[3]) for one in found]


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """What backward branches go round, without the loops that hold another; none of one instruction."""
    position = {one.address: index for index, one in enumerate(code)}
    spans = []
    for last, one in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)\s*$", one.operands) if one.name.startswith("BRA") else None
        first = position.get(int(target[1], 16), last) if target else last
        if first < last:
            spans.append((first, last))
    inner = [
        span
        for span in spans
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans)
    ]
    return [code[first : last + 1] for first, last in inner]


class Product(NamedTuple):
    """A matrix instruction.

    Attributes:
        kind: its name with shape and types.
        warps: that carry it out together.
        work: multiply-adds.
        bits: of an operand.
        shared: bytes of its operands in shared memory.
    """

    kind: str
    warps: int
    work: int
    bits: int
    shared: int


def product_of(one: Instruction) -> Product | None:
    """The product that an instruction is, if it is one."""
    name, _, types = one.name.partition(".")
    if name not in ("HGMMA", "HMMA"):
        return None
    shape = types.split(".")[0]
    bits = 32 if "TF32" in types else 16
    if name == "HMMA":
        m, n, k = 16, 8, int(shape.removeprefix("168"))
        return Product(one.name, 1, m * n * k, bits, 0)
    m, n, k = map(int, shape.split("x"))
    # The first operand is the accumulator; the left one is in registers or described along with the right.
    sources = one.operands.split(",")[1:]
    rows = n if sources[0].strip().startswith("R") else m + n
    return Product(one.name, 4, m * n * k, bits, rows * k * bits // 8)


def _bytes_of(one: Instruction) -> int:
    """What a warp's load or store of shared memory moves; 0 for another instruction."""
    name, _, kind = one.name.partition(".")
    if name in ("LDSM", "STSM"):
        return 128 * int((re.search(r"\.([124])$", one.name) or "11")[1])
    if name not in ("LDS", "STS", "LDGSTS"):
        return 0
    width = re.search(r"\b(128|64)\b", kind)
    return 32 * (int(width[1]) // 8 if width else 4)


def work_of(ttir: str) -> int:
    """Multiply-adds that an iteration of the innermost loop with most products asks for, by Triton's code.

    Warps that have no rows of their own repeat those of others, which the machine code does not tell.
    """
    # By loop, from the outermost to the innermost one that is open, each with what is in it alone.
    open_loops: list[tuple[int, list[int]]] = []
    most = 0
    for line in ttir.splitlines():
        indent = len(line) - len(line.lstrip())
        while open_loops and line.strip().startswith("}") and indent <= open_loops[-1][0]:
            most = max(most, sum(open_loops.pop()[1]))
        shapes = re.search(r"\btt\.dot\b.*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x", line)
        if "scf.for" in line:
            open_loops.append((indent, []))
        elif shapes and open_loops:
            open_loops[-1][1].append(math.prod(map(int, shapes.groups())))
    return most


def cycles_of(loop: list[Instruction], warps: int) -> dict[str, float]:
    """Cycles of an iteration of a program by pipe."""
    cycles = dict.fromkeys(("matrix", "MUFU", "FP32", "ALU", "shared", "issue"), 0.0)
    for one in loop:
        cycles["issue"] += warps * 32 / ISSUE.threads
        product = product_of(one)
        if product:
            carried_out = warps / product.warps
            peak = carried_out * product.work / MATRIX[product.bits]
            cycles["matrix"] += peak if product.warps == 4 else peak / OLDER
            cycles["shared"] += carried_out * product.shared / SHARED_BYTES
            continue
        cycles["shared"] += warps * _bytes_of(one) / SHARED_BYTES
        name = one.name.split(".")[0]
        rate = next((rate for rate in RATES if re.fullmatch(rate.pattern, name)), None)
        if rate:
            cycles[rate.pipe] += warps * 32 / rate.threads
    return cycles


def counts_of(loop: list[Instruction]) -> dict[str, Any]:
    """Instructions of a warp by kind, matrix instructions by name."""
    names = Counter(one.name.split(".")[0] for one in loop)
    matrix = Counter(product.kind for product in map(product_of, loop) if product)
    return {
        "matrix": dict(sorted(matrix.items())),
        "barriers": names["BAR"],
        "copy waits": sum(one.name.startswith("DEPBAR") for one in loop),
        "LDS": names["LDS"],
        "STS": names["STS"] + names["STSM"],
        "LDSM": names["LDSM"],
        "SHFL": names["SHFL"],
        "MUFU": names["MUFU"],
        "FP32": sum(names[name] for name in ("FADD", "FMUL", "FFMA")),
        "conversions": sum(names[name] for name in ("F2FP", "F2F", "F2I", "I2F", "I2FP")),
        "spills": names["LDL"] + names["STL"],
        "instructions": len(loop),
    }


def describe(code: str, warps: int, work: int) -> dict[str, Any]:
    """The entry of a kernel: counts and cycles of its loop, what bounds it, and shares of the matrix peak.

    ``repeated`` is the part of the products that only repeats others, in which there is no share of the peak.

    Args:
        code: as ``cuobjdump --dump-sass`` prints it.
        warps: of a program.
        work: multiply-adds that an iteration of a program asks for.

    Raises:
        ValueError: there is no loop.
    """
    loops = innermost_loops(parse(code))
    if not loops:
        raise ValueError("no loop in the machine code")

    def weight(loop: list[Instruction]) -> tuple[int, int]:
        return sum(product.work for product in map(product_of, loop) if product), -len(loop)

    loop = max(loops, key=weight)
    products = [product for product in map(product_of, loop) if product]
    done = sum(product.work * warps // product.warps for product in products)
    peak = min(work, done) / MATRIX[max((product.bits for product in products), default=16)]
    cycles = cycles_of(loop, warps)
    bound = max(cycles, key=cycles.__getitem__)
    others = max(cycles[pipe] for pipe in cycles if pipe != "matrix")
    return {
        "warps": warps,
        **counts_of(loop),
        "cycles": {pipe: round(number, 1) for pipe, number in cycles.items()},
        "repeated": round(1 - min(work, done) / done, 3) if done else 0.0,
        "bound": bound,
        "share": round(peak / cycles[bound], 3),
        "serial": round(peak / (cycles["matrix"] + others), 3),
    }


# Shares of the matrix peak that the loops of attention shall admit, by kind of score: forward, backward.
SHARES = {"real": (0.75, 0.60), "phase": (0.60, 0.45)}
# Launches that differ from a pinned configuration's in the shape only.
VARIANT = re.compile(r"not causal|packed|uneven|few")


def missed(name: str, entry: dict[str, Any]) -> list[str]:
    """The goals that a 16-bit kernel of width 64 and more does not reach, of those there are on sm_90.

    ``HGMMA``: every product is one of Hopper's. ``stores``: nothing goes from registers to shared memory.
    ``spills``: none. ``barriers``: no more than the pipeline of copies has, one behind each wait and one
    before a buffer is filled again. ``share``: SHARES of the matrix peak.
    """
    width = re.search(r"d=(\d+)|bfloat16 (\d+)", name)
    if not width or int(width[1] or width[2]) < 64:
        return []
    words = name.split()
    least = SHARES.get(words[0], (0.0, 0.0))["gradient" in words[-1]]
    failed = {
        "HGMMA": not entry["matrix"] or any(kind.startswith("HMMA") for kind in entry["matrix"]),
        "stores": entry["STS"] > 0,
        "spills": entry["spills"] > 0,
        "barriers": entry["barriers"] > entry["copy waits"] + 1,
        "share": entry["share"] < least,
    }
    return [goal for goal, fails in failed.items() if fails]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


INTRODUCTION = """# What the kernels compile to

The innermost loop of each kernel in 16 bits on {target}, by Triton {triton}: instructions of a warp an
iteration, XX None of it was timed. kernels/instructions.json has all launches and
the cycles of each pipe, kernels/instructions.py says how they are counted.

```
python -m kernels.resources
python -m kernels.instructions
```

The first compiles what has changed, the second prints this page. Goals from width 64 on: matrix instructions
of Hopper only (HGMMA), nothing stored from registers to shared memory (stores), no spills, as many barriers
as the pipeline of copies has, and of `real` and `phase` attention a share of 75 and 60 % forward, 60 and
45 % backward.
"""
COUNTS = ("barriers", "LDS", "STS", "LDSM", "SHFL", "MUFU", "FP32", "conversions", "spills", "instructions")


def page(table: dict[str, Any]) -> str:
    """docs/instructions.md: the 16-bit configurations of the table with their goals, and the rates."""
    heads = ("kernel", "matrix instructions", *COUNTS, "repeated", "bound", "share", "serial", "goals")
    lines = [INTRODUCTION.format(target=TARGET, triton=table["triton"])]
    reached = []
    for operation in OPERATIONS:
        lines += [f"## {operation}", "", *_header(heads)]
        for name, entry in table[operation][TARGET].items():
            if VARIANT.search(name):
                continue
            failed = missed(name, entry)
            reached.append(not failed)
            matrix = (f"{number} {'.'.join(kind.split('.')[:2])}" for kind, number in entry["matrix"].items())
            repeated, *shares = (f"{100 * entry[share]:.0f} %" for share in ("repeated", "share", "serial"))
            goals = "missed: " + ", ".join(failed) if failed else "met"
            counts = (entry[count] for count in COUNTS)
            cells = (
                name.removesuffix("_kernel"),
                ", ".join(matrix),
                *counts,
                repeated,
                entry["bound"],
                *shares,
                goals,
            )
            lines.append(_row(cells))
        lines.append("")
    lines += [f"{sum(reached)} of {len(reached)} configurations meet every goal.", "", "## Rates", ""]
    lines += _header(("pipe", "instructions", "a cycle and multiprocessor", "source"))
    for rate in (*RATES, ISSUE):
        names = rate.pattern.replace("|", ", ") or "all"
        lines.append(_row((rate.pipe, names, f"{rate.threads} threads", rate.source)))
    operands = "LDS, STS, LDSM, LDGSTS, operands of HGMMA"
    products = f"{MATRIX[16]} multiply-adds, {MATRIX[32]} of TF32"
    lines += [
        _row(("shared", operands, f"{SHARED_BYTES} bytes", "CUDA C++ Programming Guide, shared memory")),
        _row(("matrix", "HGMMA", products, WHITE_PAPER)),
        _row(("matrix", "HMMA", f"{OLDER} of that", "Luo et al., arXiv:2402.13499, on average")),
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _header(cells: tuple[str, ...]) -> list[str]:
    return [_row(cells), "|" + "---|" * len(cells)]


if __name__ == "__main__":
    print(page(json.loads(TABLE.read_text(encoding="utf-8"))), end="")
