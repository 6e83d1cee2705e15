"""Arguments of a command, parsed into its options by tyro."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import TypeVar

import tyro

Options = TypeVar("Options")

_COLUMNS = "COLUMNS"
_NARROWEST = 60  # columns; tyro breaks each word of a narrower help, and below 8 columns it does not return


def parse(kind: type[Options], command: str, arguments: Sequence[str], default: Options | None = None) -> Options:
    """Parses arguments. Help and mistakes are printed, in at least 60 columns.

    Args:
        kind: The dataclass of options.
        command: The name of the command.
        arguments: What was given.
        default: The options where nothing is given, in place of those of the dataclass.

    Raises:
        SystemExit: With code 0 after help, and 2 for arguments that cannot be used.
    """
    with _wide_enough():
        if default is None:
            return tyro.cli(kind, prog=f"fxtrain {command}", args=arguments)
        return tyro.cli(kind, prog=f"fxtrain {command}", args=arguments, default=default)


@contextlib.contextmanager
def _wide_enough() -> Iterator[None]:
    columns = shutil.get_terminal_size().columns
    if columns >= _NARROWEST:
        yield
        return
    before = os.environ.get(_COLUMNS)
    os.environ[_COLUMNS] = str(_NARROWEST)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_COLUMNS]
        else:
            os.environ[_COLUMNS] = before
