"""Explanation: what is known of a step, to be read as numbers or as a page."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping

from fxtrain.compiler._refusals import Break
from fxtrain.observers._figures import scaled, size

_SHOWN = 6  # leaves, or breaks, before the rest is summed up


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Explanation:
    """What ``explain`` found. What is not known is None, or empty.

    Args:
        step: Which step.
        how: The route by which ``compile`` makes its graphs, also before the first call. Only that call finds out
            whether the compiler takes these graphs.
        outcome: What that route compiles.
        cause: The place that keeps the step from being one graph for all values; empty if it is one.
        graphs: How many graphs there are: one, or 0 where the step cannot be one. For a backend that goes through
            Dynamo, as many as Dynamo would cut it into.
        breaks: Why it is not one.
        reads: Where a step that is one graph reads values in Python, or has shapes that depend on values. By the route
            with checks, the graph is for the values of this batch, and each call checks them.
        operations: Calls of torch's operations in the graph, before any are fused.
        kernels: Pieces of code that Inductor wrote for them; calls of libraries, such as matrix products, are not
            among them.
        flops: Floating point operations of a step, by the operation they are in. Only matrix products, convolutions
            and attention are counted; a multiplication and an addition are two.
        state_bytes: By part of the state; ``rest`` is steps, seeds and flags.
        batch_bytes: Of the batch.
        least_traffic: Bytes that a step moves at the least, an estimate: what of its inputs is used is read once,
            and each result written once.
        most_traffic: Bytes that it moves at the most, an estimate: each operation reads and writes by itself.
        seconds: Of a call, medians, by part: ``graph`` and ``calling``, what Python does around it; ``uncompiled``
            where there is no graph. On an accelerator each call was waited for, though in a run ``calling`` goes on
            while the device works.
        first_seconds: Of the first call, most of it compilation. It depends on torch's caches.
        assumed: What the graph assumes of each leaf of state and batch, by path: anything else makes another graph.
        constants: What the functions of users read besides their arguments, from closures, globals and defaults, as far
            as it can be seen: the graph keeps the values that these had when it was made.
        varied: What the step has been compiled for before, and this state and batch, of leaves that differed.
    """

    step: str
    how: str
    outcome: str
    cause: str
    graphs: int
    breaks: tuple[Break, ...]
    reads: tuple[Break, ...]
    operations: int | None
    kernels: int | None
    flops: Mapping[str, int] | None
    state_bytes: Mapping[str, int]
    batch_bytes: int
    least_traffic: int | None
    most_traffic: int | None
    seconds: Mapping[str, float]
    first_seconds: float | None
    assumed: Mapping[str, str]
    varied: Mapping[str, tuple[str, ...]]
    constants: Mapping[str, str]

    def __repr__(self) -> str:
        rows = [line for label, texts in _rows(self) for line in _lines(label, texts)]
        return "\n".join([f"Explanation of {self.step}", *rows])

    def _repr_html_(self) -> str:
        body = "".join(
            f"<tr><th>{html.escape(label)}</th><td>{'<br>'.join(map(html.escape, texts))}</td></tr>"
            for label, texts in _rows(self)
        )
        return f"<table><caption>Explanation of {html.escape(self.step)}</caption>{body}</table>"


def _rows(found: Explanation) -> list[tuple[str, list[str]]]:
    rows = [
        ("route", [f"{found.how}: {found.outcome}", found.cause and f"because of {found.cause}"]),
        ("graphs", [_graphs(found), *_some(list(map(str, found.breaks or found.reads)))]),
        ("operations", [_operations(found)]),
        ("FLOPs", [_flops(found)]),
        ("state", [_parts(found.state_bytes)]),
        ("batch", [size(found.batch_bytes)]),
        ("traffic", [_traffic(found)]),
        ("time", [_time(found)]),
        ("new graph", [_new_graph(found), *_some(_batch(found.assumed))]),
        ("constants", _some([f"{name} = {value}" for name, value in found.constants.items()])),
        ("varied", _some([f"{path}: {', '.join(kinds)}" for path, kinds in found.varied.items()])),
    ]
    return [(label, [text for text in texts if text]) for label, texts in rows if any(texts)]


def _graphs(found: Explanation) -> str:
    lines = _count(len(found.reads), "line")
    if found.reads and "with checks" in found.how:
        return f"{found.graphs} for the values that Python reads at {lines}, which each call checks:"
    if found.reads:
        return f"{found.graphs}, which depends on values at {lines}:"
    if not found.breaks:
        return f"{found.graphs}, without a break"
    return f"{found.graphs or 'none'} of the whole step, {_count(len(found.breaks), 'break')}:"


def _operations(found: Explanation) -> str:
    if found.operations is None:
        return ""
    written = f", for which Inductor wrote {_count(found.kernels, 'kernel')}" if found.kernels is not None else ""
    return f"{found.operations:,}{written}"


def _flops(found: Explanation) -> str:
    if found.flops is None:
        return ""
    total = sum(found.flops.values())
    if not total:
        return "0 in matrix products, convolutions and attention; others are not counted"
    parts = sorted(found.flops.items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} {scaled(count)}" for name, count in parts)
    graph = found.seconds.get("graph")
    rate = f"; {scaled(total / graph)} a second" if graph else ""
    return f"{scaled(total)}: {named}{rate}"


def _parts(sizes: Mapping[str, int]) -> str:
    named = [f"{name} {size(count)}" for name, count in sizes.items() if count]
    return f"{size(sum(sizes.values()))}: {', '.join(named)}"


def _traffic(found: Explanation) -> str:
    if found.least_traffic is None or found.most_traffic is None:
        return ""
    return f"between {size(found.least_traffic)} and {size(found.most_traffic)} read and written a step (estimates)"


def _time(found: Explanation) -> str:
    total = sum(found.seconds.values())
    if not total:
        return ""
    named = [f"{part} {_short(spent)} ({spent / total:.0%})" for part, spent in found.seconds.items()]
    first = f"; the first call {_short(found.first_seconds)}" if found.first_seconds is not None else ""
    return f"{_short(total)} a step: {', '.join(named)}{first}"


def _new_graph(found: Explanation) -> str:
    return (
        f"when the structure of state or batch changes, or shape, strides, dtype or device of one of "
        f"{_count(len(found.assumed), 'leaf', 'leaves')}{'; of the batch:' if _batch(found.assumed) else ''}"
    )


def _batch(assumed: Mapping[str, str]) -> list[str]:
    return [f"{path}: {kind}" for path, kind in assumed.items() if path.startswith("batch")]


def _some(texts: list[str]) -> list[str]:
    return texts[:_SHOWN] + ([f"and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else [])


def _lines(label: str, texts: list[str]) -> list[str]:
    return [f"  {label if not index else '':<10}  {text}" for index, text in enumerate(texts)]


def _count(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _short(seconds: float) -> str:
    factor, unit = next(
        ((factor, unit) for factor, unit in ((1, "s"), (1e3, "ms")) if seconds * factor >= 1), (1e6, "us")
    )
    return f"{seconds * factor:.3g} {unit}"
