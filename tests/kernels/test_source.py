"""Rules that the source of the Triton kernels keeps, whatever runs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kernels

FILES = sorted(Path(kernels.__file__).parent.glob("*.py"))


def called(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """The calls of functions of a module, by the function's name."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(call.func.attr, call) for call in calls if isinstance(call.func, ast.Attribute)]


def precision(call: ast.Call) -> object:
    given = {keyword.arg: keyword.value for keyword in call.keywords}.get("input_precision")
    return given.value if isinstance(given, ast.Constant) else None


def broken_rules(source: str) -> list[str]:
    tree = ast.parse(source)
    found = [
        f"line {call.lineno}: {name}"
        for name, call in called(tree)
        if (name.startswith("dot") and precision(call) in (None, "tf32"))
        or name.startswith("atomic_")
        or name == "make_block_ptr"
    ]
    # No way around: every one of them is called as tl.<name>.
    imported = [
        n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and "triton.language" in str(n.module)
    ]
    return found + [f"line {node.lineno}: import" for node in imported]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_products_are_not_tf32_and_sums_have_one_order(path):
    assert broken_rules(path.read_text(encoding="utf-8")) == []


def test_the_kernels_multiply():
    """Or the test above looks for the wrong thing."""
    products = {
        path.stem: sum(name == "dot" for name, _ in called(ast.parse(path.read_text(encoding="utf-8"))))
        for path in FILES
    }
    assert {name for name, count in products.items() if count} == {
        "complex_attention",
        "complex_linear",
        "symplectic",
    }


@pytest.mark.parametrize(
    "line",
    [
        "tl.dot(a, b)",
        "tl.dot(a, b, acc, input_precision='tf32')",
        "tl.dot(a, b, input_precision=PRECISION)",
        "tl.atomic_add(pointer, value)",
        "tl.make_block_ptr(pointer)",
        "from triton.language import dot",
    ],
)
def test_a_broken_rule_is_found(line):
    assert len(broken_rules(line)) == 1
