"""``fxtrain report``: the folder of a run as one HTML page."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import secrets
import stat
from collections.abc import Sequence
from typing import Annotated

import tyro

from fxtrain.cli._arguments import parse
from fxtrain.cli._messages import EXIT_FAILURE, EXIT_USAGE, fail
from fxtrain.report import RunFolderError, page, read_run
from fxtrain.report._folder import kind_of_file, reason


@dataclasses.dataclass(frozen=True)
class Options:
    """Writes one self-contained HTML page of a run: curves with what callbacks did, samples, summary."""

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    """The folder of the run."""
    out: pathlib.Path | None = None
    """Where to write the page; report.html in the run's folder by default."""


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    options = parse(Options, "report", arguments)
    try:
        text = page(read_run(options.run))
    except RunFolderError as error:
        return fail("report", error, EXIT_USAGE)
    path = options.out or options.run / "report.html"
    try:
        _put(path, text.encode(), follow=options.out is not None)
    except (OSError, ValueError) as error:
        why = f"expected a place for the page, got {path} ({reason(error)}). Give --out, a path that can be written to."
        return fail("report", why, EXIT_FAILURE)
    print(path)
    return 0


def _put(path: pathlib.Path, content: bytes, *, follow: bool) -> None:
    """Writes a file in one step. What is there and is no regular file is written to only where a person named it."""
    try:
        mode = (os.stat if follow else os.lstat)(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if stat.S_ISREG(mode):
        _replace(os.path.realpath(path) if follow else os.fspath(path), content)
    elif follow and not stat.S_ISDIR(mode):
        # Without O_NONBLOCK a FIFO without a reader would block here; with it, it is an error.
        handle = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
        os.set_blocking(handle, True)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
    else:
        raise ValueError(f"it is {kind_of_file(mode)}")


def _replace(path: str, content: bytes) -> None:
    """Puts a new file in the place of an old one. A random name cannot be a link that was prepared."""
    new = f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        with open(new, "xb") as file:
            file.write(content)
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
