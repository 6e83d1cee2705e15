"""Shrinks a failing program to the simplest one with the same failure, one simplification at a time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.fuzz.program import Ask, Cut, Program

_SMALLER_FIRST = ("cuts", "asks", "traced_asks", "callbacks", "counted", "writers", "bad")
_NUMBERS = ("epochs", "steps", "batches", "eval_batches", "rows", "snapshots")  # their minimum is 1


def shrink(program: Program, fails: Callable[[Program], bool], *, seconds: float = 60.0) -> Program:
    """Returns the smallest program found within a time limit for which ``fails`` is true.

    Args:
        program: A failing program.
        fails: Runs a program and returns whether it fails in the same way.
        seconds: The time limit.
    """
    end = time.monotonic() + seconds
    tried = {program}
    improved = True
    while improved:
        improved = False
        for simpler in _simpler(program):
            if time.monotonic() > end:
                return program
            if simpler in tried:
                continue
            tried.add(simpler)
            if fails(simpler):
                program, improved = simpler, True
                break
    return program


def _simpler(program: Program) -> Iterator[Program]:
    """Yields programs with one simplification, the largest simplifications first."""
    defaults = {field.name: field.default for field in dataclasses.fields(Program)}
    others = [name for name in defaults if name not in (*_SMALLER_FIRST, *_NUMBERS, "seed")]
    names = (*_SMALLER_FIRST, *others)
    for name in names:
        value = getattr(program, name)
        if value != defaults[name]:
            yield program.replace(**{name: defaults[name]})
    for name in _SMALLER_FIRST:
        items: tuple[Any, ...] = getattr(program, name)
        if len(items) > 1:
            for index in range(len(items)):
                yield program.replace(**{name: items[:index] + items[index + 1 :]})
    if program.epochs is not None and program.steps is not None:
        yield program.replace(steps=None)
        yield program.replace(epochs=None)
    for name in _NUMBERS:
        value = getattr(program, name)
        if value is not None and value > 1:
            yield program.replace(**{name: 1})
            yield program.replace(**{name: value - 1})
    for name in ("cuts", "asks", "traced_asks"):
        items = getattr(program, name)
        for index, item in enumerate(items):
            for simpler in _simpler_part(item):
                yield program.replace(**{name: (*items[:index], simpler, *items[index + 1 :])})


def _simpler_part(part: Ask | Cut) -> Iterator[Any]:
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.name in ("at", "steps"):
            if value > 1:
                yield dataclasses.replace(part, **{field.name: value // 2})
                yield dataclasses.replace(part, **{field.name: value - 1})
        elif field.name not in ("kind", "event", "where") and value != field.default:
            yield dataclasses.replace(part, **{field.name: field.default})
