"""Finds what a step keeps in memory at the peak of its activations, and the lines that computed it."""

from __future__ import annotations

import contextlib
import dataclasses
import linecache
import traceback
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, NamedTuple

from fxtrain._torch_internals.tracing import recording_nodes
from fxtrain.core import Record, dtype_name, format_bytes
from fxtrain.core._graph_marks import pass_of
from fxtrain.core._tracebacks import place, places

if TYPE_CHECKING:
    from torch.fx import GraphModule

_PLACE = "fxtrain_place"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Live(Record):
    """The values in memory at the peak of a step's activations that one line computed.

    Args:
        nbytes: Their bytes.
        count: Their number.
        values: The operation, dtype and shape of the largest.
        where: ``file:line in function`` of the innermost user code, else of a library. ``"backward pass"`` for
            gradients. Empty if unknown.
        code: The source of that line.

    Example:
        >>> print(Live(4096, 2, "gelu float32[16, 32]", "train.py:7 in forward", "x = gelu(x)"))
        4.0 KiB | 2 of gelu float32[16, 32] | train.py:7 in forward | x = gelu(x)
    """

    nbytes: int
    count: int
    values: str
    where: str = ""
    code: str = ""

    def __str__(self) -> str:
        of = f"{self.count} of {self.values}" if self.count > 1 else self.values
        return " | ".join(part for part in (format_bytes(self.nbytes), of, self.where, self.code) if part)


class Activations(NamedTuple):
    """The activations of a step at their peak. ``Explanation`` describes the fields."""

    activation_bytes: int | None = None
    at_peak: tuple[Live, ...] = ()


@contextlib.contextmanager
def noting_places() -> Generator[None]:
    """Notes at each node of a trace inside the context which line computes it."""
    with recording_nodes(_note):
        yield


def _note(node: Any) -> None:
    frames = [
        traceback.FrameSummary(frame.f_code.co_filename, line, frame.f_code.co_name, lookup_line=False)
        for frame, line in traceback.walk_stack(None)
    ]
    own, library = places(reversed(frames))
    node.meta[_PLACE] = own or library


def activations(graph: GraphModule, memory: Any) -> Activations:
    """Returns what lives at the peak of a graph from ``trace``, with a memory policy of ``compile``.

    Args:
        graph: The graph. It is modified in place.
        memory: The policy.
    """
    # Imported here, because it loads the compiler's passes.
    from fxtrain.compiler.passes._liveness import Timeline
    from fxtrain.compiler.passes._memory_policy import limit_memory
    from fxtrain.compiler.passes._recompute import recompute_regions

    recompute_regions(graph.graph)
    if memory != "save":
        limit_memory(graph.graph, memory)
    peak = Timeline(graph.graph).peak()
    lines: dict[tuple[str, int], list[Any]] = {}
    for node in peak.live:
        frame, is_backward = node.meta.get(_PLACE), _is_backward(node)
        line = ("", int(is_backward)) if frame is None or is_backward else (frame.filename, frame.lineno)
        lines.setdefault(line, []).append(node)
    found = [_live(nodes) for nodes in lines.values()]
    return Activations(peak.nbytes, tuple(sorted(found, key=lambda each: -each.nbytes)))


def _live(nodes: list[Any]) -> Live:
    largest = max(nodes, key=lambda node: node.meta["val"].nbytes)
    value, frame = largest.meta["val"], largest.meta.get(_PLACE)
    name = str(getattr(largest.target, "overloadpacket", largest.args[0].target)).removeprefix("aten.")
    described = f"{name} {dtype_name(value.dtype)}{list(value.shape)}"
    total = sum(node.meta["val"].nbytes for node in nodes)
    if _is_backward(largest):
        return Live(total, len(nodes), described, "backward pass")
    if frame is None:
        return Live(total, len(nodes), described)
    where = f"{place(frame.filename, frame.lineno)} in {frame.name}"
    return Live(total, len(nodes), described, where, linecache.getline(frame.filename, frame.lineno).strip())


def _is_backward(node: Any) -> bool:
    found = pass_of(node)
    return found is not None and found.is_backward
