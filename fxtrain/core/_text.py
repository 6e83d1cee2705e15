"""Text that is safe to print: control characters and others that affect a terminal are escaped."""

from __future__ import annotations

import unicodedata

# Control characters, lone surrogates, line and paragraph separators, and invisible formatting such as the marks that
# reverse the text direction
_ACTING = frozenset(("Cc", "Cs", "Zl", "Zp", "Cf"))
_JOINERS = frozenset("\u200c\u200d")  # needed to shape letters and emoji, and harmless


def printable(text: str) -> str:
    """Returns ``text`` as a single printable line, with characters that affect a terminal escaped as in Python.

    Example:
        >>> print(printable("loss\\x1b[2J\\n\\u202eevil \\ud800 wörld"))
        loss\\x1b[2J\\n\\u202eevil \\ud800 wörld
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_escaped, text))


def printable_lines(text: str) -> list[str]:
    """Returns the lines of ``text``, each made safe by ``printable``. Tabs are kept.

    Example:
        >>> printable_lines("one\\r\\ntwo\\tand\\x07\\n")
        ['one', 'two\\tand\\\\x07']
    """
    lines = text.replace("\r\n", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    return ["\t".join(map(printable, line.split("\t"))) for line in lines]


def encodable(text: str, encoding: str | None) -> str:
    """Returns ``text`` with the characters that ``encoding`` lacks escaped, so that printing it raises no error.

    Args:
        text: Any text.
        encoding: The encoding of the file that is written; None for UTF-8.

    Example:
        >>> encodable("wörld", "ascii")
        'w\\\\xf6rld'
    """
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _escaped(character: str) -> str:
    if character in _JOINERS or unicodedata.category(character) not in _ACTING:
        return character
    return character.encode("unicode_escape").decode("ascii")
