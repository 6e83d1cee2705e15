"""A page about the model, data, optimizer and device of a run."""

from __future__ import annotations

import os
import platform
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from fxtrain.core import (
    TRACED,
    Control,
    FitBegin,
    Observer,
    TrainState,
    check_positive_int,
    decimal_text,
    device_name,
    format_bytes,
    pluralize,
)
from fxtrain.core._rank import rank
from fxtrain.disk import make_folder, replace_file
from fxtrain.model import summary as summary_of
from fxtrain.model._summary import fact_lines
from fxtrain.model._summary_tables import text_table
from fxtrain.values import HParams

_RATE = re.compile(r"learning_rate(/.*)?")

Facts = dict[str, str]
"""Facts by label. Unknown ones are empty."""


def summary(*, depth: int = 2, rows: int = 30, file: str | os.PathLike[str] | TextIO | None = None) -> Observer:
    """Prints a page about the run when a session begins: model, data, training, processes, device and configuration.

    The names, tags and configuration are those of ``fit(run=...)``. The optimizer, learning rate, precision and
    microbatches come from the description of the step, and the batch size and number of examples from the data source.
    The page ends with a table of modules. Shared parameters are counted once, under the first of their names. Unknown
    facts are left out. With several processes, only rank 0 prints.

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
          opt_state    scale_by_adam 80 B
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
    about = summary_of(state, depth=depth, rows=rows)
    facts = {
        "run": _run_facts(state, event),
        "model": dict(about.model),
        "data": _data_facts(event),
        "training": _step_facts(event) | dict(about.memory),
        "config": _config_facts(event, rows),
        "distributed": _process_facts(),
        "device": _device_facts(state.step.device),
    }
    tables = {"modules": text_table(about.modules), "tensors": text_table(about.tensors)}
    panels = {title: fact_lines(known) for title, known in facts.items()}
    return {title: text for title, text in (panels | tables).items() if text}


def _run_facts(state: TrainState, event: FitBegin) -> Facts:
    limits = [
        pluralize(total, unit)
        for total, unit in ((event.total_steps, "step"), (event.total_epochs, "epoch"))
        if total is not None
    ]
    fires = [kind.__name__ for kind in TRACED if kind in event.fires]
    about = {} if event.run is None else event.run.texts()
    return about | {
        "length": " or ".join(limits) + (", whichever comes first" if len(limits) > 1 else ""),
        "begins": f"after step {event.step:,}" + (", resumed" if event.resumed else "") if event.step else "",
        "seed": str(int(state.seed)),
        "events": f"{', '.join(fires)} in the step" if fires else "",
    }


def _data_facts(event: FitBegin) -> Facts:
    at = f" of epoch {int(event.epoch) + 1:,}" if event.epoch is not None else ""
    sizes = f"{event.num_shapes}, with one graph each if the step is compiled"
    within = event.position - event.epoch_start
    within = within % event.epoch_length if event.epoch_length else within
    return {
        "epoch": pluralize(event.epoch_length, "batch", "batches") if event.epoch_length is not None else "",
        "examples": f"{event.num_examples:,}" if event.num_examples is not None else "",
        "tokens": f"{event.num_tokens:,}" if event.num_tokens is not None else "",
        "sizes": sizes if (event.num_shapes or 1) > 1 else "",
        "position": f"after {pluralize(within, 'batch', 'batches')}{at}" if event.position else "",
    }


def _step_facts(event: FitBegin) -> Facts:
    described = dict(event.step_description)
    rates = {name.partition("/")[2]: described.pop(name) for name in event.step_description if _RATE.fullmatch(name)}
    described.pop("donation", None)
    return {
        "loss": described.pop("loss", "").replace("<lambda>", ""),  # which says nothing
        "optimizer": described.pop("optimizer", ""),
        "lr": ", ".join(f"{group} {rate}".strip() for group, rate in rates.items()),
        "batch": _batch_text(
            event.batch_size, described.pop("accumulate", "1"), described.pop("steps_per_update", "1")
        ),
        **described,
    }


def _batch_text(batch_size: int | None, accumulate: str, steps: str) -> str:
    texts = [pluralize(batch_size, "example")] if batch_size is not None else []
    if accumulate.isdecimal() and (number := int(accumulate)) > 1:
        of = f" of {batch_size // number:,}" if batch_size is not None and batch_size % number == 0 else ""
        texts.append(f"{pluralize(number, 'microbatch', 'microbatches')}{of}")
    text = " in ".join(texts)
    if steps == "1":
        return text
    whole = f"{batch_size * int(steps):,} in " if batch_size is not None and steps.isdecimal() else ""
    return f"{text}{', ' if text else ''}{whole}{steps} steps per update"


def _config_facts(event: FitBegin, rows: int) -> Facts:
    given = {} if event.run is None else HParams(event.run.config).flat()
    config = {name: value for name, value in given.items() if value is not None}
    shown = {
        name: decimal_text(value) if isinstance(value, float) else str(value)
        for name, value in list(config.items())[:rows]
    }
    return shown | ({"...": f"and {len(config) - rows} more"} if len(config) > rows else {})


def _process_facts() -> Facts:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return {"processes": f"{dist.get_world_size():,}, this is rank {dist.get_rank()}; {dist.get_backend()}"}
    world_size = os.environ.get("WORLD_SIZE") or "1"
    if world_size != "1":
        return {"processes": f"{world_size}, this is rank {rank()}; torch.distributed is not initialized"}
    return {"processes": "one"}


def _device_facts(device: torch.device) -> Facts:
    import psutil

    cuda = device.type == "cuda"
    taken = torch.cuda.mem_get_info(device) if cuda else None
    return {
        "device": f"{device}, {device_name(device)}" if cuda else str(device),
        "memory": f"{format_bytes(taken[1])}, {format_bytes(taken[0])} of it free" if taken else "",
        "host": f"{format_bytes(psutil.virtual_memory().total)}, {pluralize(os.cpu_count() or 1, 'core')}",
        "threads": f"{torch.get_num_threads():,}",
        "torch": torch.__version__ + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ""),
        "python": platform.python_version(),
    }
