"""The bytes of a tree's leaves in file order, either read from the leaves or copied to a snapshot first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from optree import PyTreeSpec
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.memory import copy_all
from fxtrain.checkpoint._errors import CheckpointError
from fxtrain.checkpoint._leaf_table import Place, places, root_of
from fxtrain.core import Tree, describe
from fxtrain.core._bits import as_bytes
from fxtrain.core._shard import is_sharded


class Direct:
    """Reads the leaves without a snapshot, so they must not change until they are written.

    Leaves that are not contiguous or not on the CPU are copied one at a time. Those on a GPU are copied through pinned
    memory on a stream of their own, so the steps taken meanwhile neither wait for the copies nor delay them.

    Args:
        state: A pytree of dense tensors.

    Raises:
        CheckpointError: If a leaf is not a dense tensor.
    """

    def __init__(self, state: Tree) -> None:
        self.leaves, self.structure = dense_leaves(state)
        self.places = places(self.leaves)
        self._ready_event: torch.Event | None = None
        self._stream: torch.cuda.Stream | None = None
        self._pinned = torch.empty(0, dtype=torch.uint8, device="cpu")
        device = next((leaf.device for leaf in self.leaves if leaf.device.type == "cuda"), None)
        if device is not None:
            before = torch.cuda.current_stream(device)
            self._ready_event = before.record_event()
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(before)

    def wait(self) -> None:
        """Blocks until the device has computed the leaves."""
        if self._ready_event is not None:
            self._ready_event.synchronize()

    def parts(self) -> Iterator[tuple[int, memoryview]]:
        """Yields the index and the bytes of each leaf, in file order. The bytes are valid until the next part."""
        for index in _in_file_order(self.places):
            yield index, bytes_of(self._on_host(index))

    def scalar(self, index: int) -> int:
        """Returns the value of one 0-d integer leaf."""
        return int(self._on_host(index))

    def _on_host(self, index: int) -> Tensor:
        """Returns a leaf in row-major order on the host, in memory that the next call may reuse."""
        leaf, place = self.leaves[index], self.places[index]
        if self._stream is None or leaf.device.type != "cuda":
            return _row_major(leaf.detach().cpu())
        with torch.cuda.stream(self._stream):
            if self._pinned.nbytes < place.size:
                self._pinned = torch.empty(place.size, dtype=torch.uint8, device="cpu", pin_memory=True)
            target = self._pinned[: place.size]
            target.copy_(as_bytes(_row_major(leaf.detach())), non_blocking=True)
            self._stream.record_event().synchronize()
        return target.view(place.dtype).view(place.shape)


class HostCopy:
    """A copy of the leaves in one host buffer, which the next snapshot reuses.

    The first use of new memory costs several times as much as the copy itself, so call ``reserve`` early.
    """

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.structure = tree.structure(())
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._targets: list[Tensor] = []
        self._kinds: Sequence[tuple[object, ...]] | None = ()  # the kinds of leaves that the buffer fits
        self._device: torch.device | None = None  # the GPU that leaves are copied from, if any
        self._copy_event: torch.cuda.Event | None = None  # recorded after the asynchronous copies to the host

    def reserve(self, state: Tree) -> None:
        """Allocates a buffer that fits states with the shapes and dtypes of ``state``."""
        self._prepare(dense_leaves(state)[0])

    def take(self, state: Tree) -> None:
        """Copies the leaves. Afterwards they may be changed, or donated to a step on the same stream."""
        leaves, self.structure = tree.flatten(state)
        if _kinds(leaves) != self._kinds:  # leaves of equal kinds have already been checked
            leaves, self.structure = dense_leaves(state)
            self._prepare(leaves)
        # Not torch.no_grad(): an exception from a signal handler could leave gradients disabled.
        leaves = [leaf.detach() if leaf.requires_grad else leaf for leaf in leaves]
        try:
            copy_all(self._targets, leaves, non_blocking=self._device is not None)
        except NotImplementedError:  # torch stores sub-byte dtypes but cannot copy them
            for target, leaf in zip(self._targets, leaves, strict=True):
                as_bytes(target).copy_(as_bytes(leaf.contiguous()))
        if self._device is not None:
            self._copy_event = torch.cuda.Event()
            self._copy_event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Blocks until all leaves are on the host."""
        if self._copy_event is not None:
            self._copy_event.synchronize()

    def parts(self) -> Iterator[tuple[int, memoryview]]:
        """Yields the index and the bytes of each leaf, in file order."""
        whole = self._buffer.numpy().data
        for index in _in_file_order(self.places):
            place = self.places[index]
            yield index, whole[place.offset : place.offset + place.size]

    def scalar(self, index: int) -> int:
        """Returns the value of one 0-d integer leaf."""
        return int(self._targets[index])

    def _prepare(self, leaves: Sequence[Tensor]) -> None:
        # An exception may interrupt this at any line. Until it is complete, _kinds must match no leaves.
        self._kinds = ()
        self.places = places(leaves)
        self._device = next((leaf.device for leaf in leaves if leaf.device.type == "cuda"), None)
        size = sum(place.size for place in self.places)
        if self._buffer.nbytes < size:
            self._targets = []
            self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")  # free the old buffer first
            pinned = self._device is not None
            self._buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned).zero_()
        self._targets = [
            self._buffer[place.offset : place.offset + place.size].view(place.dtype).view(place.shape)
            for place in self.places
        ]
        self._kinds = _kinds(leaves)


def bytes_of(leaf: Tensor) -> memoryview:
    """Returns a view of the memory of a contiguous CPU tensor."""
    return as_bytes(leaf).numpy().data


def host_bytes(leaf: Tensor) -> memoryview:
    """Returns the bytes of a dense tensor in row-major order. Copies tensors on a device or not contiguous."""
    return bytes_of(_row_major(leaf.detach().cpu()))


def _row_major(leaf: Tensor) -> Tensor:
    return leaf.resolve_conj().resolve_neg().contiguous()


def dense_leaves(state: Tree) -> tuple[list[Tensor], PyTreeSpec]:
    """Returns the leaves of ``state`` and its structure.

    Raises:
        CheckpointError: If a leaf is not a dense tensor with values.
    """
    if is_sharded(state):
        raise CheckpointError(
            "expected whole tensors in a checkpoint, got a sharded state, of which each rank has a part. Save it with "
            "fxtrain.fit(checkpointer=...), or call fxtrain.distributed.gathered(state) on all ranks first."
        )
    leaves, structure = tree.flatten(state)
    for index, leaf in enumerate(leaves):
        problem = _problem(leaf)
        if problem:
            path = tree.paths(state, root_of(structure))[index]
            raise CheckpointError(
                f"expected a dense tensor at {path}, got {problem}. Save a state, or a tree of tensors."
            )
    return leaves, structure


def _kinds(leaves: Sequence[Tensor]) -> list[tuple[object, ...]] | None:
    """Returns the properties that determine the buffer's layout, or None if a leaf is not a tensor."""
    try:
        return [(leaf.dtype, leaf.shape, leaf.device, leaf.layout) for leaf in leaves]
    except AttributeError:
        return None


def _problem(leaf: object) -> str | None:
    if not isinstance(leaf, Tensor):
        return describe(leaf)
    if leaf.is_quantized:
        return "a quantized tensor"
    if leaf.is_nested:
        return "a nested tensor"
    if leaf.layout != torch.strided:
        return f"a tensor of layout {leaf.layout}"
    return "a tensor on the meta device, which has no values" if leaf.is_meta else None


def _in_file_order(placed: Sequence[Place]) -> list[int]:
    return sorted(range(len(placed)), key=lambda index: placed[index].offset)
