"""Markdown: as much of it as texts of a run have, as HTML in which nothing of the text is code."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from typing import Any

_FENCE = re.compile(r"\s*(`{3,}|~{3,})")
_HEADING = re.compile(r"(#{1,6})\s+(.+?)\s*#*$")
_ITEM = re.compile(r"\s*(?:[-*+]|(\d+)[.)])\s+(.*)")
_RULE = re.compile(r"\s*\|?(?:\s*:?-+:?\s*\|)*\s*:?-+:?\s*\|?\s*$")
_CODE = re.compile(r"(`+)(.+?)\1")
_STRONG = re.compile(r"\*\*(?=\S)(.+?)(?<=\S)\*\*")
_EMPHASIS = re.compile(r"(?<![\w*])\*(?=[^\s*])(.+?)(?<=[^\s*])\*(?![\w*])")


def as_html(markdown: str) -> str:
    """The text as HTML: headings, lists, tables, fenced code, emphasis. Anything else stays as it was written.

    Example:
        >>> as_html("# Title\\n\\n**a** <b>")
        '<h4>Title</h4><p><strong>a</strong> &lt;b&gt;</p>'
    """
    return "".join(_blocks(markdown.splitlines()))


def _blocks(lines: list[str]) -> Iterator[str]:
    at = 0
    while at < len(lines):
        begin = at
        if fence := _FENCE.match(lines[at]):
            at = next((i for i in range(at + 1, len(lines)) if lines[i].strip().startswith(fence[1])), len(lines))
            yield f"<pre>{html.escape(chr(10).join(lines[begin + 1 : at]))}</pre>"
            at += 1
        elif heading := _HEADING.match(lines[at]):
            yield f"<h4>{_inline(heading[2])}</h4>"
            at += 1
        elif _is_table(lines, at):
            at = _while(lines, at, lambda line: "|" in line)
            yield _table(lines[begin], lines[begin + 2 : at])
        elif item := _ITEM.match(lines[at]):
            at = _while(lines, at, _ITEM.match)
            kind = "ul" if item[1] is None else "ol"
            items = "".join(f"<li>{_inline(found[2])}</li>" for line in lines[begin:at] if (found := _ITEM.match(line)))
            yield f"<{kind}>{items}</{kind}>"
        elif lines[at].strip():
            at = _while(lines, at + 1, lambda line: line.strip() and not _begins(line))
            yield f"<p>{'<br>'.join(map(_inline, lines[begin:at]))}</p>"
        else:
            at += 1


def _while(lines: list[str], at: int, holds: Callable[[str], Any]) -> int:
    while at < len(lines) and holds(lines[at]):
        at += 1
    return at


def _begins(line: str) -> bool:
    """Whether a line ends the paragraph before it."""
    return any(pattern.match(line) for pattern in (_FENCE, _HEADING, _ITEM))


def _is_table(lines: list[str], at: int) -> bool:
    return "|" in lines[at] and at + 1 < len(lines) and "|" in lines[at + 1] and bool(_RULE.match(lines[at + 1]))


def _table(head: str, rows: list[str]) -> str:
    heads = "".join(f"<th>{_inline(cell)}</th>" for cell in _cells(head))
    body = "".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in _cells(row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().removeprefix("|").removesuffix("|").split("|")]


def _inline(text: str) -> str:
    """One line. Entities are read first: ``fxtrain.values.Table`` writes what would not fit into a cell as such."""
    parts: list[str] = []
    end = 0
    for code in _CODE.finditer(text):
        parts += [_emphasized(text[end : code.start()]), f"<code>{html.escape(code[2].strip())}</code>"]
        end = code.end()
    return "".join([*parts, _emphasized(text[end:])])


def _emphasized(text: str) -> str:
    escaped = html.escape(html.unescape(text.replace("<br>", "\n"))).replace("\n", "<br>")
    return _EMPHASIS.sub(r"<em>\1</em>", _STRONG.sub(r"<strong>\1</strong>", escaped))
