"""The command ``fxtrain report``, which renders the folders of runs as an HTML page."""

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

from fxtrain.cli._arguments import Configurable, parse
from fxtrain.cli._errors import CommandError, FailedError
from fxtrain.report import RunFolderError, page, read_run
from fxtrain.report._folder import kind_of_file, reason


@dataclasses.dataclass(frozen=True)
class Options(Configurable):
    """Writes a self-contained HTML page of a run, with its curves, callback events, samples and summary.

    The page of several runs compares them: curves of one metric share a panel, with one color for each run.

    Example: fxtrain report runs/lm-20250101-120000 runs/lm-20250102-090000 --out comparison.html
    """

    runs: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional, tyro.conf.arg(name="run")]
    """The folders of the runs."""
    out: pathlib.Path | None = None
    """The file to write. Defaults to report.html, in the folder of a single run or else in the current one."""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    options = parse(Options, "report", arguments)
    if not options.runs:
        raise CommandError("expected the folder of a run, got none. Name at least one.")
    # Not among the folders of several runs, where a pattern such as runs/* would match it.
    path = options.out or (options.runs[0] if len(options.runs) == 1 else pathlib.Path()) / "report.html"
    try:
        text = page(*(read_run(run) for run in options.runs), path=path)
    except (RunFolderError, ValueError) as error:
        raise CommandError(str(error)) from error
    try:
        _put(path, text.encode(), follow=options.out is not None)
    except (OSError, ValueError) as error:
        raise FailedError(
            f"expected a writable path for the page, got {path} ({reason(error)}). Choose another one with --out."
        ) from error
    print(path)
    return 0


def _put(path: pathlib.Path, content: bytes, *, follow: bool) -> None:
    """Writes a file atomically. ``follow`` permits links, pipes and devices, for paths that the user named."""
    try:
        mode = (os.stat if follow else os.lstat)(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if stat.S_ISREG(mode):
        _replace(os.path.realpath(path) if follow else os.fspath(path), content)
    elif follow and not stat.S_ISDIR(mode):
        # Opening a FIFO without a reader would block. With O_NONBLOCK, it raises instead.
        handle = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
        os.set_blocking(handle, True)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
    else:
        raise ValueError(f"it is {kind_of_file(mode)}")


def _replace(path: str, content: bytes) -> None:
    """Replaces a file through a temporary one. Its name is random, so that it cannot be a prepared link."""
    new = f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        with open(new, "xb") as file:
            file.write(content)
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
