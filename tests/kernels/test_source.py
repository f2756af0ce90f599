"""Rules that the source of the Triton kernels keeps, whatever runs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kernels

FOLDER = Path(kernels.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(FOLDER).with_suffix("").parts)


def called(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """The calls of functions of a module, by the function's name."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(call.func.attr, call) for call in calls if isinstance(call.func, ast.Attribute)]


def precisions(call: ast.Call, tree: ast.AST) -> set[object]:
    """What the precision of a product may be: a literal, or PRECISION, which is what _precision returns."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}.get("input_precision")
    if isinstance(given, ast.Name) and given.id == "PRECISION":
        makers = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "_precision"]
        returned = [n.value for maker in makers for n in ast.walk(maker) if isinstance(n, ast.Return)]
        choices = [
            part for x in returned for part in ((x.body, x.orelse) if isinstance(x, ast.IfExp) else (x,))
        ]
    else:
        choices = [given]
    return {choice.value if isinstance(choice, ast.Constant) else None for choice in choices} or {None}


def broken_rules(source: str) -> list[str]:
    tree = ast.parse(source)
    found = [
        f"line {call.lineno}: {name}"
        for name, call in called(tree)
        if (name.startswith("dot") and precisions(call, tree) & {None, "tf32"})
        or name.startswith("atomic_")
        or name == "make_block_ptr"
    ]
    # No way around: every one of them is called as tl.<name>.
    imported = [
        n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and "triton.language" in str(n.module)
    ]
    return found + [f"line {node.lineno}: import" for node in imported]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_products_are_not_tf32_and_sums_have_one_order(path):
    assert broken_rules(path.read_text(encoding="utf-8")) == []


def test_the_kernels_multiply():
    """Or the test above looks for the wrong thing."""
    products = {
        name_of(path): sum(name == "dot" for name, _ in called(ast.parse(path.read_text(encoding="utf-8"))))
        for path in FILES
    }
    assert {name for name, count in products.items() if count} == {
        "complex_attention.triton_code",
        "complex_linear.triton_code",
        "linear_cross_entropy.triton_code",
        "symplectic.triton_code",
    }


@pytest.mark.parametrize(
    "line",
    [
        "tl.dot(a, b)",
        "tl.dot(a, b, acc, input_precision='tf32')",
        "tl.dot(a, b, input_precision=PRECISION)",
        "def _precision(): return 'tf32' if wide else 'ieee'\ntl.dot(a, b, input_precision=PRECISION)",
        "tl.dot(a, b, input_precision=other)",
        "tl.atomic_add(pointer, value)",
        "tl.make_block_ptr(pointer)",
        "from triton.language import dot",
    ],
)
def test_a_broken_rule_is_found(line):
    assert len(broken_rules(line)) == 1


def test_three_products_in_tf32_are_allowed():
    line = "def _precision(): return 'tf32x3' if narrow else 'ieee'\ntl.dot(a, b, input_precision=PRECISION)"
    assert broken_rules(line) == []
