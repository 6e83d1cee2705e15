"""``functional``: torch's own random functions, drawn from a key, so that a user's module stays as it is."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxtrain.rng._frames import inlined_only
from fxtrain.rng._philox import Key
from fxtrain.rng._replacements import REPLACED, SOMETIMES
from fxtrain.rng._tracing import is_traced, is_transformed


def functional(key: Key) -> Functional:
    """A context in which torch's random functions draw from ``key``; the default generator is not touched.

    Each call that draws takes the next site, in program order, from 0, so one key gives the same numbers again. It
    works eager, inside ``torch.compile``, and inside and around the transforms of ``torch.func``. Contexts nest, and
    the innermost draws. Replaced are the dropouts, attention with dropout, ``gumbel_softmax``, ``rrelu``, fractional
    pooling, the random factories, and the in-place samplers on which ``torch.nn.init`` and ``torch.distributions``
    stand.

    A transform of the caller that batches inputs and not the key gives all its members the same numbers, as
    ``vmap(randomness="same")`` does. To be filled under a ``vmap`` over keys, a tensor must come from ``torch.empty``,
    ``empty_like`` or ``new_empty``, or be batched already. What is computed again, as in activation checkpointing, must
    enter a context of its own: ``checkpoint`` a function that does. Steps replay their numbers by themselves.

    Args:
        key: Where in the run. To draw by hand as well, use another stream for that.

    Raises:
        NotImplementedError: Inside, by a random function that cannot be replaced, which it names.

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
    """A function inside ``functional`` assigned to the ``data`` of a tensor, where that cannot be followed."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(
            "expected a function that computes new values, got an assignment to .data of a tensor of shape "
            f"{list(tensor.shape)}. Keep what a call changes in a buffer and write to that with copy_, or average "
            "weights by fxtrain.callbacks.ema."
        )


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Checks that the block leaves the default generators where they are. Costs some tens of microseconds.

    Raises:
        RuntimeError: At the end, if one moved: something drew numbers that are no function of a key.

    Example:
        >>> with untouched():
        ...     drawn = torch.rand(2)
        Traceback (most recent call last):
        ...
        RuntimeError: The default generator of cpu moved, so hidden random numbers were drawn: ...
    """
    before = _generator_states()
    yield
    for device, state in _generator_states().items():
        if device in before and not torch.equal(before[device], state):
            raise RuntimeError(
                f"The default generator of {device} moved, so hidden random numbers were drawn: draw them inside "
                "rng.functional(key), or with the samplers of fxtrain.rng."
            )


def _generator_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda:{index}": torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())}
    return states


