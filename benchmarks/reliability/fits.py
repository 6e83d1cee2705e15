"""R7 and R13: mismatched restore targets are rejected, and every kind of leaf and key is restored bit-identically."""

from __future__ import annotations

import functools
import pathlib
import warnings

import torch

from benchmarks.reliability import children, shim
from benchmarks.reliability.systems import System, Values, same, zeros_like
from benchmarks.reliability.table import Cell

_SAVED: Values = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.int64)}
# Mismatched restore targets, and the paths that the error must name.
_MISFITS: dict[str, tuple[Values, tuple[str, ...]]] = {
    "a different dtype": ({**_SAVED, "a": torch.zeros(2, 3, dtype=torch.float64)}, ("a",)),
    "a narrower dtype": ({**_SAVED, "b": torch.zeros(4, dtype=torch.int32)}, ("b",)),
    "a different shape": ({**_SAVED, "a": torch.zeros(3, 2)}, ("a",)),
    "a smaller shape": ({**_SAVED, "b": torch.zeros(3, dtype=torch.int64)}, ("b",)),
    "an extra leaf": ({**_SAVED, "c": torch.zeros(1)}, ("c",)),
    "a missing leaf": ({"a": _SAVED["a"]}, ("b",)),
    "a renamed leaf": ({"a": _SAVED["a"], "d": _SAVED["b"]}, ("b", "d")),
}


def misfits(system: type[System]) -> Cell:
    """Restores into mismatched targets. torch.load and safetensors take no target, so they have no trials."""
    cell = Cell(detected=0)
    for what, (like, paths) in _MISFITS.items() if system.has_target else ():
        said = children.answer(functools.partial(_restored_into, system, like))
        problems = [] if said else ["accepted without an error"]
        problems += [f"the error does not name {path!r}" for path in paths if said and repr(path) not in said]
        cell.add(
            problems if system.name == "fxtrain" else problems[:1] if not said else [], detected=bool(said), at=what
        )
    return cell


def kinds(system: type[System]) -> Cell:
    """Saves and restores each kind of leaf and key separately, so that one error does not hide another."""
    cell = Cell()
    for what, values in _kinds().items():
        cell.add(children.answer(functools.partial(_returned, system, values)), at=what)
    return cell


def _restored_into(system: type[System], like: Values) -> str:
    with shim.scratch() as parent, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session = system(pathlib.Path(parent) / "run")
        session.save(1, _SAVED)
        session.wait()
        try:
            session.restore(session.latest(), zeros_like(like))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


def _returned(system: type[System], values: Values) -> list[str]:
    with shim.scratch() as parent, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            session = system(pathlib.Path(parent) / "run")
            session.save(1, values)
            session.wait()
            restored = session.restore(session.latest(), zeros_like(values))
        except Exception as error:
            return [f"{type(error).__name__}: {error}".replace("\n", " ")[:160]]
        return [] if same(restored, values) else ["the restored values differ"]


def _kinds() -> dict[str, Values]:
    raw = torch.arange(48, dtype=torch.uint8)
    dtypes = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2")
    dtypes += ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    kinds: dict[str, Values] = {name: {"x": raw.view(getattr(torch, name))} for name in dtypes}
    kinds["bool"] = {"x": raw % 2 == 0}
    kinds["0-d"] = {"x": torch.tensor(3.5)}
    kinds["zero-size"] = {"x": torch.zeros(0, 4), "y": torch.ones(1)}
    kinds["transposed"] = {"x": torch.arange(12.0).reshape(3, 4).T}
    kinds["strided"] = {"x": torch.arange(10)[::3]}
    kinds["not finite"] = {"x": torch.tensor([float("nan"), float("inf"), -0.0])}
    kinds["dotted key"] = {"a.b": torch.tensor([1.0]), "a": torch.tensor([2.0]), "a/b": torch.tensor([3.0])}
    shared = torch.ones(3)
    kinds["tied"] = {"x": shared, "y": shared}
    kinds["a view"] = {"x": torch.arange(10.0)[2:5], "y": torch.ones(1)}
    kinds["empty tree"] = {}
    return kinds
