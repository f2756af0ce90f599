"""How Hydra composes the options of a run: what it is given wrongly is told in one sentence.

All that Hydra composes goes through its ConfigLoader: what a command is given, and each cell of a sweep, in
its workers, too. The one here replaces it. Stock Hydra reads ``stage=1`` as a whole number and then refuses
it as the name of a file; takes ``+foo=1`` for an option though nothing reads it; and leaves out a group on
request, so that the defaults of its dataclass hold without a word.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import shlex
import typing
from collections.abc import Iterator
from typing import Any

import hydra._internal.hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository, IConfigRepository
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import InputDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, OverrideType, Quote, QuotedString, ValueType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from muse.config import BenchConfig, register_schemas
from muse.errors import ConfigError
from muse.options import Option, nearest, options_of, type_name
from muse.runs.options import BY_NAME

# Options of a sweeper whose values are what is swept over, written as on the command line.
SWEEPER_PARAMS = "hydra.sweeper.params"
# Groups of a run of which several files may be chosen at once, and the one file that stands alone.
ALONE = {"logger": "none"}
# Stages of the documents that are no models: what does them. The benchmarks may be called so.
COMMANDS = {
    "3b": "python -m muse.serve RUN",
    "3c": "python bench.py benchmark=deployment",
    "3d": "python bench.py benchmark=serving",
}
# What Hydra raises where options or files of configuration are wrong.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError)


def prepare_hydra() -> None:
    """Make the schemas known to Hydra, and let it compose as this module does."""
    register_schemas()
    hydra._internal.hydra.ConfigLoaderImpl = Loader  # type: ignore[misc]


class Loader(ConfigLoaderImpl):
    """Composes like Hydra's own; what is wrong raises ConfigError."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.repository = _Repository(config_search_path)

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Compose a configuration.

        Raises:
            ConfigError: naming the option that is wrong.
        """
        if config_name == "bench":
            overrides = list(map(_without_names_of_documents, overrides))
        parsed, repo = self._parse_overrides_and_create_caching_repo(config_name, overrides)
        for line, override in zip(overrides, parsed, strict=True):
            _check_form(line, override, repo, run_mode if validate_sweep_overrides else None)
        try:
            composed = super().load_configuration(
                config_name, overrides, run_mode, from_shell, validate_sweep_overrides
            )
        except ConfigError:
            raise
        except COMPOSITION_ERRORS as error:
            raise ConfigError(self._reason(error, config_name, parsed, repo)) from error
        swept = self._sweeper_overrides(composed, repo) if run_mode == RunMode.MULTIRUN else []
        for path in _undeclared_paths(composed):
            given = next((item for item in parsed if _same_branch(item.key_or_group, path)), None)
            subject = path if given is None else str(given.input_line)
            raise ConfigError(_unknown(subject, path, _known_names(composed, path, repo)))
        for override in [*parsed, *swept]:
            if override.is_sweep_override() and not _is_choice(override, repo):
                _check_swept(override, composed, repo)
        return composed

    def _parse_overrides_and_create_caching_repo(
        self, config_name: str | None, overrides: list[str]
    ) -> tuple[list[Override], CachingConfigRepository]:
        try:
            parsed, repo = super()._parse_overrides_and_create_caching_repo(config_name, overrides)
        except OverrideParseException as error:
            raise ConfigError(_unreadable(error.override)) from error
        defaulted: set[str] | None = None
        for number, override in enumerate(parsed):
            if override.is_add() or override.is_force_add():
                defaulted = defaulted or _groups_of(config_name, repo)
            parsed[number] = _normalised(override, repo, defaulted or set())
        return parsed, repo

    def _compose_config_from_defaults_list(self, defaults: Any, repo: Any) -> DictConfig:
        composed = super()._compose_config_from_defaults_list(defaults, repo)
        sweeper = OmegaConf.select(composed, "hydra.sweeper")
        if sweeper is not None and "params" in sweeper and sweeper.params is None:
            # Nothing can be added to null.
            sweeper.params = {}
        return composed

    def _sweeper_overrides(self, composed: DictConfig, repo: CachingConfigRepository) -> list[Override]:
        """What a sweeper's own options sweep over, whose values are then as if given on the command line."""
        swept = OmegaConf.select(composed, SWEEPER_PARAMS) or {}
        parsed = []
        for name, value in list(swept.items()):
            try:
                override = OverridesParser.create().parse_overrides([f"{name}={value}"])[0]
            except OverrideParseException as error:
                raise ConfigError(_unreadable(error.override)) from error
            parsed.append(_normalised(override, repo, set()))
            if _is_choice(override, repo):
                swept[name] = parsed[-1].get_value_string()
        return parsed

    def _reason(
        self,
        error: Exception,
        config_name: str | None,
        parsed: list[Override],
        repo: CachingConfigRepository,
    ) -> str:
        """What is wrong, in one sentence that names the option."""
        found = re.match("In '([^']+)'", str(error))
        file = f" (in {found[1]})" if found and found[1] != config_name else ""
        if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
            group, _, name = error.missing_cfg_file.rpartition("/")
            return _unknown_choice(group, name, error.options, file)
        choices = [item for item in parsed if _is_choice(item, repo) and not item.is_sweep_override()]
        known = self._composed_of(config_name, choices) or self._composed_of(config_name, [])
        if known is None:
            return one_line(error)
        # Of a group that the command does not have.
        if file and (chosen := re.search("Could not override '([^']+)'", str(error))):
            return _unknown(f"{chosen[1]}{file}", chosen[1], _known_names(known, "", repo))
        for item in choices:
            if not item.is_add() and item.key_or_group not in _groups_of(config_name, repo):
                return _unknown(str(item.input_line), item.key_or_group, _known_names(known, "", repo))
        chain = (error, error.__cause__, error.__context__)
        cause = next((one for one in chain if isinstance(one, OmegaConfBaseException) and one.full_key), None)
        if cause is None:
            return one_line(error)
        key = str(cause.full_key)
        branches = [item for item in parsed if _same_branch(item.key_or_group, key)]
        given = max(branches, key=lambda item: len(item.key_or_group), default=None)
        if given is not None and given.key_or_group.startswith(key):
            key = given.key_or_group
        of_file = bool(file) and not (given is not None and _is_choice(given, repo))
        subject = str(given.input_line) if given is not None and not of_file else f"{key}{file}"
        if isinstance(cause, ConfigAttributeError | ConfigKeyError):
            within = _mapping_of(key) is not None
            return _unknown(key if within else subject, key, _known_names(known, key, repo))
        return _not_allowed(subject, key, cause)

    def _composed_of(self, config_name: str | None, choices: list[Override]) -> DictConfig | None:
        lines = [str(item.input_line) for item in choices]
        try:
            return super().load_configuration(config_name, lines, RunMode.MULTIRUN, True, False)
        except COMPOSITION_ERRORS:
            return None


