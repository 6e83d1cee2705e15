"""The folder of a run that the command line started: made for it alone, and read again to resume it."""

from __future__ import annotations

import datetime
import itertools
import json
import pathlib
import typing
from typing import Any, NamedTuple, TypeVar

from fxtrain.disk import replace_file
from fxtrain.report import _shapes as shapes
from fxtrain.report._folder import Folder, reason

_CONFIG = "config.json"
_REMEDY = "Restore the file, or start a new run."

Options = TypeVar("Options")


class CommandError(Exception):
    """The arguments cannot be used. The message says why, and what to give instead."""


class FolderError(Exception):
    """The folder of the run cannot be made or read. The message says why, and what to do."""


class Started(NamedTuple):
    """What a run was started with."""

    options: dict[str, Any]
    digest: str  # of its text


def make_folder(runs: pathlib.Path, config: dict[str, Any]) -> pathlib.Path:
    """Makes a folder for a run, named by the time, and writes its configuration.

    Runs that start in the same second are numbered. The folder is never that of another run.

    Args:
        runs: The folder in which it is made.
        config: What the run is started with, as JSON has it.

    Raises:
        FolderError: If the folder cannot be made or written to.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
        folder = _new_folder(runs)
        write_json(folder / _CONFIG, config)
    except OSError as error:
        raise FolderError(
            f"expected a folder for runs that can be written to, got {runs} ({reason(error)}). Give another one with "
            "--runs."
        ) from None
    return folder


def _new_folder(runs: pathlib.Path) -> pathlib.Path:
    name = datetime.datetime.now().strftime("lm-%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()  # fails if another process has just made it
        except FileExistsError:
            continue
        return folder
    raise AssertionError("itertools.count has no end")


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file in one step: a crash leaves the old file or the new one."""
    replace_file(path, json.dumps(value, indent=2).encode())


def read_config(folder: pathlib.Path) -> Started:
    """Reads what a run was started with.

    Raises:
        CommandError: If the folder is not that of a run.
        FolderError: If the configuration is damaged.
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
        found = shapes.mapping(shapes.parsed(content))
        digest = shapes.mapping(found.get("corpus")).get("digest")
        return Started(shapes.mapping(found.get("options")), shapes.text(digest))
    except ValueError as error:
        raise FolderError(f"{expected}, whose {_CONFIG} is damaged: {error}. {_REMEDY}") from None


def saved_options(kind: type[Options], saved: dict[str, Any], **given: Any) -> Options:
    """The options of a run, checked: a value of another type would fail somewhere in the run.

    Args:
        kind: The dataclass of options.
        saved: Its fields as JSON has them.
        given: Fields that are not saved.

    Raises:
        FolderError: If a field is missing, unknown, or of another type.
    """
    types = {name: each for name, each in typing.get_type_hints(kind).items() if name not in given}
    for name in sorted(saved.keys() ^ types.keys()):
        what = "an unknown option" if name in saved else "no option"
        raise FolderError(
            f"expected the options of this version of fxtrain in {_CONFIG}, got {what} {shapes.named(name)}. Resume "
            "with the version that started the run, or start a new run."
        )
    return kind(**{name: _as_type(name, value, types[name]) for name, value in saved.items()}, **given)


def _as_type(name: str, value: Any, kind: Any) -> Any:
    for each in typing.get_args(kind) or (kind,):
        if each is pathlib.Path and isinstance(value, str):
            return pathlib.Path(value)
        if each is float and type(value) is int:
            return float(value)
        if type(value) is each:
            return value
    raise FolderError(f"expected a value of the option {name} in {_CONFIG}, got {shapes.named(value)}. {_REMEDY}")
