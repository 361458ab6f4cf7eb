"""Settings of a command in a YAML file. Owns how the file is read, and that errors name its lines.

A file holds what the command line does: one mapping, whose keys are the names of flags without the leading dashes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml

from headrace.types.errors import ConfigError
from headrace.types.plain_values import hint


class ConfigFile(msgspec.Struct, frozen=True):
    """What a file says: values by setting, and the line of each, from 1 on."""

    path: str = ""
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}

    def without(self, names: Collection[str]) -> ConfigFile:
        """The same where the command line gives the settings `names`."""
        return ConfigFile(
            self.path, {name: each for name, each in self.values.items() if name not in names}, self.lines
        )

    def of(self, settings: type[msgspec.Struct]) -> dict[str, Any]:
        """The values of fields of `settings`."""
        return {name: each for name, each in self.values.items() if name in settings.__struct_fields__}

    @contextlib.contextmanager
    def naming_lines(self) -> Iterator[None]:
        """Inside, the refusal of a value of this file tells where it stands."""
        try:
            yield
        except ConfigError as error:
            # Of a key and its file, both of which were given, the refusal names one.
            named = [name for name in (error.field, error.field.removesuffix("_file")) if name in self.values]
            if not named:
                raise
            raise _refusal(self.path, self.lines[named[0]], error.message, error.field) from None


def read_config_file(path: str, flags: dict[str, str]) -> ConfigFile:
    """The settings in a file. `flags` are the names of flags, with underscores, and the settings they are.

    Raises `ConfigError` naming the line for what is no YAML, and for a key that is no flag or comes twice.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"config {path} cannot be read: {reason}", field="config") from None
    loader = yaml.SafeLoader(text)
    try:
        return _read(path, loader, flags)
    except yaml.MarkedYAMLError as error:
        line = 0 if error.problem_mark is None else error.problem_mark.line + 1
        raise _refusal(path, line, f"no YAML: {error.problem}", "config") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: no YAML: {error}", field="config") from None
    finally:
        loader.dispose()


def _read(path: str, loader: Any, flags: dict[str, str]) -> ConfigFile:
    root = loader.get_single_node()
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    if root is None:
        return ConfigFile(path)
    if not isinstance(root, yaml.MappingNode):
        raise _refusal(
            path, root.start_mark.line + 1, "flags and their values are needed, as in `port: 30000`", "config"
        )
    for key_node, value_node in root.value:
        line = key_node.start_mark.line + 1
        key = _value(path, loader, key_node)
        name = key.replace("-", "_") if isinstance(key, str) else None
        if name not in flags:
            near = hint(name, flags).replace("_", "-")
            raise _refusal(path, line, f"{key} is no flag of this command{near}", str(key))
        if flags[name] in values:
            raise _refusal(path, line, f"{key} is given twice, first in line {lines[flags[name]]}", flags[name])
        values[flags[name]], lines[flags[name]] = _value(path, loader, value_node), line
    return ConfigFile(path, values, lines)


def _value(path: str, loader: Any, node: yaml.Node) -> Any:
    """What a node says. Raises `ConfigError` where it is no value of its type, as a date in a month that there is
    not."""
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, LookupError, AttributeError, OverflowError) as error:  # whatever the library meets
        raise _refusal(path, node.start_mark.line + 1, f"no value of its type: {error}; quote it", "config") from None


def _refusal(path: str, line: int, message: str, field: str) -> ConfigError:
    return ConfigError(f"{path}, line {line}: {message}", field=field)
