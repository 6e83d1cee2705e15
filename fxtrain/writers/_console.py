"""Scalars, texts and hyperparameters as readable lines."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TextIO

from fxtrain.core import LoopEvent, RunInfo, describe, encodable, printable, printable_lines
from fxtrain.values import HParams, Scalar, Text, Value
from fxtrain.writers._interface import Backend


def console(file: TextIO | None = None) -> ConsoleWriter:
    """A writer of lines to a terminal or a log. Control characters in names and texts are escaped.

    Args:
        file: The output stream. Defaults to standard output.

    Example:
        >>> writer = console()
        >>> writer.write_scalars(100, {"train/loss": 0.25, "train/accuracy": 0.9})
        step 100 | train/loss 0.25 | train/accuracy 0.9
        >>> writer.write_texts(100, {"sample": "once upon\\na time"})
        step 100 | sample:
          once upon
          a time
    """
    if file is not None and not hasattr(file, "write"):  # pyright: ignore[reportUnnecessaryComparison]
        raise TypeError(
            f"expected file to be an open text file, got {describe(file)}. Open it first, as in open('log.txt', 'a')."
        )
    return ConsoleWriter(file)


class ConsoleWriter(Backend):
    """Writes lines. Created by ``console``."""

    kinds = frozenset((float, Text, HParams, RunInfo))

    def __init__(self, file: TextIO | None) -> None:
        self._file = file

    def put(self, step: int, values: Mapping[str, Value], event: LoopEvent | None) -> None:
        scalars = {name: value for name, value in values.items() if isinstance(value, bool | int | float)}
        lines = [_line(step, scalars)] if scalars else []
        for name, value in values.items():
            if isinstance(value, Text):
                texts = printable_lines(value.markdown)
                if len(texts) == 1:
                    lines.append(f"step {step} | {printable(name)}: {texts[0]}")
                else:
                    lines += [f"step {step} | {printable(name)}:", *(f"  {line}" for line in texts)]
            elif isinstance(value, RunInfo):
                lines.append(" | ".join([printable(name), *(f"{k} {printable(v)}" for k, v in value.texts().items())]))
            elif isinstance(value, HParams):
                config = {printable(key): printable(str(given)) for key, given in value.flat().items()}
                width = max(map(len, config), default=0)
                lines += [f"{printable(name)}:", *(f"  {key:<{width}}  {given}" for key, given in config.items())]
        file = self._file or sys.stdout
        print(encodable("\n".join(lines), getattr(file, "encoding", None)), file=file)

    def flush(self) -> None:
        (self._file or sys.stdout).flush()

    def close(self) -> None:
        self.flush()


def _line(step: int, scalars: Mapping[str, Scalar]) -> str:
    shown = [
        f"{printable(name)} {value:.6g}" if isinstance(value, float) else f"{printable(name)} {value}"
        for name, value in scalars.items()
    ]
    return " | ".join([f"step {step}", *shown])
