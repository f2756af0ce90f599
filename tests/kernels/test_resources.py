"""The committed table is what the present source compiles to, and everything fits its target."""

from __future__ import annotations

import json

import pytest

from kernels import instructions, resources
from kernels.complex_attention import triton_code as complex_attention
from kernels.launch import TARGETS
from kernels.resources import TABLE, Launch, fingerprint, launches, operations, source
from kernels.triton_import import triton

COMMITTED = json.loads(TABLE.read_text(encoding="utf-8"))
INSTRUCTIONS = json.loads(instructions.TABLE.read_text(encoding="utf-8"))
OPERATIONS = sorted(operations())
BY_NAME = {target.name: target for target in TARGETS}


@pytest.fixture
def launch() -> Launch:
    """One that calls others, two deep."""
    found = launches(BY_NAME["sm_80"], operations()["complex_attention"]())
    return found["phase 16 bits, d=16 forward_kernel"][0]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_the_table_is_of_the_present_source_and_fits(operation, target):
    table = COMMITTED[operation][target.name]
    found = launches(target, operations()[operation]())
    assert list(found) == list(table), "run python -m kernels.resources"
    changed = [name for name in found if fingerprint(found[name]) != table[name]["fingerprint"]]
    assert not changed, "run python -m kernels.resources"
    assert [name for name, entry in table.items() if entry["shared"] > target.shared_limit] == []


@pytest.mark.parametrize("operation", instructions.OPERATIONS)
def test_the_table_of_instructions_is_of_the_present_source(operation):
    (target,), cases = resources.disassembled()
    table = INSTRUCTIONS[operation][target.name]
    found = launches(target, cases[operation]())
    assert list(found) == list(table), "run python -m kernels.resources"
    changed = [name for name in found if fingerprint(found[name]) != table[name]["fingerprint"]]
    assert not changed, "run python -m kernels.resources"


SMALL = (
    ("complex_attention", "real 16 bits, d=16 query_gradient_kernel"),
    ("symplectic", "bfloat16 64 silu adjoint_kernel"),
)


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        *SMALL,
        *(
            pytest.param(operation, name, marks=pytest.mark.slow)
            for operation in instructions.OPERATIONS
            for name in INSTRUCTIONS[operation][instructions.TARGET]
            if (operation, name) not in SMALL
        ),
    ],
)
def test_loops_compile_to_the_table_of_instructions(operation, name):
    if triton.__version__ != INSTRUCTIONS["triton"]:
        pytest.skip("another version of the compiler chooses otherwise")
    (target,), cases = resources.disassembled()
    label = name.rpartition(" ")[0]
    launched = launches(target, {label: cases[operation]()[label]})[name]
    table = INSTRUCTIONS[operation][target.name][name]
    assert {"fingerprint": fingerprint(launched), **resources.loop(launched)} == table


def test_a_triton_without_cuobjdump_is_told_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(triton, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(
        SystemExit, match=r"needs cuobjdump, which this Triton lacks: there is no .*cuobjdump$"
    ):
        resources._dumped(None, "--dump-sass")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(OPERATIONS)), ids=OPERATIONS)
def test_the_smallest_launches_compile_to_the_table(number):
    """Of each kernel the one with the fewest registers, for one CUDA target and for HIP."""
    operation = OPERATIONS[number]
    for target in (TARGETS[number % 4], BY_NAME["gfx942"]):
        table = COMMITTED[operation][target.name]
        found = launches(target, operations()[operation]())
        by_size = sorted(table, key=lambda name: table[name]["registers"], reverse=True)
        smallest = {name.rpartition(" ")[2]: name for name in by_size}
        for name in smallest.values():
            made = {"fingerprint": fingerprint(found[name]), **resources.resources(found[name])}
            assert made["shared"] <= target.shared_limit, name
            # Another version of the compiler allocates otherwise.
            if triton.__version__ == COMMITTED["triton"]:
                assert made == table[name], f"{name}: run python -m kernels.resources --all"


def test_a_fingerprint_is_of_everything_that_decides(launch):
    others = [
        launch._replace(target=BY_NAME["sm_90"]),
        launch._replace(kernel=complex_attention._query_gradient_kernel),
        launch._replace(signature=launch.signature | {"q": "*fp16"}),
        launch._replace(constants=launch.constants | {"BLOCK_N": 8}),
        launch._replace(attributes={}),
        launch._replace(options=launch.options | {"num_warps": 16}),
    ]
    assert len({fingerprint([one]) for one in (launch, *others)}) == 1 + len(others)
    assert fingerprint([launch, others[0]]) != fingerprint([launch])


def test_a_fingerprint_is_of_what_a_kernel_calls_and_reads(launch, monkeypatch):
    before = source.__wrapped__(launch.kernel)
    with monkeypatch.context() as change:
        # Called by _attend, which the kernel calls.
        change.setattr(complex_attention, "_visible", complex_attention._place)
        assert source.__wrapped__(launch.kernel) != before
    monkeypatch.setattr(complex_attention, "LOG2_E", triton.language.constexpr(1.0))
    assert source.__wrapped__(launch.kernel) != before


def test_comments_and_docstrings_do_not_count():
    plain = "def f(x):\n    return (x + 1)\n"
    explained = 'def f(x):\n    """One more."""\n\n    # A comment.\n    return (  # Another.\n  x + 1)\n'
    assert list(resources._tokens(plain)) == list(resources._tokens(explained))
    assert list(resources._tokens(plain)) != list(resources._tokens(plain.replace("1", "2")))
    # What stands in a block and what follows it.
    inside, behind = (
        f"def f(x):\n    if x:\n        x = 1\n{indent}x = 2\n" for indent in (" " * 8, " " * 4)
    )
    assert list(resources._tokens(inside)) != list(resources._tokens(behind))


def test_only_what_changed_is_compiled_anew(monkeypatch, tmp_path):
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    name, other = list(table["complex_linear"]["sm_90"])[:2]
    table["complex_linear"]["sm_90"][name]["fingerprint"] = "of other source"
    del table["complex_linear"]["sm_90"][other]
    path = tmp_path / "resources.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    compiled = []

    def compile_all(launched):
        compiled.append(launched)
        return {"registers": 0, "shared": 0, "spilled": 0}

    monkeypatch.setattr(resources, "TABLE", path)
    monkeypatch.setattr(resources, "disassembled", lambda: ([], {}))
    monkeypatch.setattr(instructions, "TABLE", tmp_path / "instructions.json")
    instructions.TABLE.write_text('{"triton": ""}', encoding="utf-8")
    monkeypatch.setattr(resources, "resources", compile_all)
    resources.main(everything=False)
    assert len(compiled) == 2
    written = json.loads(path.read_text(encoding="utf-8"))
    assert list(written["complex_linear"]["sm_90"]) == list(COMMITTED["complex_linear"]["sm_90"])
    for one in (name, other):
        entry = written["complex_linear"]["sm_90"].pop(one)
        expected = COMMITTED["complex_linear"]["sm_90"][one]["fingerprint"]
        assert entry == {"fingerprint": expected, "registers": 0, "shared": 0, "spilled": 0}
        table["complex_linear"]["sm_90"].pop(one, None)
    assert written == table
    compiled.clear()
    resources.main(everything=True)
    assert len(compiled) == sum(len(own) for op in OPERATIONS for own in table[op].values()) + 2
