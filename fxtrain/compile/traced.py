"""Traced: a step as one graph, made by torch's tracer and Inductor and called directly.

Dynamo reads bytecode, and guards at each call what it assumed of Python. A step is pure, so its inputs are all there is
to assume: their structure, shapes, strides, dtypes and devices, which the caller checks. That takes half of the time of
a small step away, and a third of the time of compiling. The one module that uses these torch interfaces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fxtrain import tree
from fxtrain.core import TrainState
from fxtrain.step import EvalFunction, Step

Run = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Any]]
"""From the leaves of a state and of a batch to the leaves of the new state, if there is one, and the output."""


def compile_traced(
    step: Step | EvalFunction, state: TrainState, batch: Any, *, mode: str | None, in_place: bool
) -> Run:
    """The step as one graph.

    Args:
        step: What to compile.
        state: What enters of a state. Only structure, shapes, strides, dtypes and devices matter.
        batch: Likewise.
        mode: As ``torch.compile`` takes it.
        in_place: Whether the new state's leaves are written over the old one's; then none are returned.
    """
    # Imported when used: they are a third of what importing torch takes.
    import torch._inductor as inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    leaves, state_structure = tree.flatten(state)
    inputs, batch_structure = tree.flatten(batch)
    count = len(leaves)
    output_structure: Any = None

    def flat(*tensors: Tensor) -> list[Tensor]:
        nonlocal output_structure
        old = tensors[:count]
        result: Any = step(tree.unflatten(state_structure, old), tree.unflatten(batch_structure, tensors[count:]))
        moved, output = result if isinstance(step, Step) else ((), result)
        new: list[Tensor] = tree.leaves(moved)
        outputs, output_structure = tree.flatten(output)
        values = _apart([*new, *outputs], tensors, keep=old[: len(new)])
        if not in_place:
            return values
        for leaf, value in zip(old, values, strict=False):
            if leaf is not value:
                leaf.copy_(value)
        return values[count:]

    graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*leaves, *inputs)
    fakes = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    options = {} if mode is None else {"config_patches": inductor.list_mode_options(mode)}
    artefact = inductor.standalone_compile(graph, fakes, dynamic_shapes="from_example_inputs", options=options)
    returned = count if isinstance(step, Step) and not in_place else 0

    def run(leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Any]:
        values = artefact(*leaves, *inputs)
        return values[:returned], tree.unflatten(output_structure, values[returned:])

    return run


def _apart(values: Sequence[Tensor], inputs: Sequence[Tensor], keep: Sequence[Tensor]) -> list[Tensor]:
    """The values, each in memory of its own: what is a view of an input would change with it.

    Value ``i`` may be ``keep[i]`` itself: a leaf that stays what it was.
    """
    taken = {_memory(leaf) for leaf in inputs}
    out: list[Tensor] = []
    for index, value in enumerate(values):
        same = index < len(keep) and value is keep[index]
        out.append(value if same or _memory(value) not in taken else value.clone())
        taken.add(_memory(value))
    return out


def _memory(leaf: Tensor) -> int:
    return leaf.untyped_storage()._cdata
