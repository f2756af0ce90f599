"""What the dataclasses of muse.config say of each option: its type, its meaning, the values it may have."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from muse.errors import ValueUnknown

TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
# Names that a message offers in place of one that is not known.
NEAREST = 3


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        type: its annotation; a dataclass for a group of options.
        meaning: what the docstring of its dataclass says.
    """

    type: Any
    meaning: str


def options_of(schema: type, prefix: str = "") -> dict[str, Option]:
    """Every option of a dataclass by its path (``train.steps``), groups before what is in them."""
    hints, meanings = typing.get_type_hints(schema), meanings_of(schema)
    found = {}
    for field in dataclasses.fields(schema):
        kind, path = hints[field.name], prefix + field.name
        inner = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        found[path] = Option(kind, meanings.get(field.name) or (summary(kind) if inner else ""))
        if inner:
            found |= options_of(kind, f"{path}.")
    return found


def summary(schema: type) -> str:
    """What the docstring of a dataclass says before its attributes."""
    return _plain((inspect.getdoc(schema) or "").partition("Attributes:\n")[0])


def meanings_of(schema: type) -> dict[str, str]:
    """What the docstrings of a dataclass and of those it extends say of each attribute."""
    meanings = {}
    for kind in reversed(schema.__mro__):
        listed = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", listed, re.MULTILINE):
            meanings[name] = _plain(text)
    return meanings


def type_name(kind: Any) -> str:
    """How a type is told: ``a whole number or null``."""
    if isinstance(kind, types.UnionType):
        return " or ".join("null" if part is types.NoneType else type_name(part) for part in kind.__args__)
    if typing.get_origin(kind) is list:
        return "a list, as in [a,b]"
    return TYPES.get(kind, "a group of options")


def allowed_values(group: Any, name: str) -> tuple[str, ...]:
    """The values that an option of a checked dataclass may have, if it has but a few; its check says them."""
    impossible = ["?"] if isinstance(getattr(group, name), list) else "?"
    try:
        dataclasses.replace(group, **{name: impossible})
    except ValueUnknown as error:
        return error.allowed
    except (TypeError, ValueError):
        pass
    return ()


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The names most like ``name``, by all of it or by what follows the last dot."""
    known = list(known)

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, name, other).ratio()
        last = difflib.SequenceMatcher(None, name.split(".")[-1], other.split(".")[-1]).ratio()
        # The same name in another group is nearer than another name.
        return max(whole, 0.9 * last)

    alike = sorted(((likeness(other), other) for other in known), key=lambda pair: -pair[0])
    return [other for ratio, other in alike[:NEAREST] if ratio >= 0.6]


def _plain(text: str) -> str:
    return " ".join(text.replace("``", "").split())
