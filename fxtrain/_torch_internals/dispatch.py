"""torch's dispatcher: the modes and transforms of this thread, and operators."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

from fxtrain._torch_internals.interface import Feature, Interface

GET_MODE = Interface("torch._C._get_dispatch_mode", "recognizing a trace", Feature.TRACED)
MODE_KEYS = Interface("torch._C._TorchDispatchModeKey", "recognizing a trace", Feature.TRACED)
NO_MODES = Interface("torch.utils._python_dispatch._disable_current_modes", "reading values in a trace", Feature.TRACED)
INCLUDED_KEYS = Interface("torch._C._dispatch_tls_local_include_set", "garbage collection after a failed compilation")
EXCLUDED_KEYS = Interface("torch._C._dispatch_tls_local_exclude_set", "garbage collection after a failed compilation")
KEY_GUARD = Interface("torch._C._ForceDispatchKeyGuard", "garbage collection after a failed compilation")
SET_GRAD_ENABLED = Interface("torch._C._set_grad_enabled", "calls of Inductor's code with low dispatch overhead")
OPERATOR = Interface("torch._ops.OpOverload", "telling operators from other functions", Feature.TRACED)
PACKET = Interface("torch._ops.OpOverloadPacket", "telling operators from other functions", Feature.TRACED)
HIGHER_ORDER = Interface("torch._ops.HigherOrderOperator", "models that call torch.cond or FlexAttention")
SCHEMA = Interface("torch.ops.aten.copy_.default._schema", "finding in-place operators and views", Feature.TRACED)
TRANSFORMS = Interface("torch._C._functorch.peek_interpreter_stack", "recognizing code inside torch.func")
IS_WRAPPED = Interface("torch._C._functorch.is_functorch_wrapped_tensor", "telling which tensors share memory")
UNWRAPPED = Interface("torch._C._functorch.get_unwrapped", "telling which tensors share memory")
NO_FUNCTION_MODES = Interface("torch._C.DisableTorchFunction", "importing modules in a trace", Feature.TRACED)
NO_TRANSFORMS = Interface(
    "torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack", "importing modules in a trace", Feature.TRACED
)
ITEM = Interface("torch.ops.aten._local_scalar_dense.default", "reading values in a trace", Feature.TRACED)
LINEAR = Interface("torch.ops.mkldnn._linear_pointwise", "matmuls by oneDNN", Feature.INDUCTOR)
CTC = Interface("torch.ops.aten._ctc_loss", "CTC losses in a graph", Feature.TRACED)
CTC_BACKWARD = Interface("torch.ops.aten._ctc_loss_backward", "CTC losses in a graph", Feature.TRACED)
PURE_BATCH_NORM = Interface(
    "torch.ops.aten._native_batch_norm_legit_functional.default", "programs of models with batch norms"
)
ATTENTION = Interface("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu", "FLOPs of attention in fx.explain")
ATTENTION_BACKWARD = Interface(
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward", "FLOPs of attention in fx.explain"
)

if TYPE_CHECKING:
    from torch._ops import OpOverload as Operator
    from torch._ops import OpOverloadPacket as OperatorPacket
else:
    Operator = type(torch.ops.aten.add.Tensor)  # one signature of an operator, as in the nodes of graphs
    OperatorPacket = type(torch.ops.aten.add)  # an operator with all of its signatures

HigherOrderOperator: Any = HIGHER_ORDER.get() if HIGHER_ORDER.exists else ()  # a type, or none for isinstance


class LightDispatchMode(TorchDispatchMode):
    """A dispatch mode that does not import Dynamo, which takes a second. Dynamo does not skip its methods."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


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
    return NO_MODES.get()() if NO_MODES.exists else contextlib.nullcontext()


@contextlib.contextmanager
def dispatch_keys_kept() -> Iterator[bool]:
    """Restores on exit which dispatch keys of this thread are included and excluded. Yields whether torch can."""
    if not (INCLUDED_KEYS.exists and EXCLUDED_KEYS.exists and KEY_GUARD.exists):
        yield False
        return
    with KEY_GUARD.get()(INCLUDED_KEYS.get()(), EXCLUDED_KEYS.get()()):
        yield True


def is_transformed() -> bool:
    """Whether this call is inside a transform. Not inside Dynamo. True where torch cannot tell."""
    return not TRANSFORMS.exists or TRANSFORMS.get()() is not None


