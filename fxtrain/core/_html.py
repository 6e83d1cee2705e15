"""HTML of objects in notebooks: a title with tables, folds and drawings, in the colors of the page around it.

There are no scripts and no external resources. Text is escaped wherever it enters: only ``Html`` is taken as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from fxtrain.core._formats import escape_html, pluralize, printable_lines, truncate

T = TypeVar("T")

_MAX_CHARACTERS = 500  # of a text

# The text keeps the color of the page, and lines are a share of it. Only the accent needs a color of its own, which
# JupyterLab and VS Code define for their theme, and other pages by the theme of the system.
_STYLE = """\
.fxtrain{--line:color-mix(in srgb,currentColor 20%,transparent);--dim:color-mix(in srgb,currentColor 65%,transparent);\
--accent:var(--jp-brand-color1,var(--vscode-charts-blue,#1f6feb));color:var(--jp-content-font-color1,\
var(--vscode-editor-foreground,inherit));font:13px/1.5 var(--jp-ui-font-family,system-ui),sans-serif;\
overflow-x:auto;max-width:100%}
@media (prefers-color-scheme:dark){.fxtrain{--accent:var(--jp-brand-color1,var(--vscode-charts-blue,#6aa6ff))}}
.fxtrain small{color:var(--dim);font-size:12px;font-weight:400}
.fxtrain p{margin:.3em 0}
.fxtrain pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3em 0}
.fxtrain.fxtrain table{border-collapse:collapse;margin:.4em 0;font-size:12px;border:0;display:table}
.fxtrain.fxtrain.fxtrain tr{background:none}
.fxtrain.fxtrain th,.fxtrain.fxtrain td{text-align:left;vertical-align:top;padding:.15em 1.2em .15em 0;border:0;\
border-bottom:1px solid var(--line);white-space:pre-line;overflow-wrap:break-word;max-width:40em;background:none}
.fxtrain.fxtrain th{color:var(--dim);font-weight:500;white-space:nowrap}
.fxtrain.fxtrain td.number,.fxtrain.fxtrain th.number{text-align:right;white-space:nowrap;\
font-variant-numeric:tabular-nums}
.fxtrain.fxtrain .confusion th,.fxtrain.fxtrain .confusion td{text-align:center;padding:.15em .45em}
.fxtrain.fxtrain .confusion td{border:1px solid var(--line);font-variant-numeric:tabular-nums;\
background:color-mix(in srgb,var(--accent) calc(var(--share)*60%),transparent)}
.fxtrain.fxtrain .matrix td{text-align:center;padding:.15em .5em}
.fxtrain.fxtrain .matrix td:first-child,.fxtrain.fxtrain .matrix td:last-child{text-align:left}
.fxtrain.fxtrain .matrix td:first-child{padding-left:0}
.fxtrain.fxtrain .matrix th{vertical-align:bottom}
.fxtrain.fxtrain .matrix th:not(:first-child):not(:last-child){writing-mode:vertical-rl;transform:rotate(180deg);\
text-align:left;padding:.2em .1em;border:0;vertical-align:top}
.fxtrain details{margin-left:1.1em}
.fxtrain>details{margin-left:0}
.fxtrain summary{cursor:pointer;margin-left:0}
.fxtrain details>table,.fxtrain details>p{margin-left:1.1em!important}
.fxtrain svg{vertical-align:middle;max-width:100%}
.fxtrain svg rect{fill:var(--accent)}
.fxtrain svg polyline{stroke:var(--accent)}
.fxtrain svg text{fill:var(--dim);font-size:10px}
.fxtrain img,.fxtrain video{max-width:100%;vertical-align:top}
.fxtrain td svg,.fxtrain td img{max-width:none}
.fxtrain figure{display:inline-block;margin:0 .5em .5em 0;vertical-align:top;max-width:100%}
.fxtrain figcaption{color:var(--dim);font-size:12px;white-space:pre-line;overflow-wrap:anywhere;max-width:24em}
"""


class Html(str):
    """A string that is HTML. Any other string is text."""


def as_html(value: object, most: int = _MAX_CHARACTERS) -> Html:
    """Returns a value as HTML: ``Html`` as it is, and anything else as escaped text, with its line breaks.

    Args:
        value: The value. Floats are shortened, and None is empty.
        most: The longest text, in characters. Longer ones end in dots.

    Example:
        >>> as_html("<b>"), as_html(Html("<b>")), as_html(0.123456)
        ('&lt;b&gt;', '<b>', '0.1235')
    """
    if isinstance(value, Html):
        return value
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return Html(escape_html("\n".join(printable_lines(truncate(text, most)))))


def join(parts: Iterable[object], between: str = "") -> Html:
    """Returns values as HTML, one after the other, with HTML between them."""
    return Html(between.join(map(as_html, parts)))


def element(tag: str, *parts: object, kind: str = "") -> Html:
    """Returns an HTML element of a CSS class.

    Example:
        >>> element("p", "a < b", kind="note")
        '<p class="note">a &lt; b</p>'
    """
    named = f' class="{kind}"' if kind else ""
    return Html(f"<{tag}{named}>{join(parts)}</{tag}>")


def table(heads: Iterable[object], rows: Iterable[Iterable[object]], kind: str = "") -> Html:
    """Returns an HTML table. Numbers are aligned right, with the head of their column.

    Args:
        heads: The names of the columns; none for a table without a head.
        rows: The cells of each row.
        kind: The CSS class of the table.

    Example:
        >>> table([], [["a < b", 3]])
        '<table><tbody><tr><td>a &lt; b</td><td class="number">3</td></tr></tbody></table>'
    """
    cells = [list(row) for row in rows]
    names = list(heads)
    numeric = {index for row in cells[:1] for index, cell in enumerate(row) if _is_number(cell)}
    head = join(element("th", name, kind="number" if index in numeric else "") for index, name in enumerate(names))
    body = join(
        element("tr", join(element("td", cell, kind="number" if _is_number(cell) else "") for cell in row))
        for row in cells
    )
    return element("table", element("thead", element("tr", head)) if names else "", element("tbody", body), kind=kind)


def facts(rows: Iterable[tuple[object, object]]) -> Html:
    """Returns an HTML table of names and values, without a head."""
    return element(
        "table",
        element("tbody", join(element("tr", element("th", name), element("td", value)) for name, value in rows)),
    )


def fold(title: object, *content: object, is_open: bool = False) -> Html:
    """Returns content that a click on its title shows or hides.

    Example:
        >>> fold("params", "2 tensors")
        '<details><summary>params</summary>2 tensors</details>'
    """
    return Html(f"<details{' open' if is_open else ''}>{element('summary', title)}{join(content)}</details>")


def left_out(count: int, noun: str, plural: str = "") -> Html:
    """Returns a line with the number of things that are not shown, or nothing if there are none.

    Example:
        >>> left_out(2, "row"), left_out(0, "row")
        ('<p><small>and 2 more rows</small></p>', '')
    """
    return (
        element("p", element("small", "and ", pluralize(count, f"more {noun}", plural and f"more {plural}")))
        if (count > 0)
        else Html()
    )


def view(title: object, *content: object, note: object = "") -> str:
    """Returns the HTML of an object: a title, a note in small print, and content, with the style of all views.

    Example:
        >>> page = view("<x>", "content", note="2 rows")
        >>> page[:25], page[page.index("</style>") + 8 :]
        ('<div class="fxtrain"><sty', '<p><b>&lt;x&gt;</b> <small>2 rows</small></p>content</div>')
    """
    small = join([" ", element("small", note)]) if note else ""
    head = element("p", element("b", title), small)
    return f'<div class="fxtrain"><style>{_STYLE}</style>{head}{join(content)}</div>'


def html_view(draw: Callable[[T], str]) -> Callable[[T], str]:
    """Decorates ``_repr_html_``: an error while drawing is shown in the place of the object.

    Without it, a notebook would print a traceback for an object that merely is on the screen, such as one whose tensors
    were freed.
    """

    @functools.wraps(draw)
    def _repr_html_(self: T) -> str:
        try:
            return draw(self)
        except Exception as error:
            text = f"cannot be shown: {type(error).__name__}: {error}"
            return view(type(self).__name__, element("p", text))

    return _repr_html_


def _is_number(cell: Any) -> bool:
    return isinstance(cell, int | float | Number) and not isinstance(cell, bool)


class Number(str):
    """The text of a number, which tables align right."""
