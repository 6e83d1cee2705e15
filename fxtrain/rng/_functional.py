"""The ``functional`` mode, which makes torch's random functions sample from a key, also when code is recomputed."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from fxtrain._torch_internals.dispatch import HigherOrderOperator, Operator, OperatorPacket, is_transformed
from fxtrain._torch_internals.dynamo import constant_in_dynamo, inlined_only, is_dynamo_loaded, show_to_modes
from fxtrain._torch_internals.tracing import is_traced
from fxtrain.rng._philox import Key
from fxtrain.rng._torch_functions import REPLACED, SOMETIMES


def functional(key: Key) -> Functional:
    """A context manager in which torch's random functions sample from ``key``, not from the default generator.

    Each sampling call takes the next site in program order, starting at 0, so one key always gives the same samples.
    The context works in eager mode, inside ``torch.compile``, and inside and around ``torch.func`` transforms. In
    nested contexts, the innermost applies. It replaces the dropouts, attention with dropout, ``gumbel_softmax``,
    ``rrelu``, fractional pooling, the random factories, and the in-place samplers that ``torch.nn.init`` and
    ``torch.distributions`` use.

    A transform that batches the inputs but not the key gives all members the same samples, as
    ``vmap(randomness="same")`` does. To be filled in place under a ``vmap`` over keys, a tensor must come from
    ``torch.empty``, ``empty_like`` or ``new_empty``, or already be batched. A recomputed function, as in activation
    checkpointing, must enter its context itself: ``checkpoint`` a function that does. Training steps replay their
    samples automatically.

    Args:
        key: The position in the run. For explicit sampling in the same step, use a key of another stream.

    Raises:
        NotImplementedError: Inside the context, when a random function has no replacement.

    Example:
        >>> from fxtrain import rng
        >>> module = torch.nn.Dropout(0.5)
        >>> with rng.functional(rng.key(seed=0)):
        ...     module(torch.ones(6))
        tensor([0., 0., 0., 0., 2., 2.])
    """
    _show_all_to_modes()
    return Functional(key)


class DataAssignmentError(RuntimeError):
    """Raised if a function inside ``functional`` assigns to ``tensor.data`` in a way that cannot be traced."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(
            "expected a function that computes new values, got an assignment to .data of a tensor of shape "
            f"{list(tensor.shape)}. Store values that change between calls in a buffer and update it with copy_, or "
            "average weights with fxtrain.callbacks.ema."
        )


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Checks that the block does not advance torch's default generators.

    Raises:
        RuntimeError: On exit, if one advanced, because some samples did not come from a key.

    Example:
        >>> with untouched():
        ...     drawn = torch.rand(2)
        Traceback (most recent call last):
        ...
        RuntimeError: expected the default generator of cpu to stay unused, got samples from it. Sample inside ...
    """
    before = generator_states()
    yield
    for device, state in generator_states().items():
        if device in before and not torch.equal(before[device], state):
            raise RuntimeError(
                f"expected the default generator of {device} to stay unused, got samples from it. Sample inside "
                "rng.functional(key), or with the samplers of fxtrain.rng."
            )


def generator_states() -> dict[str, Tensor]:
    """Returns the states of torch's default generators by device.

    Example:
        >>> sorted(generator_states())[0]
        'cpu'
    """
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda:{index}": torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())}
    return states


class Watch(Protocol):
    """Checks in-place writes before they happen."""

    def __call__(self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """Inspects a call of a torch function. Raising prevents the call."""
        ...

    def refuse(self, name: str, target: Tensor) -> None:
        """Raises if ``target`` must not be written."""
        ...

    def watches(self, tensor: Tensor) -> bool:
        """Returns whether some writes to the tensor's storage are refused."""
        ...

    def owns(self, tensor: Tensor) -> bool:
        """Returns whether the tensor is a clone that the watched function may write."""
        ...


