"""What ``--help`` says of groups and options: the declarations of muse.config and the comments in conf/."""

from __future__ import annotations

import copy
import dataclasses
import textwrap
import typing
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from muse.config import BenchConfig, build_config
from muse.errors import ConfigError
from muse.options import Option, allowed_values, nearest, options_of, type_name

WIDTH = 100
# Of names and values, before their meaning.
NAME_WIDTH = 30


def help_text(composed: DictConfig, topics: list[str]) -> str:
    """All groups and options, or those that ``topics`` names, each with its value in ``composed``.

    Raises:
        ConfigError: there is no such group or option.
    """
    loader = GlobalHydra.instance().config_loader()
    options = options_of(_schema(composed))
    if not topics:
        return _overview(composed, options, loader)
    return "\n\n".join(_topic(topic, composed, options, loader) for topic in topics)


def _overview(composed: DictConfig, options: dict[str, Option], loader: ConfigLoader) -> str:
    texts = composed.hydra.help
    command = f"python {texts.app_name} --help"
    lines = [texts.header, f"== Groups: group=choice; {command} <group> tells what each choice is =="]
    lines += [_row(group, ", ".join(loader.get_group_options(group))) for group in _groups(options, loader)]
    lines += ["", "== Options: path=value; with --help <path> the values allowed, too =="]
    for path, option in options.items():
        if dataclasses.is_dataclass(option.type):
            lines += ["", textwrap.fill(f"{path}: {option.meaning}", WIDTH)]
        elif "." not in path and lines[-1].startswith("  "):
            lines += ["", _row(f"{path}={_value(composed, path)}", option.meaning)]
        else:
            lines.append(_row(f"{path}={_value(composed, path)}", option.meaning))
    return "\n".join([*lines, "", texts.footer])


def _topic(topic: str, composed: DictConfig, options: dict[str, Option], loader: ConfigLoader) -> str:
    choices = loader.get_group_options(topic)
    if topic not in options and not choices:
        alike = nearest(topic, dict.fromkeys([*options, *_groups(options, loader)]))
        instead = f"the nearest are {', '.join(alike)}" if alike else "--help lists all"
        raise ConfigError(f"--help {topic}: there is no such group or option; {instead}")
    option, config = options.get(topic), _built(composed)
    if option is not None and not dataclasses.is_dataclass(option.type):
        return "\n".join(_with_allowed_values(topic, option, composed, config))
    lines = [textwrap.fill(f"{topic}: {option.meaning}", WIDTH)] if option is not None else []
    if choices:
        lines += ["", f"== Choices: {topic}=<choice> =="]
        lines += [_row(choice, _comment(topic, choice, loader)) for choice in choices]
    inner = [path for path in options if path.startswith(f"{topic}.")]
    if inner:
        lines += ["", "== Options, with their values =="]
    for path in inner:
        if not dataclasses.is_dataclass(options[path].type):
            lines += _with_allowed_values(path, options[path], composed, config)
    return "\n".join(lines)


def _with_allowed_values(path: str, option: Option, composed: DictConfig, config: Any) -> list[str]:
    """An option with its meaning, and below that what it may be."""
    *parents, name = path.split(".")
    node = composed
    for parent in parents:
        node, config = node[parent], getattr(config, parent)
    values = allowed_values(config, name)
    may_be = f"one of {', '.join(values)}" if values else type_name(option.type)
    limits = option.bounds or (f"of 1 to {option.characters} characters" if option.characters else "")
    if limits:
        each = "each " if typing.get_origin(option.type) is list else ""
        may_be += f", {each}{limits}"
    if OmegaConf.is_interpolation(node, name):
        written = OmegaConf.to_container(node, resolve=False)
        assert isinstance(written, dict)
        may_be += f"; {str(written[name]).strip('${}')} unless given"
    return [_row(f"{path}={_value(composed, path)}", option.meaning), _row("", f"[{may_be}]")]


def _built(composed: DictConfig) -> Any:
    """The dataclass of what is composed, or its defaults where the options are not allowed as they are."""
    options = copy.deepcopy(composed)
    with open_dict(options):
        options.pop("hydra")
    try:
        return build_config(options)
    except ConfigError:
        return _schema(options)()


def _schema(composed: DictConfig) -> type:
    schema = OmegaConf.get_type(composed)
    assert schema is not None
    return schema


def _value(composed: DictConfig, path: str) -> str:
    return _as_given(OmegaConf.select(composed, path))


def _as_given(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, ListConfig):
        return f"[{','.join(map(_as_given, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _groups(options: dict[str, Option], loader: ConfigLoader) -> list[str]:
    """The groups that files are chosen of."""
    others = {field.name for field in dataclasses.fields(BenchConfig)} - set(options)
    there = [group for group in loader.list_groups("") if group != "hydra" and group not in others]
    return sorted(there, key=[*options, *there].index)


def _comment(group: str, choice: str, loader: ConfigLoader) -> str:
    """The first sentence of the comment that a file of configuration begins with."""
    for source in loader.get_sources():
        file = Path(source.path, group, f"{choice}.yaml")
        if source.scheme() == "file" and file.exists():
            lines = []
            for line in file.read_text(encoding="utf-8").splitlines():
                if not line.startswith("#"):
                    break
                if not line.startswith("# @package"):
                    lines.append(line.removeprefix("#").strip())
            return " ".join(lines).partition(". ")[0].removesuffix(".")
    return ""


def _row(left: str, right: str) -> str:
    """A name, and beside it, or below where it is long, what it means."""
    wrapped = textwrap.wrap(right, WIDTH - NAME_WIDTH - 4, break_on_hyphens=False) or [""]
    indent = " " * (NAME_WIDTH + 4)
    if len(left) > NAME_WIDTH:
        return "\n".join([f"  {left}", *(indent + line for line in wrapped)])
    first = f"  {left:{NAME_WIDTH}}  {wrapped[0]}"
    return "\n".join([first.rstrip(), *(indent + line for line in wrapped[1:])])
