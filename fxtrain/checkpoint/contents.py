"""Contents: the bytes of a tree's leaves, in the order of a checkpoint's file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.checkpoint.errors import CheckpointError
from fxtrain.checkpoint.table import Place, places, root_of


class Direct:
    """The leaves as they are, for whoever waits until they are written. Costs no memory, but for leaves that are
    not contiguous or not on the CPU, one at a time."""

    def __init__(self, state: Any) -> None:
        self.leaves, self.structure = dense_leaves(state)
        self.places = places(self.leaves)

    def parts(self) -> Iterator[tuple[int, memoryview]]:
        """The index of each leaf and its bytes."""
        for index in _in_file_order(self.places):
            leaf = self.leaves[index].detach().resolve_conj().resolve_neg()
            yield index, bytes_of(leaf.cpu().contiguous())

    def scalar(self, index: int) -> int:
        """One leaf, as a Python number."""
        return int(self.leaves[index])


class Snapshot:
    """The leaves as they were at one moment, in one buffer, which the next snapshot uses again.

    Memory that is used for the first time costs several times what copying into it does, so ``reserve`` it early.
    """

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.structure: Any = None
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._targets: list[Tensor] = []
        self._copied: Any = None  # an event of the device: copies to the host are on their way until it has happened

    def reserve(self, state: Any) -> None:
        """Makes room for a state like this one."""
        leaves, _ = dense_leaves(state)
        self._fit(leaves)

    def take(self, state: Any) -> None:
        """Copies the leaves. When it returns they may be changed, or donated to a step on the same stream."""
        leaves, self.structure = dense_leaves(state)
        self._fit(leaves)
        self._copied = None
        device = next((leaf.device for leaf in leaves if leaf.device.type == "cuda"), None)
        with torch.no_grad():
            for target, leaf in zip(self._targets, leaves, strict=True):
                try:
                    target.copy_(leaf, non_blocking=device is not None)
                except NotImplementedError:  # dtypes below a byte, which torch stores and cannot copy
                    target.view(torch.uint8).copy_(leaf.contiguous().view(torch.uint8))
        if device is not None:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Returns when all is on the host."""
        if self._copied is not None:
            self._copied.synchronize()

    def parts(self) -> Iterator[tuple[int, memoryview]]:
        """The index of each leaf and its bytes."""
        whole = self._buffer.numpy().data
        for index in _in_file_order(self.places):
            place = self.places[index]
            yield index, whole[place["offset"] : place["offset"] + place["bytes"]]

    def scalar(self, index: int) -> int:
        """One leaf, as a Python number."""
        return int(self._targets[index])

    def _fit(self, leaves: Sequence[Tensor]) -> None:
        if len(leaves) == len(self.places) and all(
            place["dtype"] == leaf.dtype and place["shape"] == leaf.shape
            for place, leaf in zip(self.places, leaves, strict=True)
        ):
            return
        self.places = places(leaves)
        size = sum(place["bytes"] for place in self.places)
        if self._buffer.nbytes < size:
            self._targets = []
            self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")  # the old one goes before the new one comes
            pinned = any(leaf.device.type == "cuda" for leaf in leaves)
            self._buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned).zero_()
        self._targets = [
            self._buffer[place["offset"] : place["offset"] + place["bytes"]].view(place["dtype"]).view(place["shape"])
            for place in self.places
        ]


def bytes_of(leaf: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return leaf.reshape(-1).view(torch.uint8).numpy().data


def dense_leaves(state: Any) -> tuple[list[Tensor], Any]:
    """The leaves and the structure.

    Raises:
        CheckpointError: If a leaf is no dense tensor with values.
    """
    leaves, structure = tree.flatten(state)
    for index, leaf in enumerate(leaves):
        problem = _problem(leaf)
        if problem:
            path = tree.paths(state, root_of(structure))[index]
            raise CheckpointError(f"{path} is {problem}, and a checkpoint holds dense tensors.")
    return leaves, structure


def _problem(leaf: Any) -> str | None:
    if not isinstance(leaf, Tensor):
        return f"a {type(leaf).__name__}"
    if leaf.layout != torch.strided or leaf.is_quantized or leaf.is_nested:
        kind = "quantized" if leaf.is_quantized else "nested" if leaf.is_nested else f"of layout {leaf.layout}"
        return f"a tensor that is {kind}"
    return "a tensor on the meta device, which has no values" if leaf.is_meta else None


def _in_file_order(placed: Sequence[Place]) -> list[int]:
    return sorted(range(len(placed)), key=lambda index: placed[index]["offset"])
