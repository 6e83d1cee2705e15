"""Exit codes, and error messages of one line."""

from __future__ import annotations

import sys

EXIT_FAILURE = 1
"""The exit code of a command that failed with valid arguments."""

EXIT_USAGE = 2
"""The exit code for invalid arguments."""


def fail(command: str, error: object, code: int) -> int:
    """Prints an error of a command in one line on standard error.

    Args:
        command: The name of the command.
        error: The error or its message.
        code: The exit code.

    Returns:
        ``code``.
    """
    print(f"fxtrain {command}: {one_line(str(error))}", file=sys.stderr)
    return code


def one_line(text: str) -> str:
    """Returns the text with single spaces, and with unprintable characters escaped.

    Example:
        >>> one_line("first\\n  second\\x1b[31m")
        'first second\\\\x1b[31m'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