def unwrapped(tensor: Tensor) -> Tensor:
    """Returns the tensor inside all wrappers of transforms."""
    if IS_WRAPPED.exists and UNWRAPPED.exists:
        while IS_WRAPPED.get()(tensor):
            tensor = UNWRAPPED.get()(tensor)
    return tensor


@contextlib.contextmanager
def outside_of_traces() -> Iterator[None]:
    """A context outside of all modes and transforms of this thread."""
    with without_dispatch_modes(), NO_FUNCTION_MODES.get()(), NO_TRANSFORMS.get()():
        yield


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


def is_last_write(node: Node) -> bool:
    """Whether a node of a graph overwrites an input of the graph, and nothing reads its result."""
    if node.target is not torch.ops.aten.copy_.default or node.users:
        return False
    written = node.args[0]
    return isinstance(written, Node) and written.op == "placeholder"


def hides_writes(operator: object) -> bool:
    """Whether an operator may write statistics that its schema does not declare as written.

    Example:
        >>> hides_writes(torch.ops.aten.native_batch_norm.default), hides_writes(torch.ops.aten.add.Tensor)
        (True, False)
    """
    name = operator_name(operator) if isinstance(operator, Operator) else ""
    return "batch_norm" in name and not name.endswith(("_functional", "_backward", "_no_training"))


def out_of_place(operator: Operator) -> Operator | None:
    """Returns the operator that computes what an in-place operator writes into its first argument, if there is one.

    Example:
        >>> out_of_place(torch.ops.aten.add_.Tensor)
        <OpOverload(op='aten.add', overload='Tensor')>
    """
    name = operator_name(operator)
    packet = getattr(getattr(torch.ops, operator.namespace), name.removesuffix("_"), None)
    return getattr(packet, operator._overloadname, None) if name.endswith("_") else None


def arguments_kept(operator: Operator) -> list[bool]:
    """Returns whether an operator leaves each of its arguments unchanged, in order.

    Example:
        >>> arguments_kept(torch.ops.aten.copy_.default)
        [False, True, True]
    """
    return [argument.alias_info is None for argument in operator._schema.arguments]


def argument_of(operator: Operator, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    """Returns the argument with this name of a call of an operator, or its default, or None.

    Example:
        >>> argument_of(torch.ops.aten.add.Tensor, (1, 2), {}, "other")
        2
        >>> argument_of(torch.ops.aten.add.Tensor, (1, 2), {}, "alpha")
        1
    """
    for argument, given in itertools.zip_longest(operator._schema.arguments, args, fillvalue=None):
        if argument is not None and argument.name == name:
            return kwargs.get(name, argument.default_value if given is None else given)
    return None


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


def item_operator() -> Any:
    """Returns the operator that reads a one-element tensor as a number. None if torch lacks it."""
    return ITEM.get() if ITEM.exists else None


def linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x weight^T + bias. Shapes: x [n, k], weight [m, k], bias [m], result [n, m]."""
    return LINEAR.get()(x, weight, bias, "none", [], "")


def ctc_loss(
    scores: Tensor, targets: Tensor, inputs: Sequence[int], lengths: Sequence[int], blank: int, zero_infinity: bool
) -> tuple[Tensor, Tensor]:
    """Returns CTC losses [batch] and their gradients with respect to the scores [time, batch, classes].

    Takes the arguments of ``torch.nn.functional.ctc_loss``.
    """
    given = targets, inputs, lengths
    losses, alphas = CTC.get()(scores, *given, blank, zero_infinity)
    ones = losses.new_ones(losses.shape)
    return losses, CTC_BACKWARD.get()(ones, scores, *given, losses, alphas, blank, zero_infinity)


def pure_batch_norm() -> Operator | None:
    """Returns the batch norm that returns its running statistics instead of writing them. None if torch lacks it.

    It takes the arguments of ``torch.ops.aten.native_batch_norm``, and returns the running mean and the running
    variance after that operator's results.
    """
    return PURE_BATCH_NORM.get() if PURE_BATCH_NORM.exists else None


def attention_on_cpu() -> tuple[Any, Any]:
    """Returns the operators of attention on a CPU, forward and backward."""
    return ATTENTION.get(), ATTENTION_BACKWARD.get()
