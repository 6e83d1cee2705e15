"""The command line: ``fxtrain <command>``. One file a command, loaded when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "lm": "train a small byte-level transformer on real text, from nothing",
    "report": "write one HTML page of a run, which opens without a server",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``fxtrain <command> [options]``.

    Args:
        arguments: By default those of the process.

    Returns:
        The exit code: 0 when done, 2 when what was asked for cannot be done, 128 and the number of a signal that
        ended it: 130 for SIGINT, 143 for SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in COMMANDS:
        command = importlib.import_module(f"fxtrain.cli.{given[0]}")
        try:
            return command.main(given[1:])
        except KeyboardInterrupt:
            print("\nfxtrain: interrupted.", file=sys.stderr)
            return 130
    asked_for_help = not given or given[0] in ("-h", "--help")
    out = sys.stdout if asked_for_help else sys.stderr
    if not asked_for_help:
        print(f"fxtrain: there is no command {given[0]!r}.", file=out)
    print("usage: fxtrain <command> [options]\n", file=out)
    for name, purpose in COMMANDS.items():
        print(f"  {name:<8}{purpose}", file=out)
    print("\nfxtrain <command> --help lists its options.", file=out)
    return 0 if asked_for_help else 2
