"""Text for readers: numbers, durations, sizes, dtypes, names, lists and texts of bounded length.

Text is safe to print once control characters and others that affect a terminal are escaped.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch


def format_number(value: float) -> str:
    """Formats a metric in a few digits, with a width that changes little.

    Example:
        >>> [format_number(value) for value in (2.31456, 0.04, 123.456, 81234.0, 0.00012, float("nan"))]
        ['2.3146', '0.0400', '123.46', '81234', '1.20e-04', 'nan']
    """
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size and not 1e-3 <= size < 1e6:
        return f"{value:.2e}"
    return f"{value:.{4 if size < 10 else 3 if size < 100 else 2 if size < 1000 else 0}f}"


def decimal_text(value: float) -> str:
    """Formats a float as it was written, without the rounding error of an operation such as a division.

    Example:
        >>> [decimal_text(value) for value in (3e-3 / 20, 0.1 + 0.2, 1e-3, 2.0, 1e-12)]
        ['0.00015', '0.3', '0.001', '2.0', '1e-12']
    """
    return repr(float(f"{value:.12g}"))


def format_scaled(value: float) -> str:
    """Formats a value with three significant digits and an SI prefix.

    Example:
        >>> [format_scaled(value) for value in (0.52, 8.0, 45210.0, 1.25e6)]
        ['0.52', '8.00', '45.2k', '1.25M']
    """
    thousands = 0
    while abs(value) >= 999.5 and thousands < 4:
        value, thousands = value / 1000, thousands + 1
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{('', 'k', 'M', 'G', 'T')[thousands]}"


def format_duration(seconds: float) -> str:
    """Formats a duration as hours, minutes and seconds, with a fraction below ten seconds.

    Example:
        >>> [format_duration(seconds) for seconds in (3.21, 75, 3661, 90061)]
        ['3.2 s', '1:15', '1:01:01', '25:01:01']
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_bytes(count: float) -> str:
    """Formats a number of bytes in binary units.

    Example:
        >>> [format_bytes(count) for count in (12, 49_400_000, 3 * 2**40)]
        ['12 B', '47.1 MiB', '3.0 TiB']
    """
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def pluralize(count: int, noun: str, plural: str = "") -> str:
    """Returns a count with its noun, by default with the plural in ``s``.

    Example:
        >>> pluralize(1, "batch", "batches"), pluralize(1200, "step")
        ('1 batch', '1,200 steps')
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def truncate(text: str, most: int) -> str:
    """Returns ``text``, with its end replaced by dots if it is longer than ``most`` characters.

    Example:
        >>> truncate("abcdefgh", 6)
        'abc...'
    """
    return text if len(text) <= most else f"{text[: most - 3]}..."


def truncate_middle(text: str, most: int) -> str:
    """Returns ``text``, with its middle replaced by dots if it is longer than ``most`` characters.

    Example:
        >>> truncate_middle("blocks.0.attention.weight", 15)
        'blocks...weight'
    """
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def first_names(names: Collection[str], most: int = 4) -> str:
    """Returns the first ``most`` names in one line, and the number of the others.

    Example:
        >>> first_names(["a", "b", "c"], 2), first_names([])
        ('a, b and 1 more', 'none')
    """
    listed = ", ".join(list(names)[:most]) or "none"
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed


def escape_html(text: str) -> str:
    """Escapes text for HTML, also for quoted attributes.

    Example:
        >>> escape_html("a < b")
        'a &lt; b'
    """
    import html  # its table of entities would slow down the import of fxtrain

    return html.escape(text)


def first_lines(lines: Sequence[str], most: int) -> list[str]:
    """Returns the first ``most`` lines, and a line with the number of the others.

    Example:
        >>> first_lines(["a", "b", "c"], 2)
        ['a', 'b', 'and 1 more']
    """
    return [*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])]


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype without its module.

    Example:
        >>> dtype_name(torch.float32)
        'float32'
    """
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """Returns the product name of a CUDA device, and the type of any other.

    Example:
        >>> device_name(torch.device("cpu"))
        'cpu'
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def name_of(function: object) -> str:
    """Returns the name of a function, or of the class of a callable object.

    Example:
        >>> name_of(functools.partial(dtype_name)), name_of(torch.nn.Linear(1, 1))
        ('dtype_name', 'Linear')
    """
    while isinstance(function, functools.partial):
        function = cast(Any, function.func)
    return getattr(function, "__name__", None) or type(function).__name__


def public_name(function: object) -> str:
    """Returns the name of a function without leading underscores, for readers who do not know the code.

    Example:
        >>> def _next_token_loss(): ...
        >>> public_name(_next_token_loss), public_name(lambda: None)
        ('next_token_loss', '<lambda>')
    """
    name = name_of(function)
    return name.lstrip("_") or name


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
