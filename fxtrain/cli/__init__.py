"""The command line, ``fxtrain <command>``. The module of a command is imported when it is called."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence

from fxtrain.cli._errors import EXIT_FAILURE, EXIT_USAGE, message_of
from fxtrain.cli._ranks import is_said_elsewhere, printing_on_main
from fxtrain.cli._streams import lasting_streams

COMMANDS = {
    "train": "train what a configuration file or a function describes",
    "lm": "train a small byte-level transformer on real text, from scratch",
    "runs": "list the runs in a folder: state, step, best metric, and why each ended",
    "report": "write an HTML page of a run that opens without a server",
    "inspect": "show what a checkpoint contains, verify it, and compare two",
}
_EXIT_INTERRUPTED = 130
_FOOTER = """
fxtrain <command> --help shows its options and an example. --debug, anywhere, shows the traceback of an error.

exit codes:
  0      success
  1      a failure with valid arguments: an error in the training, a full disk, a damaged or different checkpoint
  2      invalid arguments or configuration; nothing was created
  128+n  ended by the signal n, with a checkpoint: 130 for Ctrl-C, 143 for SIGTERM"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``fxtrain <command> [options]``.

    Args:
        arguments: The arguments. Defaults to those of the process.

    Returns:
        The exit code: 0 for success, 1 for a failure, 2 for invalid arguments, and 128 plus the number of a signal that
        ended the command: 130 for SIGINT, 143 for SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    is_debugged = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    with lasting_streams() as failures:
        try:
            with printing_on_main():
                code = _run(given)
        except SystemExit as error:  # tyro has printed help or an error
            code = error.code if isinstance(error.code, int) else EXIT_USAGE
        except KeyboardInterrupt:
            print("\nfxtrain: interrupted.", file=sys.stderr)
            code = _EXIT_INTERRUPTED
        except Exception as error:
            if is_debugged:
                traceback.print_exc()
            if not is_said_elsewhere(error):
                for line in getattr(error, "details", ()):
                    print(line, file=sys.stderr)
                print(f"fxtrain {given[0]}: {message_of(error)}", file=sys.stderr)
            code = getattr(error, "exit_code", EXIT_FAILURE)
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
    print(_FOOTER, file=out)
    return 0 if asked_for_help else EXIT_USAGE
