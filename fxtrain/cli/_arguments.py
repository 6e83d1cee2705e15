"""Parsing of a command's arguments with tyro, on top of a configuration file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import os
import pathlib
import shutil
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import tyro

from fxtrain.cli._errors import CommandError
from fxtrain.cli._factories import read
from fxtrain.cli._yaml import dump, load
from fxtrain.report._folder import reason

_COLUMNS = "COLUMNS"
_MIN_COLUMNS = 60  # columns; tyro splits words in narrower help, and hangs below 8 columns
_MAX_COLUMNS = 10_000  # in which no line of an error is split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """The options of all commands."""

    debug: bool = False
    """Show the traceback of an error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configurable(Common):
    """The options of commands whose other options can be in a file."""

    config: pathlib.Path | None = None
    """A YAML file of these options, such as --print-config writes. Options on the command line have priority."""
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print all options as YAML, and stop."""


Options = TypeVar("Options", bound=Common)


def parse(
    kind: type[Options], command: str, arguments: Sequence[str], default: Options | Any = tyro.MISSING_NONPROP
) -> Options:
    """Parses arguments, and prints help in at least 60 columns.

    Args:
        kind: The dataclass of options.
        command: The name of the command.
        arguments: The arguments after the command.
        default: Default options, in place of those of the dataclass.

    Returns:
        An instance of ``kind``.

    Raises:
        SystemExit: With code 0 after printing help or the configuration.
        CommandError: An argument is invalid, or the file of ``--config`` cannot be read or has an invalid option.
    """
    file = _config_file(arguments) if issubclass(kind, Configurable) else None
    if file is not None:
        default = read_options(kind, load(read_text(file), str(file)), str(file))
    run = functools.partial(tyro.cli, kind, prog=f"fxtrain {command}", args=arguments, default=default)
    with _columns(max(shutil.get_terminal_size().columns, _MIN_COLUMNS)):
        options = _without_box(run, command)
    if isinstance(options, Configurable) and options.print_config:
        sys.stdout.write(dump(saved_options(options)))
        raise SystemExit(0)
    return options


def read_options(kind: type[Options], values: Any, name: str, **given: object) -> Options:
    """Returns the options that are given as a mapping.

    Args:
        kind: The dataclass of options.
        values: The mapping.
        name: Its name, for errors.
        given: Other values of fields.

    Raises:
        ConfigError: A key is not an option, or a value has the wrong type.
    """
    call = read(values, _without_common(kind), name)
    return kind(**{**dataclasses.asdict(call.make()), **given})


def saved_options(options: Common) -> dict[str, Any]:
    """Returns options as YAML and JSON can represent them, without those of all commands."""
    values = {field.name: getattr(options, field.name) for field in _own_fields(type(options))}
    return {name: _saved(value) for name, value in values.items()}


def read_text(path: pathlib.Path) -> str:
    """Returns the content of a file that the user named.

    Raises:
        CommandError: The file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CommandError(f"expected a readable YAML file, got {path} ({reason(error)}). Check the path.") from None


def differences(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> dict[str, tuple[Any, Any]]:
    """Returns the values that differ between two nested configurations, by their paths.

    Example:
        >>> differences({"optimizer": {"adam": {"b1": 0.9}}}, {"optimizer": {"adam": {"b1": 0.8}}})
        {'optimizer.adam.b1': (0.9, 0.8)}
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**before, **after}:
        inside = f"{path}.{key}" if path else str(key)
        found |= _difference(before.get(key), after.get(key), inside)
    return found


def _difference(before: Any, after: Any, path: str) -> dict[str, tuple[Any, Any]]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return differences(before, after, path)
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return {key: value for index, pair in pairs for key, value in _difference(*pair, f"{path}[{index}]").items()}
    is_same = before == after and isinstance(before, bool) == isinstance(after, bool)
    return {} if is_same else {path: (before, after)}


def _config_file(arguments: Sequence[str]) -> pathlib.Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=pathlib.Path)
    with contextlib.suppress(argparse.ArgumentError):  # tyro reports a missing value
        return parser.parse_known_args(arguments)[0].config
    return None


def _own_fields(kind: type[Common]) -> list[dataclasses.Field[Any]]:
    common = {field.name for field in dataclasses.fields(Configurable)} | {"resume"}
    return [field for field in dataclasses.fields(kind) if field.name not in common]


def _without_common(kind: type[Common]) -> type[Any]:
    hints = typing.get_type_hints(kind)
    fields = [(field.name, hints[field.name], dataclasses.field(default=field.default)) for field in _own_fields(kind)]
    return dataclasses.make_dataclass(kind.__name__, fields, kw_only=True)


def _saved(value: Any) -> Any:
    if isinstance(value, pathlib.Path):
        return str(value)
    return [*map(_saved, value)] if isinstance(value, list | tuple) else value


def _without_box(run: Callable[[], Options], command: str) -> Options:
    """Returns the parsed arguments. tyro's error, which is a box of several lines, becomes one line."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return run()
    except SystemExit as error:
        if not error.code:
            raise
    errors = io.StringIO()
    with _columns(_MAX_COLUMNS), contextlib.redirect_stderr(errors), contextlib.suppress(SystemExit):
        run()
    below_title = itertools.dropwhile(lambda line: not _is_border(line), errors.getvalue().splitlines())
    lines = [line.strip("│ ") for line in below_title if not _is_border(line) and line[1:10].strip()]  # without help
    parts = itertools.takewhile(lambda line: not line.startswith(("For full", "Argument helptext")), lines)
    text = " ".join(part if part.endswith((":", ".")) else f"{part}." for part in parts)
    raise CommandError(f"{text} See fxtrain {command} --help.")


def _is_border(line: str) -> bool:
    return line.startswith("╭") or not line.strip(" -─╰╯│")


@contextlib.contextmanager
def _columns(count: int) -> Iterator[None]:
    before = os.environ.get(_COLUMNS)
    os.environ[_COLUMNS] = str(count)
    try:
        yield
    finally:
        del os.environ[_COLUMNS]
        if before is not None:
            os.environ[_COLUMNS] = before