class _Repository(ConfigRepository):
    """Reads files of configuration; in a defaults list ``stage: 1`` names a file, as ``stage: "1"`` does."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Repository:
        # Hydra copies it for each question that it asks, only so that the copy can be given other sources. A
        # deep copy of a source is one of all schemas.
        return copy.copy(self)

    def _create_defaults_list(self, config_path: str, defaults: ListConfig) -> list[InputDefault]:
        for item in defaults._iter_ex(resolve=False):
            if isinstance(item, DictConfig):
                for key, value in list(item.items_ex(resolve=False)):
                    if isinstance(value, ListConfig):
                        item[key] = names = [str(name) for name in value._iter_ex(resolve=False)]
                        group = str(key).split()[-1].partition("@")[0]
                        # Without the slash it is a group below the folder of the file.
                        absolute = group.startswith("/") or "/" not in config_path
                        if absolute and group.removeprefix("/") in _top_level_names():
                            _check_names(group.removeprefix("/"), names, self, f" (in {config_path})")
                    elif isinstance(value, int | float):
                        item[key] = str(value)
        return super()._create_defaults_list(config_path, defaults)


def one_line(error: BaseException) -> str:
    """What an error of Hydra or OmegaConf says, without what it adds about its own objects."""
    text = str(error) or str(error.__cause__)
    text = re.split(r"\n(?:Config search path|Search path|See https|    full_key)", text)[0]
    return " ".join(text.split())


def _without_names_of_documents(line: str) -> str:
    """``benchmark=deployment`` for ``stage=3c``, and the like."""
    found = re.fullmatch(r"""\+{0,2}stage=(['"]?)(3[cd])\1""", line)
    return COMMANDS[found[2]].split()[-1] if found else line


def _check_names(group: str, names: list[str], repo: IConfigRepository, file: str = "") -> None:
    """See that files of a group, chosen at once, exist and may be chosen together.

    Args:
        group: one of the configuration.
        names: of the files.
        repo: where they are.
        file: that chooses them, as a message tells it; empty for the command line.

    Raises:
        ConfigError: it is not so.
    """
    there = repo.get_group_options(group, ObjectType.CONFIG)
    for name in names:
        if not repo.config_exists(f"{group}/{name}") and "${" not in name:
            raise ConfigError(_unknown_choice(group, name, there, file))
    together, alone = f"[{','.join(names)}]", ALONE.get(group)
    if not names or (len(names) > 1 and group in _top_level_names() and alone is None):
        raise ConfigError(_unknown_choice(group, together, there, file))
    if alone in names and len(names) > 1:
        others = ", ".join(name for name in there if name != alone)
        raise ConfigError(
            f"{group}={together}{file} is not possible, since {alone} stands alone; choose {alone}, or one "
            f"or several of {others}"
        )


def _groups_of(config_name: str | None, repo: CachingConfigRepository) -> set[str]:
    """The groups that a configuration has by default."""
    defaults = create_defaults_list(
        repo=repo, config_name=config_name, overrides_list=[], prepend_hydra=True, skip_missing=True
    )
    return set(defaults.overrides.known_choices)


def _is_choice(override: Override, repo: CachingConfigRepository) -> bool:
    """Whether an override chooses a file of a group."""
    deleted, inline = override.is_delete(), isinstance(override.value(), dict)
    return not deleted and not inline and repo.group_exists(override.key_or_group)


def _normalised(override: Override, repo: CachingConfigRepository, defaulted: set[str]) -> Override:
    """An override in the one form of those that mean the same which stock Hydra reads as meant.

    The choice of a file is a text, in quotes where it would be read as something else, and so is each that is
    swept over, written one after the other. Several files of a group, in brackets, are one choice.
    """
    if not _is_choice(override, repo):
        group, dot, name = override.key_or_group.partition(f"{SWEEPER_PARAMS}.")
        if dot and not group and not override.is_delete():
            swept = override.value()
            text = override.get_value_string() if override.is_sweep_override() else str(swept)
            return dataclasses.replace(
                override,
                type=OverrideType.FORCE_ADD,
                key_or_group=SWEEPER_PARAMS,
                value_type=ValueType.ELEMENT,
                _value={name: QuotedString(text, Quote.single)},
            )
        option = _mapping_of(override.key_or_group)
        if option is not None and not override.is_delete() and not override.is_sweep_override():
            # Hydra itself adds to a mapping only with ++, and to one of dataclasses only all of one.
            inner = override.key_or_group.removeprefix(option).split(".")[1:]
            value: Any = override._value
            for name in reversed(inner):
                value = {name: value}
            if not isinstance(value, dict):
                kind = type_name(options_of(BenchConfig)[option].type)
                raise ConfigError(f"{override.input_line} is not allowed; {option} must be {kind}")
            return dataclasses.replace(
                override,
                type=OverrideType.FORCE_ADD,
                key_or_group=option,
                value_type=ValueType.ELEMENT,
                _value=value,
            )
        if override.is_add():
            return dataclasses.replace(override, type=OverrideType.FORCE_ADD)
        return override
    group, value = override.key_or_group, override.value()
    there = repo.get_group_options(group, ObjectType.CONFIG)
    choices: list[Any]
    if isinstance(value, Glob):
        include, exclude = (list(map(_as_name, globs)) for globs in (value.include, value.exclude))
        choices = Glob(include, exclude).filter(there)
    elif override.is_interval_sweep():
        choices = [override.get_value_string()]
    elif override.is_sweep_override():
        choices = [Override._convert_value(choice) for choice in override.sweep_iterator()]
    else:
        choices = [value]
    if not choices:
        raise ConfigError(_unknown_choice(group, override.get_value_string(), there))
    texts = []
    for choice in choices:
        names = [_as_name(name) for name in (choice if isinstance(choice, list) else [choice])]
        names = list(dict.fromkeys(names))
        _check_names(group, names, repo)
        text = ",".join(map(_quoted, names))
        texts.append(text if len(names) == 1 else f"[{text}]")
    key = group if override.package is None else f"{group}@{override.package}"
    added = "+" if (override.is_add() or override.is_force_add()) and key not in defaulted else ""
    return OverridesParser.create().parse_override(f"{added}{key}={','.join(texts)}")


def _as_name(value: object) -> str:
    """What a value that was read as a number or the like was written as."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(name: str) -> str:
    """A name as Hydra reads a text, in quotes where it would read something else without them."""
    other = re.fullmatch("(?i)null|true|false|nan|inf", name)
    word = re.fullmatch(r"[A-Za-z_][\w/.${}:-]*", name)
    return name if word and not other else QuotedString(name, Quote.single).with_quotes()


def _check_form(
    line: str, override: Override, repo: CachingConfigRepository, run_mode: RunMode | None
) -> None:
    """See that nothing a run needs is left out, and that values are swept over only where that is possible.

    Raises:
        ConfigError: it is not so.
    """
    key = override.key_or_group
    if override.is_delete() and re.split("[./]", key)[0] in _top_level_names():
        choices = repo.get_group_options(key, ObjectType.CONFIG) if repo.group_exists(key) else []
        names = ", ".join(f"{key}={choice}" for choice in choices)
        instead = f"choose one of {names}" if choices else "without it the default holds"
        raise ConfigError(f"{line} is not possible, since every run needs it; {instead}")
    if not override.is_sweep_override() or run_mode is None:
        return
    value = override.get_value_string()
    if run_mode == RunMode.RUN:
        instead = "add -m to sweep over them"
        if not _is_choice(override, repo):
            instead += f", or write {_as_text(override.get_key_element(), value)} for one text or "
            instead += f"{shlex.quote(f'{override.get_key_element()}=[{value}]')} for a list"
        raise ConfigError(f"{line} has several values; {instead}")
    if override.is_hydra_override():
        raise ConfigError(f"{line} has several values; only options of a run can be swept over")


def _check_swept(override: Override, composed: DictConfig, repo: CachingConfigRepository) -> None:
    """See that what is swept over is an option, and may have each of the values.

    Raises:
        ConfigError: it is not so.
    """
    key = override.key_or_group
    if not _has_option(composed, key):
        raise ConfigError(_unknown(str(override.input_line), key, _known_names(composed, key, repo)))
    if override.is_interval_sweep():
        if composed.hydra.sweeper._target_.endswith(".BasicSweeper"):
            raise ConfigError(
                f"{override.input_line} needs a sweeper that searches; add hydra/sweeper=search"
            )
        return
    changed = copy.deepcopy(composed)
    for value in override.sweep_iterator():
        try:
            OmegaConf.update(changed, key, Override._convert_value(value), merge=True)
        except OmegaConfBaseException as error:
            subject = f"{key}={Override._get_value_element_as_str(value)}"
            raise ConfigError(_not_allowed(subject, key, error)) from error


def _undeclared_paths(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Paths that are no option of the dataclasses, so that nothing reads them."""
    schema = OmegaConf.get_type(node)
    if not dataclasses.is_dataclass(schema):
        return
    names = {field.name for field in dataclasses.fields(schema)}
    for key in node:
        path = f"{prefix}{key!s}"
        inner = node._get_node(key)
        if path == "hydra":
            continue
        if key not in names:
            yield path
        elif isinstance(inner, DictConfig):
            yield from _undeclared_paths(inner, f"{path}.")


def _has_option(composed: DictConfig, key: str) -> bool:
    node: Any = composed
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in node:
            return False
        node = node._get_node(part)
    return True


def _known_names(composed: DictConfig, key: str, repo: CachingConfigRepository) -> list[str]:
    """Names that ``key`` may have been meant to be."""
    top = repo.get_group_options("", ObjectType.GROUP)
    if key.split(".")[0] == "hydra":
        return list(_paths(composed.hydra, "hydra."))
    if key.split("/")[0] == "hydra":
        return [f"hydra/{group}" for group in repo.get_group_options("hydra", ObjectType.GROUP)]
    schema = OmegaConf.get_type(composed)
    options = _options_at(key, schema) if dataclasses.is_dataclass(schema) else {}
    if _mapping_of(key) is not None:
        return [path for path in options if path.startswith(f"{_mapping_of(key)}.")]
    return [*options, *(group for group in top if group != "hydra" and group not in _top_level_names())]


def _mapping_of(key: str) -> str | None:
    """The option that is a mapping and that ``key`` is, or is in."""
    return next((path for path in BY_NAME if f"{key}.".startswith(f"{path}.")), None)


def _options_at(key: str, schema: type = BenchConfig) -> dict[str, Option]:
    """The options by path, and where ``key`` is in a mapping those of its part of it."""
    options, mapping = options_of(schema), _mapping_of(key)
    if mapping is None or key == mapping:
        return options
    kind = typing.get_args(options[mapping].type)[1]
    path = f"{mapping}.{key.removeprefix(mapping).split('.')[1]}"
    of_group = isinstance(kind, type) and dataclasses.is_dataclass(kind)
    inner = options_of(kind, f"{path}.") if of_group else {}
    return {**options, path: Option(type=kind), **inner}


def _paths(node: DictConfig, prefix: str) -> Iterator[str]:
    for key in node:
        yield f"{prefix}{key!s}"
        inner = node._get_node(key)
        if isinstance(inner, DictConfig) and not (inner._is_none() or inner._is_missing()):
            yield from _paths(inner, f"{prefix}{key!s}.")


def _top_level_names() -> set[str]:
    return {field.name for field in dataclasses.fields(BenchConfig)}


def _same_branch(first: str, second: str) -> bool:
    return first == second or first.startswith(f"{second}.") or second.startswith(f"{first}.")


def _unknown(subject: str, name: str, known: list[str]) -> str:
    if name in options_of(BenchConfig) and name not in known:
        return f"{subject} is an option of bench.py, not of train.py"
    alike = nearest(name, known)
    instead = f"the nearest {'is' if len(alike) == 1 else 'are'} {', '.join(alike)}"
    return f"{subject} is not known; {instead if alike else '--help lists the options'}"


def _not_allowed(subject: str, key: str, error: BaseException) -> str:
    option = _options_at(key).get(key)
    if isinstance(error, ValidationError) and option is not None:
        return f"{subject} is not allowed; {key} must be {type_name(option.type)}"
    return f"{subject} is not allowed: {one_line(error)}"


def _unknown_choice(group: str, name: str, choices: Any, file: str = "") -> str:
    if group == "stage" and name in COMMANDS:
        return f"{group}={name}{file} is no model; it is: {COMMANDS[name]}"
    return f"{group}={name}{file} is not known; choose one of {', '.join(choices)}"


def _unreadable(line: str) -> str:
    key, equals, value = line.partition("=")
    if not equals:
        return f"{line} cannot be read; options are written group=choice and group.option=value"
    return f"{line} cannot be read; quote a value with special characters: {_as_text(key, value)}"


def _as_text(key: str, value: str) -> str:
    return shlex.quote(f"{key}={QuotedString(value, Quote.double).with_quotes()}")
