"""Contents: the bytes of a tree's leaves, in the order of a checkpoint's file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.checkpoint._errors import CheckpointError
from fxtrain.checkpoint._table import Place, places, root_of


class Direct:
    """The leaves themselves, which must not change until they are written. Copies only leaves that are not contiguous
    or not on the CPU, one at a time."""

    def __init__(self, state: Any) -> None:
        self.leaves, self.structure = dense_leaves(state)
        self.places = places(self.leaves)
        self._computed: Any = None
        device = next((leaf.device for leaf in self.leaves if leaf.device.type == "cuda"), None)
        if device is not None:
            # Another thread's copies run on a stream of its own and do not wait for the kernels of this one's.
            self._computed = torch.cuda.Event()
            self._computed.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Returns when the device has computed the leaves."""
        if self._computed is not None:
            self._computed.synchronize()

    def parts(self) -> Iterator[tuple[int, memoryview]]:
        """The index of each leaf and its bytes."""
        for index in _in_file_order(self.places):
            yield index, host_bytes(self.leaves[index])

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
        self._kinds: Any = ()  # of the leaves that the buffer was made for
        self._device: torch.device | None = None  # where leaves have to be fetched from
        self._copied: Any = None  # an event of the device: copies to the host are on their way until it has happened

    def reserve(self, state: Any) -> None:
        """Makes room for a state like this one."""
        self._fit(dense_leaves(state)[0])

    def take(self, state: Any) -> None:
        """Copies the leaves. When it returns they may be changed, or donated to a step on the same stream."""
        leaves, self.structure = tree.flatten(state)
        if _kinds(leaves) != self._kinds:  # with the same kinds they were found dense before
            leaves, self.structure = dense_leaves(state)
            self._fit(leaves)
        # Not torch.no_grad(), which an exception from a signal handler could leave switched on.
        leaves = [leaf.detach() if leaf.requires_grad else leaf for leaf in leaves]
        try:
            # torch's optimizers stand on it too; one call for all leaves, where one for each costs more than 2 us.
            copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
            copy(self._targets, leaves, non_blocking=self._device is not None)
        except NotImplementedError:  # dtypes below a byte, which torch stores and cannot copy
            for target, leaf in zip(self._targets, leaves, strict=True):
                target.reshape(-1).view(torch.uint8).copy_(leaf.contiguous().reshape(-1).view(torch.uint8))
        if self._device is not None:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Returns when all is on the host."""
        if self._copied is not None:
            self._copied.synchronize()

    def parts(self) -> Iterator[tuple[int, memoryview]]:
        """The index of each leaf and its bytes."""
        whole = self._buffer.numpy().data
        for index in _in_file_order(self.places):
            place = self.places[index]
            yield index, whole[place.offset : place.offset + place.size]

    def scalar(self, index: int) -> int:
        """One leaf, as a Python number."""
        return int(self._targets[index])

    def _fit(self, leaves: Sequence[Tensor]) -> None:
        # An exception may interrupt this at any line: until all of it is done, no leaves match what is prepared.
        self._kinds = ()
        self.places = places(leaves)
        self._device = next((leaf.device for leaf in leaves if leaf.device.type == "cuda"), None)
        size = sum(place.size for place in self.places)
        if self._buffer.nbytes < size:
            self._targets = []
            self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")  # the old one goes before the new one comes
            pinned = self._device is not None
            self._buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned).zero_()
        self._targets = [
            self._buffer[place.offset : place.offset + place.size].view(place.dtype).view(place.shape)
            for place in self.places
        ]
        self._kinds = _kinds(leaves)


def bytes_of(leaf: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return leaf.reshape(-1).view(torch.uint8).numpy().data


def host_bytes(leaf: Tensor) -> memoryview:
    """The bytes of a dense tensor in row-major order. Copies it if it is on a device or not contiguous."""
    return bytes_of(leaf.detach().resolve_conj().resolve_neg().cpu().contiguous())


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


def _kinds(leaves: Sequence[Any]) -> list[Any] | None:
    """What decides where leaves go, and whether they can be copied there; None where one is no tensor."""
    try:
        return [(leaf.dtype, leaf.shape, leaf.device, leaf.layout) for leaf in leaves]
    except AttributeError:
        return None


def _problem(leaf: Any) -> str | None:
    if not isinstance(leaf, Tensor):
        return f"a {type(leaf).__name__}"
    if leaf.layout != torch.strided or leaf.is_quantized or leaf.is_nested:
        kind = "quantized" if leaf.is_quantized else "nested" if leaf.is_nested else f"of layout {leaf.layout}"
        return f"a tensor that is {kind}"
    return "a tensor on the meta device, which has no values" if leaf.is_meta else None


def _in_file_order(placed: Sequence[Place]) -> list[int]:
    return sorted(range(len(placed)), key=lambda index: placed[index].offset)
