"""The folder of a run: created for a new run, and read to resume one."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import pathlib
import typing
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from fxtrain.disk import replace_file
from fxtrain.report import _validation as validation
from fxtrain.report._folder import Folder, reason

_CONFIG = "config.json"
_REMEDY = "Restore the file, or start a new run."

Options = TypeVar("Options")


class CommandError(Exception):
    """Invalid arguments. The message has the reason and a remedy."""


class FolderError(Exception):
    """The folder of the run cannot be created or read. The message has the reason and a remedy."""


class Started(NamedTuple):
    """The options and text that a run was started with."""

    options: Mapping[str, object]
    digest: str  # of the text


def make_folder(runs: pathlib.Path, config: Mapping[str, object]) -> pathlib.Path:
    """Creates a new folder for a run, named after the current time, and writes the configuration to it.

    Runs that start in the same second are numbered.

    Args:
        runs: The parent folder. It is created if it does not exist.
        config: The configuration, as values that JSON can represent.

    Returns:
        The new folder.

    Raises:
        FolderError: The folder cannot be created or written to.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
        folder = _new_folder(runs)
        write_json(folder / _CONFIG, config)
    except OSError as error:
        raise FolderError(
            f"expected a writable folder for runs, got {runs} ({reason(error)}). Choose another one with --runs."
        ) from None
    return folder


def _new_folder(runs: pathlib.Path) -> pathlib.Path:
    name = datetime.datetime.now().strftime("lm-%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):  # another process may have just created it
            folder.mkdir()
            return folder
    raise AssertionError("itertools.count is infinite")


def write_json(path: pathlib.Path, value: object) -> None:
    """Writes a JSON file atomically: a crash leaves the old file or the new one."""
    replace_file(path, json.dumps(value, indent=2).encode())


def read_config(folder: pathlib.Path) -> Started:
    """Reads the configuration that a run was started with.

    Raises:
        CommandError: The folder is not that of a run.
        FolderError: The configuration is damaged.
    """
    expected = f"expected the folder of a run for --resume, got {folder}"
    try:
        run = Folder(folder)
    except (OSError, ValueError) as error:
        raise CommandError(f"{expected} ({reason(error)}). Give one that fxtrain lm made.") from None
    if _CONFIG not in run.names:
        raise CommandError(f"{expected}, which has no {_CONFIG}. Give one that fxtrain lm made.")
    content = run.read(_CONFIG)
    if content is None:
        raise FolderError(f"{expected}, which cannot be read: {'; '.join(run.problems.lines())}. {_REMEDY}")
    try:
        found = validation.mapping(validation.parsed(content))
        digest = validation.mapping(found.get("corpus")).get("digest")
        return Started(validation.mapping(found.get("options")), validation.text(digest))
    except ValueError as error:
        raise FolderError(f"{expected}, whose {_CONFIG} is damaged: {error}. {_REMEDY}") from None


def saved_options(kind: type[Options], saved: Mapping[str, object], **given: object) -> Options:
    """Returns the saved options of a run. Their types are checked here, because a wrong one would fail later.

    Args:
        kind: The dataclass of options.
        saved: Its fields as read from JSON.
        given: Values of the fields that are not saved.

    Raises:
        FolderError: A field is missing, unknown, or of a wrong type.
    """
    types = {name: each for name, each in typing.get_type_hints(kind).items() if name not in given}
    for name in sorted(saved.keys() ^ types.keys()):
        what = "an unknown option" if name in saved else "no option"
        raise FolderError(
            f"expected the options of this version of fxtrain in {_CONFIG}, got {what} {validation.named(name)}. "
            "Resume with the version that started the run, or start a new run."
        )
    return kind(**{name: _as_type(name, value, types[name]) for name, value in saved.items()}, **given)


def _as_type(name: str, value: object, kind: object) -> object:
    for each in typing.get_args(kind) or (kind,):
        if each is pathlib.Path and isinstance(value, str):
            return pathlib.Path(value)
        if each is float and type(value) is int:
            return float(value)
        if type(value) is each or (isinstance(each, str) and value == each):  # strings are choices
            return value
    raise FolderError(f"expected a value of the option {name} in {_CONFIG}, got {validation.named(value)}. {_REMEDY}")
