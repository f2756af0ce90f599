"""Ahead-of-time compilation of the pinned configurations: registers, shared memory and spills, without a GPU.

``python -m kernels.resources`` brings resources.json up to date, and instructions.json, which instructions.py
is about. The compilation runs the same Python code as a launch, on tensors without storage, so that what is
compiled is what would be launched. Beside its numbers the tables keep the fingerprint of each entry: of all
that decides what is compiled but for the compiler. It tells without a compilation whether the numbers are
those of the present source, so that only what has changed is compiled anew; with ``--all``, or by another
version of Triton, everything is.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import instructions
from kernels.launch import TARGETS, Target, compiling_for
from kernels.triton_import import triton

TABLE = Path(__file__).with_suffix(".json")
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.bool: "*i1",
}

# Of a launch, for the compiler.
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")

Resources = dict[str, int]
Cases = Callable[[], dict[str, Callable[[], object]]]


class Launch(NamedTuple):
    """What decides about the compilation of a launch."""

    target: Target
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]  # warps, stages, and whether sums of products are contracted


def launches(target: Target, cases: dict[str, Callable[[], object]]) -> dict[str, list[Launch]]:
    """Every launch that the cases make for one target, by ``<label> <kernel>``.

    Args:
        target: the architecture.
        cases: what to call, by a label; each call gets tensors on ``meta`` only.
    """
    found: dict[str, list[Launch]] = {}
    for label, call in cases.items():

        def recorder(kernel: Any, arguments: Any, options: Any, label: str = label) -> None:
            name = f"{label} {kernel.__name__.strip('_')}"
            found.setdefault(name, []).append(specialise(target, kernel, arguments, options))

        with compiling_for(target, recorder), torch.device("meta"):
            call()
    return found


def specialise(target: Target, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """A launch as ``compiling_for`` hands it over, by the rules by which Triton specialises it.

    1 and None are constants, multiples of 16 are known as such.
    """
    own = {key: value for key, value in options.items() if key in OPTIONS}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        divisible = False
        specialises = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialises and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], divisible = POINTERS[value.dtype], True
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = specialises and value % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            raise TypeError(f"{kernel.__name__}: cannot compile for {name}={value!r}")
        if divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return Launch(target, kernel, signature, constants, attributes, own)


def compile_launch(launch: Launch) -> Any:
    """Triton's compiled kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = launch.target
    return triton.compile(
        ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes),
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options=launch.options,
    )


def resources(launched: list[Launch]) -> Resources:
    """Registers a thread, bytes of shared memory and of spills: the most that any of the launches needs."""
    most: Resources = {}
    for launch in launched:
        compiled = compile_launch(launch)
        registers, spilled = _registers_and_spills(compiled, launch.target)
        found = {"registers": registers, "shared": compiled.metadata.shared, "spilled": spilled}
        most = {key: max(value, most.get(key, 0)) for key, value in found.items()}
    return most


def fingerprint(launched: list[Launch]) -> str:
    """Of all that decides what the launches compile to but for the compiler."""
    digest = hashlib.sha256()
    for target, kernel, *specialisation in launched:
        architecture = (target.backend, target.arch, target.warp_size)
        digest.update(repr((architecture, source(kernel), specialisation)).encode())
    return digest.hexdigest()[:16]


@cache
def source(function: Any) -> str:
    """The tokens of a jit function, of all that it calls and of the constants that it reads.

    Without comments, docstrings and the positions of lines. A tree would look different in another Python.
    """
    functions, found = [function], []
    for one in functions:
        words = list(_tokens(one.src))
        found.append(" ".join(words))
        for word in words:
            value = one.__globals__.get(word)
            if isinstance(value, triton.JITFunction) and value not in functions:
                functions.append(value)
            elif isinstance(value, triton.language.constexpr):
                found.append(f"{word} = {value.value!r}")
    return "\n".join(found)


def _tokens(text: str) -> Iterator[str]:
    starting = True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            continue
        # A string that begins a statement is a docstring.
        if starting and token.type in (tokenize.STRING, tokenize.NEWLINE):
            continue
        starting = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        yield tokenize.tok_name[token.type] if starting else token.string


def _registers_and_spills(compiled: Any, target: Target) -> tuple[int, int]:
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        count, spills = (
            int(re.search(rf"\.vgpr_{what}:\s+(\d+)", text)[1])  # type: ignore[index]
            for what in ("count", "spill_count")
        )
        return count, 4 * spills
    usage = _dumped(compiled, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2])


def _dumped(compiled: Any, what: str) -> str:
    """What cuobjdump says about a compiled kernel."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not program.exists():
        raise SystemExit(f"kernels.resources needs cuobjdump, which this Triton lacks: there is no {program}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [str(program), what, cubin.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loop(launched: list[Launch]) -> dict[str, Any]:
    """What the innermost loop of a kernel asks of a multiprocessor: of the launches that with the longest."""
    distinct = {fingerprint([launch]): launch for launch in launched}.values()
    found = [
        instructions.describe(
            _dumped(compiled, "--dump-sass"),
            compiled.metadata.num_warps,
            instructions.work_of(compiled.asm["ttir"]),
        )
        for compiled in map(compile_launch, distinct)
    ]
    return max(found, key=lambda entry: int(entry["instructions"]))


def operations() -> dict[str, Cases]:
    """The launches to compile, by operation."""
    names = sorted(path.parent.name for path in Path(__file__).parent.glob("*/triton_code.py"))
    files = {name: import_module(f"kernels.{name}.triton_code") for name in names}
    return {name: file.compile_cases for name, file in files.items()}


def renew(
    path: Path,
    targets: Sequence[Target],
    cases: dict[str, Cases],
    measure: Callable[[list[Launch]], dict[str, Any]],
    everything: bool,
) -> None:
    """Bring a table, by operation, target and launch, up to date."""
    committed = json.loads(path.read_text(encoding="utf-8"))
    if everything or committed["triton"] != triton.__version__:
        committed = {}
    table: dict[str, Any] = {"triton": triton.__version__}
    for operation, made in cases.items():
        table[operation] = {}
        for target in targets:
            known = committed.get(operation, {}).get(target.name, {})
            entries = table[operation][target.name] = {}
            for name, launched in launches(target, made()).items():
                own = fingerprint(launched)
                if known.get(name, {}).get("fingerprint") == own:
                    entries[name] = known[name]
                    continue
                print(f"{operation} for {target.name}: {name}", file=sys.stderr, flush=True)
                entries[name] = {"fingerprint": own, **measure(launched)}
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def disassembled() -> tuple[list[Target], dict[str, Cases]]:
    """Targets and operations, with their cases, whose loops are in instructions.json."""

    def in_16_bits(cases: Cases) -> dict[str, Callable[[], object]]:
        return {label: call for label, call in cases().items() if instructions.IN_16_BITS.search(label)}

    own = [target for target in TARGETS if target.name == instructions.TARGET]
    found = operations()
    return own, {name: partial(in_16_bits, found[name]) for name in instructions.OPERATIONS}


def main(everything: bool) -> None:
    """Bring both tables up to date."""
    renew(TABLE, TARGETS, operations(), resources, everything)
    renew(instructions.TABLE, *disassembled(), loop, everything)


if __name__ == "__main__":
    main("--all" in sys.argv[1:])
