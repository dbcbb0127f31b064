"""Reads settings: YAML file < environment < flags, every value checked, its origin remembered.

Files are read as YAML 1.2 core schema, not PyYAML's 1.1: there ``layers: 10:20`` would be the number 620 (base 60)
and ``no`` a boolean. A key that is given twice is refused as well.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from swarm.config import Settings
from swarm.config_rules import check_together, coerce, coerce_text, rule_for
from swarm.errors import ConfigError

MAX_FILE_BYTES = 1024 * 1024

ENV_PREFIX = "SWARM_"
CONFIG_VARIABLE = "SWARM_CONFIG"
ALIASES = {"SWARM_INITIAL_PEERS": "network.initial_peers"}
"""Short names of variables; the long form (``SWARM_NETWORK_INITIAL_PEERS``) wins over them."""
OTHER_VARIABLES = frozenset({CONFIG_VARIABLE, "SWARM_API_KEY", "SWARM_PYTHON", "SWARM_TORCH_INDEX"})
FLAG_NAMES = {"model.name": "model", "log.format": "log_format"}
"""Where a flag is not called like its field."""

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    settings: Settings
    origins: Mapping[str, str]
    """Key -> ``default`` | ``file:PATH`` | ``env:NAME`` | ``flag:--name``."""


@dataclass(frozen=True, slots=True)
class _Given:
    value: Any
    origin: str


@cache
def keys() -> Mapping[str, Any]:
    """Every key, ``section.field``, with the type of its value, in the order of the dataclasses."""
    return {
        f"{section}.{name}": kind
        for section, section_type in get_type_hints(Settings).items()
        for name, kind in get_type_hints(section_type).items()
    }


def load_settings(
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> LoadedSettings:
    """The settings for this process; raises :class:`ConfigError` naming file, variable or flag, and key.

    ``file``: ``--config``; if None, ``SWARM_CONFIG`` names it, if that is unset there is none. ``flags``: by key
    (``"peer.layers"``) or by the name of the flag (``"layers"``, ``"max_tokens"``, ``"model"``); None and an empty
    list mean that it was not given.
    """
    environ = {} if environ is None else environ
    if file is None and environ.get(CONFIG_VARIABLE):
        file = Path(environ[CONFIG_VARIABLE])
    given: dict[str, _Given] = {}
    if file is not None:
        given |= _from_file(file)
    given |= _from_environ(environ)
    given |= _from_flags(flags or {})

    sections: dict[str, dict[str, Any]] = {}
    for key, item in given.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = item.value
    settings = Settings(
        **{section: section_type(**sections.get(section, {})) for section, section_type in _sections().items()}
    )
    origins = {key: given[key].origin if key in given else DEFAULT for key in keys()}
    check_together(settings, origins)
    return LoadedSettings(settings, origins)


def show(loaded: LoadedSettings) -> list[tuple[str, Any, str]]:
    """Every key with its value and origin, in the order of the dataclasses."""
    rows = []
    for key in keys():
        section, name = key.split(".")
        rows.append((key, getattr(getattr(loaded.settings, section), name), loaded.origins[key]))
    return rows


def _sections() -> dict[str, type[Any]]:
    return {field.name: get_type_hints(Settings)[field.name] for field in dataclasses.fields(Settings)}


def _nearest(word: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else f"; known are: {', '.join(known)}"


def _checked(key: str, raw: object, where: str, convert: Callable[[object, Any], Any]) -> Any:
    """``raw`` as the type of ``key``, within the rule for it."""
    rule = rule_for(key, keys()[key])
    try:
        value = convert(raw, keys()[key])
    except ValueError as error:
        raise ConfigError(f"{where}: {key}: expected {rule.expects}, got {raw!r}{_because(error)}") from None
    if not rule.allows(value):
        raise ConfigError(f"{where}: {key}: expected {rule.expects}, got {raw!r}")
    return value


def _because(error: ValueError) -> str:
    return f" ({error})" if str(error) else ""


# --- file


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema without octal and hexadecimal numbers; duplicate keys are errors."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 -- the base class declares it so

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    ("float", r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _read(file: Path) -> object:
    path = file.expanduser()
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{file}: can't be read: {error.strerror or error}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{file}: larger than {MAX_FILE_BYTES} bytes, which no settings file is")
    try:
        return yaml.load(content.decode("utf-8"), _Loader)
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: expected text in UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ConfigError(f"{file}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from None


def _from_file(file: Path) -> Iterator[tuple[str, _Given]]:
    document = _read(file)
    if document is None:  # empty, or comments only
        return
    sections = list(_sections())
    if not isinstance(document, dict):
        raise ConfigError(f"{file}: expected sections ({', '.join(sections)}), got {type(document).__name__}")
    for section, body in document.items():
        if section not in sections:
            raise ConfigError(f"{file}: unknown section {section!r}{_nearest(str(section), sections)}")
        if body is None:  # all its keys are commented out
            continue
        if not isinstance(body, dict):
            raise ConfigError(f"{file}: {section}: expected keys with values, got {body!r}")
        for name, raw in body.items():
            key = f"{section}.{name}"
            if key not in keys():
                raise ConfigError(f"{file}: unknown key {key!r}{_nearest(key, _keys_near(str(section)))}")
            yield key, _Given(_checked(key, raw, str(file), coerce), f"file:{file}")


def _keys_near(section: str) -> list[str]:
    """Keys of the section first: of two equally near ones the same section is meant."""
    return sorted(keys(), key=lambda key: not key.startswith(f"{section}."))


# --- environment


def _variable(key: str) -> str:
    return ENV_PREFIX + key.replace(".", "_").upper()


def _from_environ(environ: Mapping[str, str]) -> Iterator[tuple[str, _Given]]:
    variables = ALIASES | {_variable(key): key for key in keys()}  # in this order: the long form comes last and wins
    for variable in environ:
        if variable.startswith(ENV_PREFIX) and variable not in variables and variable not in OTHER_VARIABLES:
            _refuse_typing_error(variable, list(variables))
    for variable, key in variables.items():
        if variable in environ:
            value = _checked(key, environ[variable], variable, coerce_text)
            yield key, _Given(value, f"env:{variable}")


def _refuse_typing_error(variable: str, known: Sequence[str]) -> None:
    """``SWARM_...`` may belong to another program, but not if it is named after a section or nearly one of ours."""
    ours = any(variable.startswith(f"{ENV_PREFIX}{section.upper()}_") for section in _sections())
    if ours or difflib.get_close_matches(variable, known, n=1, cutoff=0.85):
        raise ConfigError(f"environment: unknown variable {variable!r}{_nearest(variable, known)}")


# --- flags


def _flag(key: str) -> str:
    return "--" + FLAG_NAMES.get(key, key.split(".")[1]).replace("_", "-")


def _from_flags(flags: Mapping[str, object]) -> Iterator[tuple[str, _Given]]:
    names = {_flag(key): key for key in keys()}
    for name, raw in flags.items():
        if raw is None or raw == [] or raw == ():
            continue
        key = name if name in keys() else names.get("--" + name.replace("_", "-"))
        if key is None:
            raise ConfigError(f"unknown setting {name!r}{_nearest(name, [*keys(), *names])}")
        flag = _flag(key)
        convert = coerce_text if isinstance(raw, str) else coerce
        yield key, _Given(_checked(key, raw, flag, convert), f"flag:{flag}")
