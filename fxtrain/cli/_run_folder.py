"""The folder of a run: created for a new run, and read to resume one."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from fxtrain.cli._arguments import differences
from fxtrain.cli._errors import CommandError, ConfigError, FailedError
from fxtrain.cli._type_checks import shown
from fxtrain.cli._yaml import dump, load
from fxtrain.core import pluralize
from fxtrain.disk import replace_file
from fxtrain.report import _validation as validation
from fxtrain.report._folder import Folder, reason

CONFIG = "config.yaml"
_REMEDY = "Restore the file, or start a new run."


def make_folder(runs: pathlib.Path, command: str, config: Mapping[str, Any]) -> pathlib.Path:
    """Creates a new folder for a run, named after the current time, and writes the configuration to it.

    Runs that start in the same second are numbered.

    Args:
        runs: The parent folder. It is created if it does not exist.
        command: The name of the command, with which the name of the folder begins.
        config: The configuration.

    Returns:
        The new folder.

    Raises:
        FailedError: The folder cannot be created or written to.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
        folder = _new_folder(runs, command)
        write_config(folder, config)
    except OSError as error:
        raise FailedError(
            f"expected a writable folder for runs, got {runs} ({reason(error)}). Choose another one with --runs."
        ) from None
    return folder


def _new_folder(runs: pathlib.Path, command: str) -> pathlib.Path:
    name = f"{command}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):  # another process may have just created it
            folder.mkdir()
            return folder
    raise AssertionError("itertools.count is infinite")


def write_config(folder: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Writes the configuration of a run to its folder, atomically."""
    replace_file(folder / CONFIG, dump(config).encode())


def write_json(path: pathlib.Path, value: object) -> None:
    """Writes a JSON file atomically: a crash leaves the old file or the new one."""
    replace_file(path, json.dumps(value, indent=2).encode())


def read_config(folder: pathlib.Path, command: str) -> dict[str, Any]:
    """Reads the configuration of a run.

    Args:
        folder: The folder of the run.
        command: The command to resume, for errors.

    Raises:
        CommandError: The folder is not that of a run.
        FailedError: The configuration is damaged.
    """
    content = _content(folder, CONFIG, command)
    expected = f"expected the folder of a run for --resume, got {folder}"
    try:
        return validation.mapping(load(validation.decoded(content), CONFIG))
    except (ValueError, ConfigError) as error:
        raise FailedError(f"{expected}, whose {CONFIG} is damaged: {error} {_REMEDY}") from None


def read_json(folder: pathlib.Path, name: str, command: str) -> dict[str, Any]:
    """Reads a JSON file of a run, with the errors of ``read_config``."""
    content = _content(folder, name, command)
    try:
        return validation.mapping(validation.parsed(content))
    except ValueError as error:
        raise FailedError(
            f"expected the folder of a run for --resume, got {folder}, whose {name} is damaged: {error}. {_REMEDY}"
        ) from None


def _content(folder: pathlib.Path, name: str, command: str) -> bytes:
    expected = f"expected the folder of a run for --resume, got {folder}"
    try:
        run = Folder(folder)
    except (OSError, ValueError) as error:
        raise CommandError(f"{expected} ({reason(error)}). Give one that fxtrain {command} made.") from None
    if name not in run.names:
        raise CommandError(f"{expected}, which has no {name}. Give one that fxtrain {command} made.")
    content = run.read(name)
    if content is None:
        raise FailedError(f"{expected}, which cannot be read: {'; '.join(run.problems.lines())}. {_REMEDY}")
    return content


def refuse_changes(
    folder: pathlib.Path, before: Mapping[str, Any], after: Mapping[str, Any], *, fixed: frozenset[str], why: str
) -> None:
    """Raises if a configuration cannot continue a run.

    Args:
        folder: The folder of the run.
        before: The configuration with which it was started.
        after: The configuration with which it is resumed.
        fixed: The keys that cannot change.
        why: A sentence that explains these, with a remedy.

    Raises:
        CommandError: A fixed key has changed. All differences are in its details.
    """
    changed = differences(before, after)
    first = {key: pair for key, pair in changed.items() if key.split(".")[0].split("[")[0] in fixed}
    if not first:
        return
    key, (then, now) = next(iter(first.items()))
    others = f" and {pluralize(len(first) - 1, 'other change')}" if len(first) > 1 else ""
    raise CommandError(
        f"expected {key}={shown(then)}, with which {folder} was started, got {shown(now)}{others}. {why}",
        [f"  {name}: {shown(then)} -> {shown(now)}" for name, (then, now) in changed.items()],
    )