@inlined_only
class Functional(TorchFunctionMode):
    """The torch function mode behind ``functional``."""

    # Dynamo can trace this mode because it inherits __enter__ and __exit__, and counts sites in a Python int.

    def __init__(self, key: Key) -> None:
        super().__init__()
        self.key = key
        self.sites = 0
        self.watch: Watch | None = None

    def site(self) -> int:
        self.sites += 1
        return self.sites - 1

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # torch compiles torch.cond and FlexAttention by Dynamo, which does not know the names of these operators.
        if torch.compiler.is_dynamo_compiling() and isinstance(func, HigherOrderOperator):
            return func(*args, **kwargs)
        # Dispatch by name, a constant while tracing. A table keyed by functions costs Dynamo several guards per key.
        name = func.__name__
        if name == "__set__" and func == _ASSIGN_DATA:
            if args[1] is args[0]:
                return None  # module.to(device) does this if the module is already there
            return self._assign_data(func, *args)
        if self.watch is not None:
            self.watch(name, args, kwargs)
            if name == "__get__" and func == _READ_DATA and self.watch.watches(args[0]):
                return args[0].detach()  # same storage, but in-place writes bump the tensor's version counter
        if not _is_known(name):
            if isinstance(func, _OPERATORS) and _is_seeded(func):
                raise _refusal(name)
            return func(*args, **kwargs)
        if name in _INITIALISERS and "tensor" in kwargs:
            name = f"init.{name}"  # these functions of torch.nn.init share their names with tensor methods
        if name == "backward" and "gradient" in kwargs:
            name = "Tensor.backward"
        if name in _BODIES:
            with self:
                return _BODIES[name](*args, **kwargs)
        if name in REPLACED:
            return REPLACED[name](self, *args, **_without_hidden_state(name, kwargs))
        if name in SOMETIMES:
            return SOMETIMES[name](self, func, *args, **kwargs)
        raise _refusal(name)

    def _assign_data(self, func: Callable[[Tensor, Tensor], None], tensor: Tensor, value: Tensor) -> None:
        if self.watch is not None:
            self.watch.refuse("data", tensor)
        is_alike = tensor.shape == value.shape and tensor.dtype == value.dtype
        dynamo = torch.compiler.is_dynamo_compiling()
        if not dynamo and is_transformed():
            # Inside torch.func, assigning to .data of a tensor that is not wrapped crashes the process.
            if not is_alike or self.watch is None or not self.watch.owns(tensor):
                raise DataAssignmentError(tensor)
        elif not dynamo and not is_traced():
            func(tensor, value)
            return
        elif not is_alike:
            raise DataAssignmentError(tensor)
        tensor.detach().copy_(value.detach())  # visible to tracers and transforms


def _refusal(name: str) -> NotImplementedError:
    remedy = REFUSED.get(name, "Call the public torch function that uses it")
    return NotImplementedError(f"expected only random functions that rng.functional can replace, got {name}. {remedy}.")


def _without_hidden_state(name: str, kwargs: Mapping[str, object]) -> dict[str, object]:
    for option, remedy in (("generator", "Leave it out to sample from the key"), ("out", "Use the returned tensor")):
        if kwargs.get(option) is not None:
            raise NotImplementedError(f"expected {name} without {option}= inside rng.functional, got one. {remedy}.")
    return {option: value for option, value in kwargs.items() if option not in ("generator", "out")}


REFUSED = {
    "poisson": "Invert the distribution at samples of rng.uniform, or sample outside the step and pass the result in",
    "binomial": "Sum samples of rng.bernoulli, or sample outside the step and pass the result in",
    "_standard_gamma": "Sample Gamma, Beta, Chi2 and StudentT outside the step and pass the result in",
    "_sample_dirichlet": "Sample outside the step and pass the result in",
    "native_dropout": "Call torch.nn.functional.dropout",
    "_fused_dropout": "Call torch.nn.functional.dropout",
    "rrelu_with_noise": "Call torch.nn.functional.rrelu",
    "rrelu_with_noise_": "Call torch.nn.functional.rrelu",
}


# A torch function written in Python dispatches to modes as a whole, and the random functions that it calls would escape
# the mode. Its body therefore runs inside the mode, with the globals that trigger the dispatch replaced by `_no`.


def _no(*_: object) -> bool:
    return False


def _body(function: types.FunctionType) -> types.FunctionType:
    checks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    names = function.__globals__ | dict.fromkeys(checks, _no)
    if function.__module__ == "torch.nn.init":
        overrides = types.SimpleNamespace(has_torch_function_variadic=_no)
        names["torch"] = types.SimpleNamespace(no_grad=torch.no_grad, overrides=overrides)
    body = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


