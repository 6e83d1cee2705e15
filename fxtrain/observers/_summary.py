"""A page about the model, data, optimizer and device of a run."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from fxtrain.core import Control, FitBegin, Observer, TrainState, check_positive_int, printable
from fxtrain.disk import make_folder, replace_file
from fxtrain.observers._rank_zero import rank
from fxtrain.observers._summary_facts import (
    data_facts,
    device_facts,
    model_facts,
    process_facts,
    run_facts,
    training_facts,
)
from fxtrain.observers._summary_parameters import leaves_of, modules_of
from fxtrain.observers._summary_tables import module_rows, table, tensor_rows

_LINE_WIDTH = 96  # characters per line outside tables


def summary(*, depth: int = 2, rows: int = 30, file: str | os.PathLike[str] | TextIO | None = None) -> Observer:
    """Prints a page about the run when a session begins: length, model, data, optimizer, processes and device.

    It ends with a table of modules. Shared parameters are counted once, under the first of their names. Facts that
    neither the state nor the event contains are left out. With several processes, only rank 0 prints.

    If there are more than ``rows`` modules, similar ones that differ only in their index are merged into one row. If
    that is not enough, the deepest modules are left out. A model with at most ``rows`` tensors, or without submodules,
    also gets a table of its tensors.

    Args:
        depth: How many levels of modules to list below the model, at least 1.
        rows: Maximum number of rows in a table, at least 1.
        file: A path, which each session overwrites and whose folder is created if needed, or an output stream.
            Defaults to standard output.

    Raises:
        TypeError: ``rows`` or ``depth`` is not an int.
        ValueError: ``rows`` or ``depth`` is smaller than 1.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(3, 2), fx.optim.adam(1e-3))
        >>> summary()(state, FitBegin(step=0, total_steps=10), Control())
        run
          length       10 steps
          seed         0
        model
          parameters   8 in 2 tensors, all trainable
          dtype        float32
          state        150 B: params 32 B, opt_state 80 B, other 38 B
        training
          optimizer    ScaleByAdamState 80 B
        distributed
          processes    one
        device
          device       cpu
          ...
        modules
          +---------+--------+------------+--------+-----------+---------+
          | Module  | Type   | Parameters | Share  | Trainable | Dtype   |
          +---------+--------+------------+--------+-----------+---------+
          | (model) | Linear |          8 | 100.0% | all       | float32 |
          +---------+--------+------------+--------+-----------+---------+
        tensors
          +--------+--------+---------+------+
          | Tensor | Shape  | Dtype   | Size |
          +--------+--------+---------+------+
          | bias   | (2,)   | float32 |    2 |
          | weight | (2, 3) | float32 |    6 |
          +--------+--------+---------+------+
    """
    check_positive_int("depth", depth)
    check_positive_int("rows", rows)

    def summary(state: TrainState, event: FitBegin, control: Control) -> None:
        if rank() == 0:
            _output(_panels(state, event, depth, rows), file)

    return summary


def _output(panels: Mapping[str, str], file: str | os.PathLike[str] | TextIO | None) -> None:
    page = "\n".join(f"{title}\n{textwrap.indent(text, '  ')}" for title, text in panels.items())
    if isinstance(file, str | os.PathLike):
        path = Path(file)
        make_folder(path.parent)
        replace_file(path, f"{page}\n".encode(errors="backslashreplace"))
    elif file is not None or not _print_in_boxes(panels):
        print(page, file=file, flush=True)


def _print_in_boxes(panels: Mapping[str, str]) -> bool:
    """Prints the panels in boxes if standard output is a wide enough terminal. Returns whether it did."""
    import rich
    from rich.panel import Panel
    from rich.text import Text

    console = rich.get_console()
    widest = max(len(line) for text in panels.values() for line in text.splitlines())
    if console.is_jupyter or console.is_dumb_terminal or not console.is_terminal or console.width < widest + 4:
        return False
    for title, text in panels.items():
        console.print(Panel(Text(text), title=title, title_align="left", border_style="dim", expand=False))
    return True


def _panels(state: TrainState, event: FitBegin, depth: int, rows: int) -> dict[str, str]:
    leaves = leaves_of(state)
    modules, tied = modules_of(state)
    facts = {
        "run": run_facts(state, event),
        "model": model_facts(state, leaves, tied),
        "data": data_facts(event),
        "training": training_facts(state),
        "distributed": process_facts(),
        "device": device_facts(state.step.device),
    }
    by_module = module_rows(leaves, modules, depth, rows)
    tables = {
        "modules": table(by_module),
        "tensors": table(tensor_rows(leaves, rows)) if len(leaves) <= rows or len(by_module) < 2 else "",
    }
    panels = {title: "\n".join(_line(label, text) for label, text in known.items()) for title, known in facts.items()}
    return {title: text for title, text in (panels | tables).items() if text}


def _line(label: str, text: str) -> str:
    return textwrap.fill(
        f"{printable(label):<11}  {printable(text)}",
        _LINE_WIDTH,
        subsequent_indent=" " * 13,
        break_long_words=False,
        break_on_hyphens=False,
    )
