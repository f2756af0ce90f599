"""Options of the command line: how a dataclass declares one; how it is checked, described and looked up."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from muse.errors import ConfigError

T = TypeVar("T")
TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
BOUNDS = {
    "at_least": ("at least", operator.ge),
    "above": ("greater than", operator.gt),
    "at_most": ("at most", operator.le),
    "below": ("below", operator.lt),
}
# Names that a message offers in place of one that is not known.
NEAREST = 3


@dataclass(frozen=True)
class Option:
    """One option.

    What it says of the value holds for each one of a list.

    Attributes:
        meaning: what ``--help`` says of it.
        choices: the values it may have, or how they follow from the dataclass it is in.
        at_least, above, at_most, below: bounds of a number, which must be finite then.
        characters: the longest text it may have; the shortest has one.
        items: how many values its list must hold.
        refusal: how an error that names the value goes on, with the bounds in place of the braces.
        given_as: how the command line gives it, where that is not by its path.
        type: its annotation; a dataclass for a group of options.
    """

    meaning: str = ""
    choices: tuple[Any, ...] | Callable[[Any], tuple[Any, ...]] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    characters: int | None = None
    items: int | None = None
    refusal: str = ""
    given_as: str | None = None
    type: Any = None

    @property
    def bounds(self) -> str:
        """Its bounds in words, as in ``at least 0 and below 1``; empty where there are none."""
        if self.at_least is not None and self.at_most is not None:
            return f"between {self.at_least:g} and {self.at_most:g}"
        bounds = {words: getattr(self, name) for name, (words, _) in BOUNDS.items()}
        return " and ".join(f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None)

    def broken_bounds(self, value: float) -> list[str]:
        """Those of its bounds that a number is not within."""
        bounds = {name: getattr(self, name) for name in BOUNDS}
        return [
            name for name, bound in bounds.items() if bound is not None and not BOUNDS[name][1](value, bound)
        ]


def option(default: T, meaning: str, **declared: Any) -> T:
    """The field of a dataclass that is an option, with what else ``Option`` says of one."""
    metadata = {"option": Option(meaning, **declared)}
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        made = dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
        return typing.cast(T, made)
    return typing.cast(T, dataclasses.field(default=default, metadata=metadata))


def check_options(group: Any, path: str = "") -> None:
    """See that each option of a dataclass has a value that it may have.

    Args:
        group: the dataclass.
        path: of the group; empty for the options of a run itself.

    Raises:
        ConfigError: one has not; names it, its value and what is allowed.
    """
    for field in dataclasses.fields(group):
        declared, value = field.metadata.get("option"), getattr(group, field.name)
        if declared is not None and (value is not None or field.default is not None):
            name = declared.given_as or f"{path}.{field.name}".removeprefix(".")
            _check(name, value, declared, allowed_values(group, field.name))


def _check(name: str, value: Any, declared: Option, choices: tuple[str, ...]) -> None:
    if isinstance(value, list):
        if declared.items not in (None, len(value)):
            raise ConfigError(f"{name}={value} must hold {declared.items} values")
        if choices and not value:
            raise ConfigError(f"{name}={value} must hold one of {', '.join(choices)}")
        for item in value:
            _check(name, item, declared, choices)
    elif choices and str(value) not in choices:
        raise ConfigError(f"{name}={value} is not known; choose one of {', '.join(choices)}")
    elif declared.characters is not None and not 1 <= len(value) <= declared.characters:
        raise ConfigError(f"{name}={value} must have between 1 and {declared.characters} characters")
    elif declared.bounds and not math.isfinite(value):
        raise ConfigError(f"{name}={value} is not allowed; it must be a finite number, {declared.bounds}")
    elif broken := declared.broken_bounds(value):
        wrong = "too small" if broken == ["at_least"] else "not allowed"
        refusal = declared.refusal or f"is {wrong}; it must be {{}}"
        raise ConfigError(f"{name}={value} {refusal.format(declared.bounds)}")


def changed(config: T, **groups: Mapping[str, Any]) -> T:
    """``config``, of a run, with other values for some options of some of its groups."""
    made: Any = config
    new = {name: dataclasses.replace(getattr(made, name), **options) for name, options in groups.items()}
    return typing.cast(T, dataclasses.replace(made, **new))


def options_of(schema: type, prefix: str = "") -> dict[str, Option]:
    """Every option of a dataclass by its path (``train.steps``), groups before what is in them."""
    hints = typing.get_type_hints(schema)
    found = {}
    for field in dataclasses.fields(schema):
        kind, path = hints[field.name], prefix + field.name
        inner = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        declared = field.metadata.get("option") or Option(summary(kind) if inner else "")
        found[path] = dataclasses.replace(declared, type=kind)
        if inner:
            found |= options_of(kind, f"{path}.")
    return found


def summary(schema: type) -> str:
    """What the docstring of a dataclass says."""
    return " ".join((inspect.getdoc(schema) or "").replace("``", "").split())


def type_name(kind: Any) -> str:
    """How a type is told: ``a whole number or null``."""
    if isinstance(kind, types.UnionType):
        return " or ".join("null" if part is types.NoneType else type_name(part) for part in kind.__args__)
    if typing.get_origin(kind) is list:
        return "a list, as in [a,b]"
    if typing.get_origin(kind) is dict:
        inner = typing.get_args(kind)[1]
        value = "{...}" if dataclasses.is_dataclass(inner) else "..."
        return f"a mapping, as in {{a:{value},b:{value}}}"
    return TYPES.get(kind, "a group of options")


def allowed_values(group: Any, name: str) -> tuple[str, ...]:
    """The values that an option of a dataclass may have, as a command gives them, if it has but a few."""
    (field,) = (field for field in dataclasses.fields(group) if field.name == name)
    declared = field.metadata.get("option", Option())
    choices = declared.choices(group) if callable(declared.choices) else declared.choices
    return tuple(map(str, choices))


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