_INITIALISERS = ("uniform_", "normal_", "kaiming_uniform_")

_BODIES: dict[str, Callable[..., Any]] = {
    function.__name__: _body(function)
    for function in (
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.gumbel_softmax,
        F.multi_head_attention_forward,
        torch.svd_lowrank,
        torch.pca_lowrank,
        torch.lobpcg,
        torch.autograd.grad,  # a backward pass may recompute random functions
        torch.autograd.backward,
    )
} | {f"init.{name}": _body(getattr(torch.nn.init, name)) for name in _INITIALISERS}
_BODIES["Tensor.backward"] = _body(torch.Tensor.backward)


_ASSIGN_DATA = torch.Tensor.data.__set__  # pyright: ignore[reportAttributeAccessIssue]
_READ_DATA = torch.Tensor.data.__get__  # pyright: ignore[reportAttributeAccessIssue]
_KNOWN = frozenset({*REPLACED, *SOMETIMES, *REFUSED, *_BODIES, *_INITIALISERS})
_OPERATORS = (Operator, OperatorPacket)


# Dynamo calls these three while tracing but does not trace into them, which saves a guard per operation of the model.


@constant_in_dynamo
def _is_known(name: str) -> bool:
    return name in _KNOWN


@constant_in_dynamo
def _is_seeded(operator: Operator | OperatorPacket) -> bool:
    names = operator.overloads() if isinstance(operator, OperatorPacket) else ()
    overloads = [getattr(operator, name) for name in names] or [operator]
    if operator.__name__.partition(".")[0].endswith("_backward"):
        return False  # it is given the seed of the forward pass, though some are tagged
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)


@constant_in_dynamo
def _show_all_to_modes() -> bool:
    # Dynamo hides some of these functions from modes, unlike eager mode, and would leave hidden random samples in the
    # graph. Only code under a mode is affected.
    if is_dynamo_loaded():
        show_to_modes(_TORCH_FUNCTIONS)
    return True


_TORCH_FUNCTIONS = [getattr(torch, name) for name in (*REPLACED, *SOMETIMES, *REFUSED) if hasattr(torch, name)]


# Recomputations, such as activation checkpointing in the backward pass, replay their samples.

_MARK = "_fxtrain_site"
_lock = threading.Lock()
_real: Any = (torch.get_rng_state, torch.set_rng_state)
_depth = 0


@contextlib.contextmanager
def replayed() -> Iterator[None]:
    """A context manager in which torch's generator state also carries the next site of ``functional``.

    Code that recomputes, such as ``torch.utils.checkpoint``, reads the generator state before the first pass and
    restores it before the second. Inside ``functional``, samples come from the sites of a key instead. The state
    therefore carries the next site, and restoring the state restores the site. The generator itself is not changed.

    Within this context, ``torch.get_rng_state`` and ``torch.set_rng_state`` are replaced. Threads outside
    ``functional`` read and write the generator as usual.

    Example:
        >>> from fxtrain import rng
        >>> with rng.functional(rng.key(0)), replayed():
        ...     before = torch.get_rng_state()
        ...     first = torch.rand(2)
        ...     torch.set_rng_state(before)
        ...     bool((torch.rand(2) == first).all())
        True
    """
    global _depth
    with _lock:
        _depth += 1
        torch.get_rng_state, torch.set_rng_state = _get, _set
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if not _depth:
                torch.get_rng_state, torch.set_rng_state = _real


def _get() -> Tensor:
    state = _real[0]()
    mode = innermost_functional()
    if mode is not None:
        setattr(state, _MARK, (mode, mode.sites))
    return state


def _set(new_state: Tensor) -> None:
    mode, site = getattr(new_state, _MARK, (None, 0))
    if mode is not None and mode is innermost_functional():
        mode.sites = site
    else:
        _real[1](new_state)


def innermost_functional() -> Functional | None:
    # Function modes see this call as one of torch's functions. `Functional` answers it, and others pass it on.
    return handle_torch_function(innermost_functional, (None,)) if has_torch_function((None,)) else None
