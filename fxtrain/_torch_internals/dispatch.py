"""torch's dispatcher: the modes of this thread, and operators."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

from fxtrain._torch_internals.interface import Feature, Interface

GET_MODE = Interface("torch._C._get_dispatch_mode", "recognizing a trace", Feature.TRACED)
MODE_KEYS = Interface("torch._C._TorchDispatchModeKey", "recognizing a trace", Feature.TRACED)
WITHOUT_MODES = Interface(
    "torch.utils._python_dispatch._disable_current_modes", "reading values in a trace", Feature.TRACED
)
INCLUDED_KEYS = Interface("torch._C._dispatch_tls_local_include_set", "garbage collection after a failed compilation")
EXCLUDED_KEYS = Interface("torch._C._dispatch_tls_local_exclude_set", "garbage collection after a failed compilation")
KEY_GUARD = Interface("torch._C._ForceDispatchKeyGuard", "garbage collection after a failed compilation")
SET_GRAD_ENABLED = Interface("torch._C._set_grad_enabled", "calls of Inductor's code with little dispatch overhead")
OPERATOR = Interface("torch._ops.OpOverload", "telling operators from other functions", Feature.TRACED)
PACKET = Interface("torch._ops.OpOverloadPacket", "telling operators from other functions", Feature.TRACED)
SCHEMA = Interface("torch.ops.aten.copy_.default._schema", "finding in-place operators and views", Feature.TRACED)

if TYPE_CHECKING:
    from torch._ops import OpOverload as Operator
    from torch._ops import OpOverloadPacket as OperatorPacket
else:
    Operator = type(torch.ops.aten.add.Tensor)  # one signature of an operator, as in the nodes of graphs
    OperatorPacket = type(torch.ops.aten.add)  # an operator with all of its signatures


def is_recorded() -> bool:
    """Whether ``make_fx`` records this thread's operations. Not inside Dynamo."""
    if not (GET_MODE.exists and MODE_KEYS.exists):
        return torch.compiler.is_compiling()  # true during fxtrain's traces
    return GET_MODE.get()(MODE_KEYS.get().PROXY) is not None


def fake_mode() -> Any:
    """Returns the mode that makes this thread's tensors fake, or None. Not inside Dynamo."""
    if not (GET_MODE.exists and MODE_KEYS.exists):
        return None
    return GET_MODE.get()(MODE_KEYS.get().FAKE)


def without_dispatch_modes() -> AbstractContextManager[object]:
    """A context whose operations no dispatch mode sees: neither recorded nor run on fake tensors."""
    return WITHOUT_MODES.get()() if WITHOUT_MODES.exists else contextlib.nullcontext()


@contextlib.contextmanager
def dispatch_keys_kept() -> Iterator[bool]:
    """Restores on exit which dispatch keys of this thread are included and excluded. Yields whether torch can."""
    if not (INCLUDED_KEYS.exists and EXCLUDED_KEYS.exists and KEY_GUARD.exists):
        yield False
        return
    with KEY_GUARD.get()(INCLUDED_KEYS.get()(), EXCLUDED_KEYS.get()()):
        yield True


def grad_mode_setter() -> Callable[[bool], object]:
    """Returns a function that sets the grad mode, faster than ``torch.set_grad_enabled``."""
    return SET_GRAD_ENABLED.get() if SET_GRAD_ENABLED.exists else torch.set_grad_enabled


def operator_name(operator: Operator) -> str:
    """Returns the name of an operator without its namespace and overload.

    Example:
        >>> operator_name(torch.ops.aten.add.Tensor)
        'add'
    """
    return operator.overloadpacket.__name__


def is_in_place(operator: Operator) -> bool:
    """Whether an operator writes into one of its arguments.

    Example:
        >>> is_in_place(torch.ops.aten.copy_.default), is_in_place(torch.ops.aten.add.Tensor)
        (True, False)
    """
    return operator._schema.is_mutable


def is_view(operator: object) -> bool:
    """Whether an operator returns views of its arguments.

    Example:
        >>> is_view(torch.ops.aten.t.default), is_view(torch.ops.aten.copy_.default)
        (True, False)
    """
    schema = getattr(operator, "_schema", None)
    if schema is None:
        return False
    return any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
