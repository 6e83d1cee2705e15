"""Console: numbers and texts as lines that a person reads."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from fxtrain.values import HParams, Text
from fxtrain.writers.interface import Backend


def console(file: TextIO | None = None) -> ConsoleWriter:
    """A writer of lines to a terminal or a log.

    Args:
        file: Where to; standard output by default.

    Example:
        >>> writer = console()
        >>> writer.write_scalars(100, {"train/loss": 0.25, "train/accuracy": 0.9})
        step 100 | train/loss 0.25 | train/accuracy 0.9
        >>> writer.write_texts(100, {"sample": "once upon\\na time"})
        step 100 | sample:
          once upon
          a time
    """
    return ConsoleWriter(file)


class ConsoleWriter(Backend):
    """Writes lines; made by ``console``."""

    kinds = frozenset((float, Text, HParams))

    def __init__(self, file: TextIO | None) -> None:
        self._file = file

    def put(self, step: int, values: Mapping[str, Any], event: Any) -> None:
        numbers = {name: value for name, value in values.items() if isinstance(value, bool | int | float)}
        lines = [_line(step, numbers)] if numbers else []
        for name, value in values.items():
            if isinstance(value, Text):
                lines += [f"step {step} | {name}:", *(f"  {line}" for line in value.markdown.splitlines())]
            elif isinstance(value, HParams):
                width = max(map(len, value.flat()), default=0)
                lines += [f"{name}:", *(f"  {key:<{width}}  {given}" for key, given in value.flat().items())]
        print("\n".join(lines), file=self._file)

    def flush(self) -> None:
        (self._file or sys.stdout).flush()

    def close(self) -> None:
        self.flush()


def _line(step: int, numbers: Mapping[str, Any]) -> str:
    shown = [
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}" for name, value in numbers.items()
    ]
    return " | ".join([f"step {step}", *shown])
