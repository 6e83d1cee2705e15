"""R8: changes to tensors after ``save`` has returned do not reach the checkpoint."""

from __future__ import annotations

import functools
import pathlib

import torch

from benchmarks.reliability import children, shim
from benchmarks.reliability.systems import System, Values, values_of, zeros_like
from benchmarks.reliability.table import Cell

_KILOBYTES = 2048  # large enough that the change happens during the write
_TIMES = 3


def aliasing(system: type[System]) -> Cell:
    """Changes the tensors after several saves. Each leaf of each save is one trial."""
    cell = Cell()
    for change in ("in place", "freed"):
        for index in range(_TIMES):
            wrong = children.answer(functools.partial(_trial, system, change, index))
            for name, bad in wrong.items():
                cell.add(["a later change reached the file"] if bad else [], at=f"{change}, save {index}, {name}")
    return cell


def _trial(system: type[System], change: str, index: int) -> dict[str, bool]:
    wanted = values_of(index, kilobytes=_KILOBYTES)
    with shim.scratch() as parent:
        session = system(pathlib.Path(parent) / "run")
        values = {name: value.clone() for name, value in wanted.items()}
        session.save(1, values)
        _change(values, change)
        session.wait()
        restored = session.restore(session.latest(), zeros_like(wanted))
        session.close()
    return {name: not torch.equal(restored[name], value) for name, value in wanted.items()}


def _change(values: Values, change: str) -> None:
    """Overwrites the values as an in-place optimizer does, or frees them as a donating step does.

    New tensors may reuse the freed memory.
    """
    for name in list(values):
        if change == "in place":
            values[name].zero_()
        else:
            shape, dtype = values[name].shape, values[name].dtype
            del values[name]
            values[name] = torch.ones(shape, dtype=dtype)
