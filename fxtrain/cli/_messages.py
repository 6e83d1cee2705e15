"""Messages of the command line: one line each, whatever the names and errors in them contain."""

from __future__ import annotations

import sys

EXIT_FAILURE = 1
"""The exit code where the arguments can be used, and the work failed."""

EXIT_USAGE = 2
"""The exit code for arguments that cannot be used."""


def fail(command: str, error: object, code: int) -> int:
    """Prints why a command ends, in one line on standard error.

    Args:
        command: The name of the command.
        error: The reason.
        code: The exit code.

    Returns:
        The exit code.
    """
    print(f"fxtrain {command}: {one_line(str(error))}", file=sys.stderr)
    return code


def one_line(text: str) -> str:
    """The text with single spaces, and with escapes for what would act on a terminal.

    Example:
        >>> one_line("first\\n  second\\x1b[31m")
        'first second\\\\x1b[31m'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
