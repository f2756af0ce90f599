"""Ahead-of-time compilation of the pinned configurations: registers, shared memory and spills, without a GPU.

``python -m kernels.resources`` writes resources.json anew. The compilation runs the same Python code as a
launch, on tensors without storage, so that what is compiled is what would be launched.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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

Resources = dict[str, int]


def compile_cases(target: Target, cases: dict[str, Callable[[], object]]) -> dict[str, Resources]:
    """Compile every launch that the cases make, for one target.

    Args:
        target: the architecture.
        cases: what to call, by a label; each call gets tensors on ``meta`` only.

    Returns:
        Registers a thread, bytes of shared memory and of spills by ``<label> <kernel>``.
    """
    found: dict[str, Resources] = {}
    for label, call in cases.items():

        def compiler(kernel: Any, arguments: Any, options: Any, label: str = label) -> None:
            name = f"{label} {kernel.__name__.strip('_')}"
            resources = _resources(compile_launch(target, kernel, arguments, options), target)
            before = found.get(name, resources)
            found[name] = {key: max(value, before[key]) for key, value in resources.items()}

        with compiling_for(target, compiler), torch.device("meta"):
            call()
    return found


def compile_launch(target: Target, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Triton's compiled kernel of one launch, as ``compiling_for`` hands it over."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    own = {key: options.pop(key) for key in ("num_warps", "num_stages") if key in options}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    # The rules by which the launch specialises: 1 and None are constants, multiples of 16 are known as such.
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        divisible = False
        specialised = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], divisible = POINTERS[value.dtype], True
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = specialised and value % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            raise TypeError(f"{kernel.__name__}: cannot compile for {name}={value!r}")
        if divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options=own,
    )


def _resources(compiled: Any, target: Target) -> Resources:
    registers, spilled = _registers_and_spills(compiled, target)
    return {"registers": registers, "shared": compiled.metadata.shared, "spilled": spilled}


def _registers_and_spills(compiled: Any, target: Target) -> tuple[int, int]:
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        count, spills = (
            int(re.search(rf"\.vgpr_{what}:\s+(\d+)", text)[1])  # type: ignore[index]
            for what in ("count", "spill_count")
        )
        return count, 4 * spills
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [str(program), "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2])


def operations() -> dict[str, Callable[[], dict[str, Callable[[], object]]]]:
    """The launches to compile, by kernel file."""
    from kernels import complex_attention, complex_linear, complex_pointwise, symplectic

    files = (complex_attention, complex_linear, complex_pointwise, symplectic)
    return {module.__name__.rpartition(".")[2]: module.compile_cases for module in files}


def _measure() -> Iterator[tuple[str, str, dict[str, Resources]]]:
    for operation, cases in operations().items():
        for target in TARGETS:
            print(f"{operation} for {target.name} ...", file=sys.stderr, flush=True)
            yield operation, target.name, compile_cases(target, cases())


def main() -> None:
    """Write the table."""
    table: dict[str, Any] = {"triton": triton.__version__}
    for operation, target, found in _measure():
        table.setdefault(operation, {})[target] = found
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
