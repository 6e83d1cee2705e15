"""Facts about a run, its model, data, optimizer and device, as labelled lines."""

from __future__ import annotations

import os
import platform

import torch
import torch.distributed as dist

from fxtrain import tree
from fxtrain.core import TRACED, FitBegin, TrainState, device_name, dtype_name, format_bytes, pluralize
from fxtrain.observers._rank_zero import rank
from fxtrain.observers._summary_parameters import Leaf, numel_of, total_numel, which_trainable
from fxtrain.optim import PerParameter

Facts = dict[str, str]
"""Known facts by label. Unknown ones are left out."""


def run_facts(state: TrainState, event: FitBegin) -> Facts:
    limits = [
        pluralize(total, unit)
        for total, unit in ((event.total_steps, "step"), (event.total_epochs, "epoch"))
        if total is not None
    ]
    fires = [kind.__name__ for kind in TRACED if kind in event.fires]
    return _nonempty(
        length=" or ".join(limits) + (", whichever comes first" if len(limits) > 1 else ""),
        begins=f"after step {event.step:,}" + (", resumed" if event.resumed else "") if event.step else "",
        seed=str(int(state.seed)),
        events=f"{', '.join(fires)} in the step" if fires else "",
    )


def model_facts(state: TrainState, leaves: list[Leaf], tied: dict[str, str]) -> Facts:
    buffers = tree.leaves(state.buffers)
    counts: dict[str, int] = {}
    for leaf in leaves:
        counts[dtype_name(leaf.tensor.dtype)] = counts.get(dtype_name(leaf.tensor.dtype), 0) + leaf.tensor.numel()
    several = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
    whole = f"{numel_of(leaves):,} in {pluralize(len(leaves), 'tensor')}"
    trainable = which_trainable(leaves)
    if trainable == "some":
        moving = numel_of(leaf for leaf in leaves if leaf.trainable)
        whole += f": {moving:,} trainable, {numel_of(leaves) - moving:,} frozen"
    elif trainable:
        whole += ", all trainable" if trainable == "all" else ", all frozen"
    parts = {name: tree.nbytes(getattr(state, name)) for name in ("params", "buffers", "opt_state", "slots")}
    named = [f"{name} {format_bytes(count)}" for name, count in parts.items() if count]
    everything = tree.nbytes(state)
    rest = everything - sum(parts.values())
    return _nonempty(
        parameters=whole,
        tied=", ".join(f"{other} is {name}" for other, name in tied.items()),
        buffers=f"{total_numel(buffers):,} in {pluralize(len(buffers), 'tensor')}" if buffers else "",
        dtype=several if len(counts) > 1 else "".join(counts),
        state=f"{format_bytes(everything)}: {', '.join([*named, f'other {format_bytes(rest)}'])}",
    )


def data_facts(event: FitBegin) -> Facts:
    at = f" of epoch {int(event.epoch) + 1:,}" if event.epoch is not None else ""
    within = event.position - event.epoch_start
    within = within % event.epoch_length if event.epoch_length else within
    return _nonempty(
        epoch=pluralize(event.epoch_length, "batch", "batches") if event.epoch_length is not None else "",
        sizes=f"{event.num_shapes}, with one graph each if the step is compiled" if (event.num_shapes or 1) > 1 else "",
        position=f"after {pluralize(within, 'batch', 'batches')}{at}" if event.position else "",
    )


def training_facts(state: TrainState) -> Facts:
    kinds: dict[str, int] = {}
    accessors = tree.accessors(state.opt_state)
    for accessor, leaf in zip(accessors, tree.leaves(state.opt_state), strict=True):
        # The innermost node of a named type tells which transformation owns the leaf.
        named = [entry.type.__name__ for entry in accessor if entry.type not in (dict, list, tuple, PerParameter)]
        kind = named[-1] if named else "tensors"
        kinds[kind] = kinds.get(kind, 0) + leaf.nbytes
    slots = {name: tree.nbytes(memory) for name, memory in state.slots.items()}
    return _nonempty(
        optimizer=", ".join(f"{name} {format_bytes(count)}" for name, count in kinds.items()),
        callbacks=", ".join(f"{name} {format_bytes(count)}" for name, count in slots.items()),
    )


def process_facts() -> Facts:
    if dist.is_available() and dist.is_initialized():
        return {"processes": f"{dist.get_world_size():,}, this is rank {dist.get_rank()}; {dist.get_backend()}"}
    world_size = os.environ.get("WORLD_SIZE") or "1"
    if world_size != "1":
        return {"processes": f"{world_size}, this is rank {rank()}; torch.distributed is not initialized"}
    return {"processes": "one"}


def device_facts(device: torch.device) -> Facts:
    import psutil

    cuda = device.type == "cuda"
    taken = torch.cuda.mem_get_info(device) if cuda else None
    versions = f"{torch.__version__}" + (f", CUDA {torch.version.cuda}" if torch.version.cuda else "")
    return _nonempty(
        device=f"{device}, {device_name(device)}" if cuda else str(device),
        memory=f"{format_bytes(taken[1])}, {format_bytes(taken[0])} of it free" if taken else "",
        host=f"{format_bytes(psutil.virtual_memory().total)}, {pluralize(os.cpu_count() or 1, 'core')}",
        threads=f"{torch.get_num_threads():,}",
        torch=versions,
        python=platform.python_version(),
    )


def _nonempty(**facts: str) -> Facts:
    return {label: text for label, text in facts.items() if text}
