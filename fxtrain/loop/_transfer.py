"""Reads of scalars and flags from a device: lazy, batched and asynchronous.

All reads of a run that may wait for a device are made here, except for those of its counters at a start or a rewind.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, ItemsView, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxtrain import metrics, tree
from fxtrain.core import Control, Logged, Metrics
from fxtrain.values import Kind, Text, kind_of

_SCALARS = (float, int, bool)
_MAX_UNREAD = 256  # unread mappings, beyond which dead references are removed


class _Lazy(Mapping[str, Any]):
    """A mapping whose items are computed at the first read."""

    __slots__ = ()

    def _all(self) -> dict[str, Any]:
        raise NotImplementedError

    def __getitem__(self, name: str) -> Any:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def items(self) -> ItemsView[str, Any]:
        return self._all().items()

    def __repr__(self) -> str:
        return repr(self._all())


class LazyMetrics(_Lazy):
    """A mapping whose scalars are copied from a device at the first read. Made by ``HostTransfer``.

    Args:
        transfer: Makes the transfer.
        parts: Returns the values to copy to the host.
        made: Makes the mapping from the copied values.
        kinds: The kinds of the values. Reading them does not wait for the device.
    """

    def __init__(
        self,
        transfer: HostTransfer,
        parts: Callable[[], list[object]],
        made: Callable[[list[object]], dict[str, object]],
        *,
        kinds: Collection[Kind] = (float,),
    ) -> None:
        self.kinds = frozenset(kinds)
        self._transfer = transfer
        # At most one is set. Each is cleared after use, to release its references to device memory.
        self._parts: Callable[[], list[object]] | None = parts
        self._arrived: Callable[[], dict[str, object]] | None = None
        self._values: dict[str, object] = {}
        self._made = made

    def parts(self) -> list[object]:
        """Returns the values to copy to the host."""
        return self._parts() if self._parts is not None else []

    def arrives(self, arrived: Callable[[], list[object]]) -> None:
        """Sets the started copy of the parts, which ``arrived`` waits for."""
        made = self._made
        self._parts, self._arrived = None, lambda: made(arrived())
        del self._made

    def send(self) -> None:
        """Starts an asynchronous copy of its values and of all other unread mappings."""
        if self._parts is not None:
            self._transfer.send()

    def _all(self) -> dict[str, Any]:
        self.send()
        if self._arrived is not None:
            self._values, self._arrived = self._arrived(), None
        elif self._parts is not None:
            self._parts()  # raises the error that prevented the copy
        return self._values


class HostMetrics(_Lazy):
    """Metrics on the host, converted to Python scalars at the first read.

    Conversions are deferred, because they are much slower right after a step, with cold caches, than many in a row.

    Args:
        measured: 0-d tensors, or ``fxtrain.metrics`` values, by name.
    """

    __slots__ = ("_measured", "_taken")

    def __init__(self, measured: Metrics) -> None:
        self._measured: Metrics | None = measured
        self._taken: dict[str, object] = {}

    def _all(self) -> dict[str, Any]:
        if self._measured is not None:
            self._taken, self._measured = _scalars(self._measured), None
        return self._taken


class HostTransfer:
    """Makes lazy mappings, and copies all that are still referenced in one transfer once one is sent or read.

    An observer that sends many mappings and reads them a few steps later does not wait for the device.

    Args:
        on_host: Whether the run's state is on the CPU, where nothing waits for a device.
    """

    def __init__(self, *, on_host: bool = False) -> None:
        self._on_host = on_host
        self._waiting: list[weakref.ref[LazyMetrics]] = []

    def scalars(self, measured: Metrics) -> Metrics:
        """Returns metrics as Python scalars, read lazily unless that is free."""
        # Compares types, because isinstance is slow for a Mapping.
        if type(measured) is LazyMetrics or type(measured) is HostMetrics:
            return measured
        if self._on_host:
            return HostMetrics(measured)
        scalars = _scalars_without_waiting(measured)
        return self.metrics(measured) if scalars is None else scalars

    def control(self, control: Control) -> Control:
        """Returns the requests with logged values as Python scalars, read lazily from a device."""
        if type(control.log) is LazyMetrics or not control.log:
            return control
        log = _log_without_waiting(control.log)
        return control.with_log(self.log(control.log) if log is None else log)

    def metrics(self, measured: Metrics) -> LazyMetrics:
        """Returns the metrics of an event as lazy Python scalars."""
        names: list[str] = []

        def parts() -> list[object]:
            computed = metrics.compute(measured)
            names[:] = computed
            return list(computed.values())

        return self._register(LazyMetrics(self, parts, lambda scalars: dict(zip(names, scalars, strict=True))))

    def log(self, log: Mapping[str, Logged]) -> LazyMetrics:
        """Returns logged values as lazy Python scalars, without those whose flag is false."""
        entries = list(log.values())
        # The numbers of texts are copied with the other scalars.
        texts = {i: tree.flatten(entry.value) for i, entry in enumerate(entries) if type(entry.value) is Text}

        def made(scalars: Sequence[object]) -> dict[str, Any]:
            values, flags = list(scalars[: len(entries)]), scalars[len(entries) : 2 * len(entries)]
            numbers = iter(scalars[2 * len(entries) :])
            for index, (leaves, structure) in texts.items():
                values[index] = tree.unflatten(structure, [next(numbers) for _ in leaves])
            named = zip(log, entries, values, flags, strict=True)
            return {name: Logged(value, True, entry.owner) for name, entry, value, flag in named if flag}

        def parts() -> list[object]:
            numbers = [leaf for leaves, _ in texts.values() for leaf in leaves]
            return [*(entry.value for entry in entries), *(entry.when for entry in entries), *numbers]

        kinds = {kind_of(entry.value) for entry in entries}
        return self._register(LazyMetrics(self, parts, made, kinds=kinds))

    def _register(self, late: LazyMetrics) -> LazyMetrics:
        if len(self._waiting) > _MAX_UNREAD:
            self._waiting = [each for each in self._waiting if each() is not None]
        self._waiting.append(weakref.ref(late))
        return late

    def send(self) -> None:
        """Starts an asynchronous copy of all unread mappings."""
        if not self._waiting:
            return
        held, self._waiting = [late for each in self._waiting if (late := each()) is not None], []
        sent: list[object] = []
        slices: list[tuple[LazyMetrics, slice]] = []
        for late in held:
            try:
                parts = late.parts()
            except Exception:
                continue  # reading the mapping raises the error
            slices.append((late, slice(len(sent), len(sent) + len(parts))))
            sent += parts
        arrived = functools.cache(start_copy(sent))
        for late, where in slices:
            late.arrives(lambda where=where: arrived()[where])


def start_copy_of_flags(control: Control) -> Callable[[], Control]:
    """Starts copying the flags of a stop request to the host. The returned function waits for these copies only."""
    control = control.with_log({})
    flags = [flag for flag in tree.leaves(control) if isinstance(flag, Tensor) and flag.is_cuda]
    if not flags:
        return lambda: control
    copied = _start_copy_of_tensors(flags)

    def read() -> Control:
        copies = {id(flag): copy for flag, copy in zip(flags, copied(), strict=True)}
        return tree.map(lambda leaf: copies.get(id(leaf), leaf), control)

    return read


def host_scalars(measured: Metrics) -> Metrics:
    """Returns metrics as Python scalars. Lazy mappings are returned unchanged."""
    # Compares types, because isinstance is slow for a Mapping.
    return measured if type(measured) is HostMetrics or type(measured) is LazyMetrics else _scalars(measured)


def _scalars(measured: Metrics) -> dict[str, Any]:
    scalars = _scalars_without_waiting(measured)
    if scalars is None:
        computed = metrics.compute(measured)
        scalars = dict(zip(computed, start_copy(list(computed.values()))(), strict=True))
    return scalars


def _scalars_without_waiting(measured: Metrics) -> dict[str, object] | None:
    """Returns metrics as Python scalars, or None if that would wait for a device."""
    scalars: dict[str, object] = {}
    for name, value in measured.items():
        if isinstance(value, Tensor) and value.is_cpu and value.ndim == 0:
            scalars[name] = value.item()
        elif type(value) in _SCALARS:
            scalars[name] = value
        else:
            return None
    return scalars


def _log_without_waiting(log: Mapping[str, Logged]) -> dict[str, Logged] | None:
    """Returns logged values whose flag holds, scalars as Python scalars, or None if that would wait for a device."""
    shown: dict[str, Logged] = {}
    for name, entry in log.items():
        value, flag = entry.value, entry.when
        scalar = isinstance(value, Tensor) and value.ndim == 0
        if (scalar and not value.is_cpu) or (isinstance(flag, Tensor) and not flag.is_cpu):
            return None
        if flag:
            shown[name] = Logged(value.item() if scalar else value, True, entry.owner)
    return shown


def start_copy(values: list[object]) -> Callable[[], list[object]]:
    """Starts copying scalars to the host, in one transfer per dtype if they are on a device.

    Args:
        values: 0-d tensors, and any other values, which are passed through.

    Returns:
        A function that waits for the copies and returns all values, with Python scalars in place of 0-d tensors.
    """
    read: list[object] = list(values)
    groups: dict[tuple[torch.dtype, torch.device], dict[int, Tensor]] = {}
    for index, value in enumerate(values):
        if isinstance(value, Tensor) and value.ndim == 0:
            if value.is_cpu:
                read[index] = value.item()
            else:
                groups.setdefault((value.dtype, value.device), {})[index] = value
    if not groups:
        return lambda: read
    places = [index for group in groups.values() for index in group]
    arrived = _start_copy_of_tensors([torch.stack(list(group.values())) for group in groups.values()])
    return lambda: _with_scalars(read, places, [scalar for group in arrived() for scalar in group.tolist()])


def _start_copy_of_tensors(tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Starts asynchronous copies to the host. The returned function waits for these copies only.

    A direct read of a CUDA tensor would wait for all kernels launched since, such as those of later steps.
    """
    copies: list[Tensor] = []
    streams: dict[torch.device, torch.cuda.Stream] = {}
    for tensor in tensors:
        if tensor.is_cuda:
            copies.append(torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True))
            streams[tensor.device] = torch.cuda.current_stream(tensor.device)
        else:
            copies.append(tensor.cpu())
    # Recorded on the streams of the copies, because another device may be current.
    events = [stream.record_event() for stream in streams.values()]

    def wait() -> list[Tensor]:
        for event in events:
            event.synchronize()
        return copies

    return wait


def _with_scalars(values: list[object], places: Iterable[int], scalars: Sequence[object]) -> list[object]:
    result = list(values)
    for index, scalar in zip(places, scalars, strict=True):
        result[index] = scalar
    return result
