"""The errors of commands, each with an exit code and a message of one line."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

from fxtrain.checkpoint import CheckpointError
from fxtrain.core import printable
from fxtrain.core._tracebacks import is_internal, is_of_users

EXIT_FAILURE = 1
"""The exit code of a command that failed with valid arguments."""

EXIT_USAGE = 2
"""The exit code for invalid arguments and configurations."""


class CommandError(Exception):
    """Invalid arguments.

    Args:
        message: The reason and a remedy.
        details: Lines to print before the message.

    Example:
        >>> CommandError("expected a run, got none.").exit_code
        2
    """

    exit_code = EXIT_USAGE

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.details = details


class ConfigError(CommandError):
    """A key of a configuration that does not exist, or a value that its factory does not accept."""


class FailedError(Exception):
    """A failure with valid arguments, such as a folder that cannot be written. The message has a remedy."""

    exit_code = EXIT_FAILURE


def message_of(error: Exception) -> str:
    """Returns the message of an error in one line, with the place in the user's code if the error is from there.

    Example:
        >>> message_of(FailedError("expected a folder, got a file. Move it.")), message_of(KeyError("x"))
        ('expected a folder, got a file. Move it.', "KeyError: 'x'. Add --debug for the traceback.")
    """
    text = printable(" ".join(str(error).split()))
    frames = traceback.extract_tb(error.__traceback__)
    is_check = isinstance(error, TypeError | ValueError) and bool(frames) and is_internal(frames[-1].filename)
    if isinstance(error, CommandError | FailedError | CheckpointError) or is_check or text.startswith("expected "):
        return text
    own = [each for each in frames if is_of_users(each.filename)]
    place = f" in {own[-1].filename}, line {own[-1].lineno}" if own and not own[-1].filename.startswith("<") else ""
    return f"{type(error).__name__}: {text}{place}. Add --debug for the traceback."
