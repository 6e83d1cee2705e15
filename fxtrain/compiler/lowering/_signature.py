"""The signature of a step: a hash of the operations that it runs, which identifies its graph without a trace.

A trace of a step takes seconds, most of them in torch's tracer and its imports. A step's operators with their arguments
determine its graph, and noting them takes little more than the uncompiled step. So a process that has compiled a step
keeps its signature, and a later process that finds it again loads the compiled graph.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from optree import PyTreeSpec
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from fxtrain import tree
from fxtrain._torch_internals.dispatch import LightDispatchMode, Operator
from fxtrain._torch_internals.dynamo import is_dynamo_loaded
from fxtrain._torch_internals.tracing import recorded_by
from fxtrain.compiler.lowering._side_effects import refusing_files
from fxtrain.core import Batch, TrainState, Tree, compiling
from fxtrain.core._bits import as_bytes
from fxtrain.model import ValuesNeededError
from fxtrain.model._outside_values import repeating
from fxtrain.step import Step

_log = logging.getLogger(__name__)

# Operators of these libraries do the same in every process. Others may have been replaced by the user.
_LIBRARIES = ("aten", "prims", "fxtrain")
# Functions that read or write values of tensors without an operator. Operators that read values are noted like all
# others, and no step whose trace reads values is kept.
_HIDDEN = frozenset(
    (
        *("tolist", "numpy", "__array__", "__dlpack__", "storage", "untyped_storage", "data_ptr", "__reduce_ex__"),
        *("__repr__", "__str__", "__format__", "ctc_loss", "tensor_split", "apply_", "map_", "map2_"),
    )
)
_ASSIGN_DATA: Any = Tensor.data.__set__  # pyright: ignore[reportAttributeAccessIssue]
_CONSTANTS = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
_MAX_CONSTANT_BYTES = 2**20


class Signature(NamedTuple):
    """What identifies the graph of a step, and what the graph does not contain.

    Args:
        digest: The hash of all operations.
        changed: Indices of the state leaves that the step replaces.
        output: The structure of the output.
        operators: The number of operators that were noted.
    """

    digest: str
    changed: tuple[int, ...]
    output: PyTreeSpec
    operators: int


class _RefusedError(RuntimeError):
    """The operations do not determine the graph."""


def signature_of(step: Callable[[TrainState, Batch], Tree], state: TrainState, batch: Batch) -> Signature | None:
    """Runs a step once on copies of its inputs, and returns its signature.

    None if Python reads values, if the step fails, or if other facts than its operations determine its graph.

    Args:
        step: As for ``trace_step``.
        state: The part of a state that enters the graph.
        batch: A batch.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            try:
                return _noted(step, state, batch)
            except ValuesNeededError:
                step(*_copies(state, batch))
                return _noted(step, state, batch)
    except Exception as error:
        _log.debug("%r has no signature.", step, exc_info=error)
        return None


def _noted(step: Callable[[TrainState, Batch], Tree], state: TrainState, batch: Batch) -> Signature:
    state, batch = _copies(state, batch)
    old = tree.leaves(state)
    recorder = _Recorder([*old, *tree.leaves(batch)])
    with compiling(), refusing_files(), repeating(), recorder.recording():
        result: Any = step(state, batch)
    moved, output = result if isinstance(step, Step) else ((), result)
    new: list[Tensor] = tree.leaves(moved)
    outputs, structure = tree.flatten(output)
    changed = tuple(index for index, leaf in enumerate(new) if leaf is not old[index])
    digest = recorder.digest([new[index] for index in changed], outputs)
    return Signature(digest, changed, structure, recorder.operators)


def _copies(state: TrainState, batch: Batch) -> tuple[TrainState, Batch]:
    """Returns copies, of which all tensors are distinct, because a step may write into them."""
    return tree.map(torch.clone, state), tree.map(torch.clone, batch)


class _Recorder(LightDispatchMode):
    """Notes all operators that run, with their arguments.

    Args:
        given: The tensors that may differ from call to call.

    Attributes:
        operators: The number of operators noted so far.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self._hash = hashlib.sha256()
        # By identity. Tensors are not kept alive, so noting takes no more memory than the step.
        self._numbers = WeakTensorKeyDictionary()
        self._count = 0
        self.operators = 0
        self._is_paused = False
        self._refused: str | None = None
        for tensor in given:
            self._numbered(tensor)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """A context whose operators are noted."""
        with _without_dynamo(), recorded_by(self), self, _HiddenAccess(self):
            yield

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def refuse(self, what: str) -> None:
        if not self._is_paused:
            self._refused = self._refused or what

    def digest(self, *results: Sequence[Tensor]) -> str:
        """Returns the hash of everything noted and of what the step returns.

        Raises:
            _RefusedError: Something was refused, even if the step went on after it.
        """
        text = self._text(results)
        if self._refused is not None:
            raise _RefusedError(f"its graph also depends on {self._refused}")
        self._hash.update(text.encode())
        return self._hash.hexdigest()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._is_paused or self._refused is not None:
            return func(*args, **kwargs)
        if not isinstance(func, Operator) or func.namespace not in _LIBRARIES:
            self.refuse(f"the operator {func}")
        given = f"{func}{self._text(args)}{self._text(list(kwargs.items()))}"
        result = func(*args, **kwargs)
        self._hash.update(f"{given}{self._returned(result)}\n".encode())
        self.operators += 1
        return result

    def _numbered(self, tensor: Tensor) -> int:
        self._numbers[tensor] = self._count
        self._count += 1
        return self._count - 1

    def _text(self, value: Any) -> str:
        """Returns an argument as text: of a tensor, which one it is."""
        if isinstance(value, Tensor):
            number = self._numbers.get(value)
            return f"%{number}" if number is not None else self._constant(value)
        if isinstance(value, list | tuple):
            return f"[{','.join(map(self._text, value))}]"
        if value is not None and not isinstance(value, _CONSTANTS):
            self.refuse(f"an argument of {type(value)}")
        return repr(value)

    def _returned(self, value: Any) -> str:
        """Returns a result as text, after giving numbers to new tensors."""
        if isinstance(value, Tensor):
            number = self._numbers.get(value)
            return f"%{self._numbered(value) if number is None else number}:{_kind(value)}"
        if isinstance(value, list | tuple):
            return f"[{','.join(map(self._returned, value))}]"
        return self._text(value)

    def _constant(self, tensor: Tensor) -> str:
        """Returns a tensor that no operator has returned as text, such as a literal, with its values."""
        is_plain = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not is_plain or tensor.nbytes > _MAX_CONSTANT_BYTES:
            self.refuse("a tensor that is neither an input nor a small constant")
            return ""
        with self.pause():
            content = as_bytes(tensor.detach().contiguous()).numpy().tobytes()
        number = self._numbered(tensor)
        return f"%{number}={_kind(tensor)}{hashlib.sha256(content).hexdigest()}"


@contextlib.contextmanager
def _without_dynamo() -> Iterator[None]:
    """A context in which functions from ``torch.compile`` run uncompiled, because their kernels are not noted."""
    if not is_dynamo_loaded():  # nothing is compiled, and the import takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _HiddenAccess(TorchFunctionMode):
    """Notices functions that read or write values of tensors without an operator."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Tree, ...] = (), kwargs: dict[str, Tree] | None = None
    ) -> Tree:
        if getattr(func, "__name__", "") in _HIDDEN or func == _ASSIGN_DATA:
            self._recorder.refuse(f"what {func.__name__} does")
        return func(*args, **(kwargs or {}))


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype}{tuple(tensor.shape)}{tensor.stride()}{tensor.storage_offset()}{tensor.device}"
