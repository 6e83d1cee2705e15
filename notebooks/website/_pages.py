"""The sources of the website: the files of the repository, and pages that are generated from the code."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import pathlib
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from unittest import mock

from fxtrain import cli, core, loop
from notebooks.website._names import ROOT, Package, alias, packages

_COPIED = ("benchmarks", "notebooks")
_SKIPPED = ("__pycache__", ".*", "website")
_PICTURE = re.compile(r'<picture><source .* srcset="(.*)">\n<img alt="(.*)" src="(.*)"></picture>')
_EVENT_COLUMN = 20


def write_sources(folder: pathlib.Path) -> None:
    """Writes all sources of the website to an empty folder, in the layout of the repository.

    Links between files of the repository stay as they are there, so they are checked as readers there follow them.

    Args:
        folder: The folder for Sphinx to read.
    """
    for name in _COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*_SKIPPED))
    pages = {"index.md": front_page(), "events.rst": events(), "command_line.rst": command_line()}
    pages |= {"reference/index.rst": reference_index()}
    pages |= {f"{package.page}.rst": reference(package) for package in packages()}
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def front_page() -> str:
    """Returns the README, followed by the table of contents of the sidebar."""
    numbered = [f"notebooks/{path.stem}" for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))]
    guides = sorted(f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.md"))
    results = [f"benchmarks/{path.stem}" for path in sorted((ROOT / "benchmarks").glob("*.md"))]
    contents = {
        "Course": numbered,
        "Guides": [*guides, "events", "command_line"],
        "Reference": ["reference/index"],
        "Measurements": results,
    }
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = [_PICTURE.sub(_themed_picture, readme)]
    for caption, names in contents.items():
        listed = "\n".join(names)
        parts.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n")
    return "\n".join(parts)


def _themed_picture(found: re.Match[str]) -> str:
    """Returns a picture that follows the theme of the page, which readers may set apart from that of their system."""
    dark, text, light = found.groups()
    themes = {"only-dark": dark, "only-light": light}
    return "\n".join(f"```{{image}} {file}\n:alt: {text}\n:class: {theme}\n```" for theme, file in themes.items())


def reference_index() -> str:
    """Returns the page that lists all packages with their public names."""
    parts = [
        _title("Reference"),
        "All public names by package. ``import fxtrain as fx`` comes first in every example.\n",
        ".. toctree::\n   :hidden:\n\n" + "".join(f"   {package.path} </{package.page}>\n" for package in packages()),
    ]
    for package in packages():
        head = (package.module.__doc__ or "").split("\n\n")[0]
        names = ", ".join(f":py:obj:`{name} <{path}>`" for name, path in sorted(package.names.items()))
        parts.append(f":py:mod:`{package.path}`\n   {head}\n\n   {names}\n")
    return "\n".join(parts)


def reference(package: Package) -> str:
    """Returns the page of one package: what it is for, a table of its names, and the documentation of each."""
    parts = [_title(package.path), f".. automodule:: {package.path}\n\n.. currentmodule:: None\n"]
    parts.append(_table((f":py:obj:`{name} <{path}>`", _head(package, name)) for name, path in package.names.items()))
    if package.repeated:
        others = ", ".join(f":py:obj:`~{path}`" for path in package.repeated.values())
        parts.append(f"Also exported here: {others}.\n")
    for name, path in package.names.items():
        value = getattr(package.module, name)
        if inspect.isclass(value):
            kind = "autoexception" if issubclass(value, BaseException) else "autoclass"
            bases = "   :show-inheritance:\n" if any(_is_public(base) for base in value.__bases__) else ""
            parts.append(f".. {kind}:: {path}\n   :members:\n{bases}")
        elif inspect.isfunction(value):
            parts.append(f".. autofunction:: {path}\n")
        else:
            found = alias(package, name)
            text = textwrap.indent(found.description, "   ")
            parts.append(f".. py:type:: {path}\n   :canonical: {found.type}\n\n{text}\n")
    return "\n".join(parts)


def _is_public(value: object) -> bool:
    return any(getattr(package.module, name) is value for package in packages() for name in package.names)


def _head(package: Package, name: str) -> str:
    value = getattr(package.module, name)
    is_alias = not (inspect.isclass(value) or inspect.isfunction(value))
    text = alias(package, name).description if is_alias else inspect.getdoc(value) or ""
    return " ".join(text.partition("\n\n")[0].split())


def _table(rows: Iterable[tuple[str, ...]], *, headed: bool = False) -> str:
    lines = [".. list-table::", "   :header-rows: 1" if headed else "   :header-rows: 0", ""]
    for cells in rows:
        lines += [f"   {'  -' if index else '* -'} {cell}" for index, cell in enumerate(cells)]
    return "\n".join([*lines, ""])


def events() -> str:
    """Returns the page of all events in the order in which they fire, from the table in ``help(fx.loop)``.

    Raises:
        ValueError: If the table lacks an event.
    """
    head, intro, table, *notes = (inspect.getdoc(loop) or "").split("\n\n")
    rows = list(_event_rows(textwrap.dedent(table)))
    lost = {event.__name__ for event in core.EVENTS if event is not core.Published} - {
        name for row in rows for name in row.events
    }
    if lost:
        raise ValueError(f"expected all events in the table of help(fx.loop), got none of {', '.join(sorted(lost))}.")
    order = _table([("When", "Event", "Kind", ""), *(row.cells() for row in rows)], headed=True)
    described = _table(
        (f":py:obj:`~fxtrain.{e.__name__}`", (inspect.getdoc(e) or "").split("\n")[0]) for e in core.EVENTS
    )
    return "\n\n".join([_title("Events in order"), head, intro.replace("::", "."), order, *notes, described])


class _Row(NamedTuple):
    when: str
    events: tuple[str, ...]
    is_optional: bool
    note: str

    def cells(self) -> tuple[str, str, str, str]:
        names = ", ".join(f":py:obj:`~fxtrain.{name}`" for name in self.events)
        kinds = {"traced": core.TRACED, "trajectory": core.TRAJECTORY, "session": core.SESSION}
        kind = "".join(k for k, events in kinds.items() if {e.__name__ for e in events}.intersection(self.events))
        indent = "\N{DOWNWARDS ARROW WITH TIP RIGHTWARDS} " if self.is_optional else ""
        return self.when, f"{indent}{names}", kind, self.note


def _event_rows(table: str) -> Iterator[_Row]:
    names = {event.__name__ for event in core.EVENTS}
    for line in table.splitlines():
        when, rest = line[:_EVENT_COLUMN].strip(), line[_EVENT_COLUMN:]
        fired = tuple(word for word in re.findall(r"[A-Z]\w+", rest) if word in names)
        note = re.sub(rf"\b({'|'.join(fired)})\b,?", "", rest) if fired else rest
        yield _Row(when, fired, bool(fired) and rest.startswith(" "), re.sub(r"\s{2,}", ", ", note.strip()))


def command_line() -> str:
    """Returns the page with the help texts of the command line."""
    parts = [_title("Command line")]
    for arguments in [[], *([name] for name in cli.COMMANDS)]:
        text = _help(arguments)
        call = " ".join(["fxtrain", *arguments])
        parts.append(f"{call}\n{'-' * len(call)}\n\n.. code-block:: text\n\n" + textwrap.indent(text, "   "))
    return "\n".join(parts)


def _help(arguments: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, mock.patch.dict(os.environ, COLUMNS="100"):
        cli.main([*arguments, "--help"])
    return out.getvalue()


def _title(text: str) -> str:
    return f"{text}\n{'=' * len(text)}\n"
