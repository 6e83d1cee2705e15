"""HTML building blocks: sections, cards and tables. Arguments documented as HTML are not escaped."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping

from fxtrain.core._html import as_html, element
from fxtrain.core._html import table as html_table
from fxtrain.report._validation import MAX_WORDS


def section(title: str, content: str) -> str:
    """Returns a section with an HTML title and HTML content, or an empty string if the content is empty."""
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def grid(cards: Iterable[str]) -> str:
    """Returns a grid of HTML cards, or an empty string if there are no cards."""
    content = "".join(cards)
    return f'<div class="grid">{content}</div>' if content else ""


def card(title: str, content: str) -> str:
    """Returns a card with an HTML title and HTML content."""
    return f'<div class="card"><h3>{title}</h3>{content}</div>'


def titled(name: str, step: int | None = None, run: str = "") -> str:
    """Returns a name and, if they are given, its run and its step as HTML. The name and the run are escaped."""
    small = [html.escape(run), "" if step is None else f"step {step:,}"]
    return html.escape(name) + "".join(f" <small>{text}</small>" for text in small if text)


def steps(kind: str, contents: Mapping[int, str]) -> str:
    """Returns HTML contents by step. The page's script shows one step at a time.

    Args:
        kind: The CSS class of each content.
        contents: HTML by step.
    """
    shown = "".join(
        f'<figure><div class="{kind}">{content}</div><figcaption>step {step:,}</figcaption></figure>'
        for step, content in sorted(contents.items())
    )
    return f'<div class="steps">{shown}</div>'


def left_out(noun: str, count: int) -> str:
    """Returns a line with the number of items that are not shown, or an empty string if there are none."""
    return f"<p>{count} more {noun}{' is' if count == 1 else 's are'} in the run's folder.</p>" if count > 0 else ""


def cell_html(cell: object) -> object:
    """Returns a cell as escaped HTML of bounded length, except numbers, which a table aligns."""
    return cell if isinstance(cell, int | float) else as_html(cell, MAX_WORDS)


def table(
    heads: Iterable[str],
    rows: Iterable[Iterable[object]],
    kind: str = "",
    cell: Callable[[object], object] = cell_html,
) -> str:
    """Returns an HTML table that scrolls if it is wide.

    Args:
        heads: The names of the columns, which are escaped.
        rows: The cells of each row.
        kind: The CSS class of the table.
        cell: Converts a cell to a number or to ``Html``.
    """
    return element("div", html_table(heads, (map(cell, row) for row in rows), kind), kind="wide")
