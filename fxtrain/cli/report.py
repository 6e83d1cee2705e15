"""``fxtrain report``: the folder of a run as one HTML page."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from fxtrain.report import RunFolderError, page, read_run


@dataclasses.dataclass(frozen=True)
class Options:
    """Writes one self-contained HTML page of a run: curves with what callbacks did, samples, summary."""

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    """The folder of the run."""
    out: pathlib.Path | None = None
    """Where to write the page; report.html in the run's folder by default."""


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    options = tyro.cli(Options, prog="fxtrain report", args=arguments)
    try:
        text = page(read_run(options.run))
    except RunFolderError as error:
        print(f"fxtrain report: {error}", file=sys.stderr)
        return 2
    path = options.out or options.run / "report.html"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        print(
            f"fxtrain report: {path} cannot be written ({error.strerror}): give --out, a path that can be.",
            file=sys.stderr,
        )
        return 2
    print(path)
    return 0
