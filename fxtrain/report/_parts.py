"""Parts of the page: sections, cards and tables. Every text is escaped here or by the caller that says so."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def section(title: str, content: str) -> str:
    """A section of HTML content, or nothing if there is none."""
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def grid(cards: Iterable[str]) -> str:
    """Cards beside each other, or nothing if there are none."""
    content = "".join(cards)
    return f'<div class="grid">{content}</div>' if content else ""


def card(title: str, content: str) -> str:
    """HTML content under an HTML title."""
    return f'<div class="card"><h3>{title}</h3>{content}</div>'


def titled(name: str, step: int) -> str:
    """A name and its step as HTML."""
    return f"{html.escape(name)} <small>step {step:,}</small>"


def steps(kind: str, contents: Mapping[int, str]) -> str:
    """HTML contents by step, of which the script shows one at a time."""
    shown = "".join(
        f'<figure><div class="{kind}">{content}</div><figcaption>step {step:,}</figcaption></figure>'
        for step, content in sorted(contents.items())
    )
    return f'<div class="steps">{shown}</div>'


def left_out(noun: str, count: int) -> str:
    """A line that says how many are in the folder only, or nothing."""
    return f"<p>{count} more {noun}{' is' if count == 1 else 's are'} in the run's folder.</p>" if count > 0 else ""


def cell_text(cell: Any) -> str:
    """A number or a text as the escaped content of a cell."""
    return html.escape(f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell))


def table(
    heads: Iterable[str], rows: Iterable[Iterable[Any]], kind: str = "", cell: Callable[[Any], str] = cell_text
) -> str:
    """A table.

    Args:
        heads: The names of the columns.
        rows: The cells.
        kind: The class that the style sheet knows it by.
        cell: Makes the HTML of a cell.
    """
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell(each)}</td>' for each in row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
