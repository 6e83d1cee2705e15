"""Parsing of a command's arguments with tyro."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro

Options = TypeVar("Options")

_COLUMNS = "COLUMNS"
_MIN_COLUMNS = 60  # columns; tyro splits words in narrower help, and hangs below 8 columns


def parse(
    kind: type[Options], command: str, arguments: Sequence[str], default: Options | Any = tyro.MISSING_NONPROP
) -> Options:
    """Parses arguments, and prints help or errors in at least 60 columns.

    Args:
        kind: The dataclass of options.
        command: The name of the command.
        arguments: The arguments after the command.
        default: Default options, in place of those of the dataclass.

    Returns:
        An instance of ``kind``.

    Raises:
        SystemExit: With code 0 after printing help, and 2 for invalid arguments.
    """
    with _wide_enough():
        return tyro.cli(kind, prog=f"fxtrain {command}", args=arguments, default=default)


@contextlib.contextmanager
def _wide_enough() -> Iterator[None]:
    before = os.environ.get(_COLUMNS)
    os.environ[_COLUMNS] = str(max(shutil.get_terminal_size().columns, _MIN_COLUMNS))
    try:
        yield
    finally:
        del os.environ[_COLUMNS]
        if before is not None:
            os.environ[_COLUMNS] = before