class Watch(Protocol):
    """Decides about writes in place before they happen."""

    def __call__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Looks at a function of torch, which runs unless this raises."""
        ...

    def refuse(self, name: str, target: Tensor) -> None:
        """Raises if ``target`` may not be written."""
        ...

    def watches(self, tensor: Tensor) -> bool:
        """Whether some writes into the memory of the tensor are refused."""
        ...

    def owns(self, tensor: Tensor) -> bool:
        """Whether the tensor is a clone that the watched function may write."""
        ...


@inlined_only
class Functional(TorchFunctionMode):
    """The mode of ``functional``, which makes it."""

    # Dynamo follows a mode that inherits __enter__ and __exit__, and a Python number on it that changes.

    def __init__(self, key: Key) -> None:
        super().__init__()
        self.key = key
        self.sites = 0
        self.watch: Watch | None = None

    def site(self) -> int:
        self.sites += 1
        return self.sites - 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # By name, a constant while tracing: a table with functions as keys costs Dynamo several guards a key.
        name = func.__name__
        kwargs = kwargs or {}
        if name == "__set__" and func == _ASSIGN_DATA:
            if args[1] is args[0]:
                return None  # as module.to(device) does on the device it is on
            return self._assign_data(func, *args)
        if self.watch is not None:
            self.watch(name, args, kwargs)
            if name == "__get__" and func == _READ_DATA and self.watch.watches(args[0]):
                return args[0].detach()  # alike, but torch counts what is written into it as a write to the tensor
        if not _is_known(name):
            if isinstance(func, _OPERATORS) and _is_seeded(func):
                raise _refusal(name)
            return func(*args, **kwargs)
        if name in _INITIALISERS and "tensor" in kwargs:
            name = f"init.{name}"  # torch.nn.init passes this keyword, and has names that methods of tensors have too
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

    def _assign_data(self, func: Any, tensor: Tensor, value: Tensor) -> None:
        if self.watch is not None:
            self.watch.refuse("data", tensor)
        is_alike = tensor.shape == value.shape and tensor.dtype == value.dtype
        dynamo = torch.compiler.is_dynamo_compiling()
        if not dynamo and is_transformed():
            # Inside torch.func an assignment ends the process where the tensor is not a wrapped one.
            if not is_alike or self.watch is None or not self.watch.owns(tensor):
                raise DataAssignmentError(tensor)
        elif not dynamo and not is_traced():
            func(tensor, value)
            return
        elif not is_alike:
            raise DataAssignmentError(tensor)
        tensor.detach().copy_(value.detach())  # which tracers and transforms see


def _refusal(name: str) -> NotImplementedError:
    remedy = REFUSED.get(name, "call the function of torch that stands on it")
    return NotImplementedError(
        f"{name} draws hidden random numbers, and rng.functional has nothing to put in its place: {remedy}."
    )


def _without_hidden_state(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    for option, remedy in (
        ("generator", "leave it out, and the numbers are drawn from the key"),
        ("out", "take the result"),
    ):
        if kwargs.get(option) is not None:
            raise NotImplementedError(f"{name} inside rng.functional takes no {option}=: {remedy}.")
    return {option: value for option, value in kwargs.items() if option not in ("generator", "out")}


REFUSED = {
    "poisson": "draw from rng.uniform and invert the distribution, or draw outside the step and pass the numbers in",
    "binomial": "sum rng.bernoulli, or draw outside the step and pass the numbers in",
    "_standard_gamma": "draw Gamma, Beta, Chi2 and StudentT outside the step, and pass the numbers in",
    "_sample_dirichlet": "draw outside the step, and pass the numbers in",
    "native_dropout": "call torch.nn.functional.dropout",
    "_fused_dropout": "call torch.nn.functional.dropout",
    "rrelu_with_noise": "call torch.nn.functional.rrelu",
    "rrelu_with_noise_": "call torch.nn.functional.rrelu",
}


# A function of torch that is written in Python offers itself to modes whole, and what it calls would escape. So its
# body is run with the mode on, and without the offer, which it makes if a function among its globals says so.


def _no(*_: Any) -> bool:
    return False


def _body(function: Any) -> Any:
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
        torch.autograd.grad,  # a backward pass may compute again what draws
        torch.autograd.backward,
    )
} | {f"init.{name}": _body(getattr(torch.nn.init, name)) for name in _INITIALISERS}
_BODIES["Tensor.backward"] = _body(torch.Tensor.backward)


_ASSIGN_DATA = torch.Tensor.data.__set__  # pyright: ignore[reportAttributeAccessIssue]
_READ_DATA = torch.Tensor.data.__get__  # pyright: ignore[reportAttributeAccessIssue]
_KNOWN = frozenset({*REPLACED, *SOMETIMES, *REFUSED, *_BODIES, *_INITIALISERS})
_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


def _constant(function: Any) -> Any:
    # What torch.compiler.assume_constant_result does, which would import the whole of Dynamo to do it: a second.
    function._dynamo_marked_constant = True
    return function


# While tracing, Dynamo calls these three and does not look inside: a guard for every operation of the model is saved.


@_constant
def _is_known(name: str) -> bool:
    return name in _KNOWN


@_constant
def _is_seeded(operator: Any) -> bool:
    names = operator.overloads() if isinstance(operator, torch._ops.OpOverloadPacket) else ()
    overloads = [getattr(operator, name) for name in names] or [operator]
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)


@_constant
def _show_all_to_modes() -> bool:
    # Dynamo keeps some of these from modes, which see them in eager mode, and would leave hidden random numbers in the
    # graph. There is no public door. Only code under a mode is affected.
    if "torch._dynamo" in sys.modules:
        from torch._dynamo.variables.torch import get_overridable_functions

        get_overridable_functions().update(_TORCH_FUNCTIONS)
    return True


_TORCH_FUNCTIONS = [getattr(torch, name) for name in (*REPLACED, *SOMETIMES, *REFUSED) if hasattr(torch, name)]
