"""The command line, ``fxtrain <command>``. The module of a command is imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fxtrain.cli._streams import EXIT_FAILURE, EXIT_USAGE, lasting_streams

COMMANDS = {
    "lm": "train a small byte-level transformer on real text, from scratch",
    "report": "write an HTML page of a run that opens without a server",
}
_EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``fxtrain <command> [options]``.

    Args:
        arguments: The arguments. Defaults to those of the process.

    Returns:
        The exit code: 0 for success, 1 for a failure, 2 for invalid arguments, and 128 plus the number of a signal that
        ended the command: 130 for SIGINT, 143 for SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    with lasting_streams() as failures:
        try:
            code = _run(given)
        except SystemExit as error:  # tyro has printed help or an error
            code = error.code if isinstance(error.code, int) else EXIT_USAGE
        except KeyboardInterrupt:
            print("\nfxtrain: interrupted.", file=sys.stderr)
            code = _EXIT_INTERRUPTED
    if failures:
        print(
            f"fxtrain: expected standard output to be writable, got an error: {failures[0].strerror}.", file=sys.stderr
        )
    return code or (EXIT_FAILURE if failures else 0)


def _run(given: list[str]) -> int:
    if given and given[0] in COMMANDS:
        return importlib.import_module(f"fxtrain.cli._{given[0]}").main(given[1:])
    asked_for_help = not given or given[0] in ("-h", "--help")
    out = sys.stdout if asked_for_help else sys.stderr
    if not asked_for_help:
        print(f"fxtrain: expected a command, got {given[0]!r}. Use one of these.", file=out)
    print("usage: fxtrain <command> [options]\n", file=out)
    for name, purpose in COMMANDS.items():
        print(f"  {name:<8}{purpose}", file=out)
    print("\nfxtrain <command> --help lists its options.", file=out)
    return 0 if asked_for_help else EXIT_USAGE
