"""The transforms of ``torch.func``: whether code runs inside one, and what they wrap."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from fxtrain._torch_internals.dispatch import without_dispatch_modes
from fxtrain._torch_internals.interface import Feature, Interface

TRANSFORMS = Interface("torch._C._functorch.peek_interpreter_stack", "recognizing code inside torch.func")
IS_WRAPPED = Interface("torch._C._functorch.is_functorch_wrapped_tensor", "telling which tensors share memory")
UNWRAPPED = Interface("torch._C._functorch.get_unwrapped", "telling which tensors share memory")
NO_FUNCTION_MODES = Interface("torch._C.DisableTorchFunction", "importing modules during a trace", Feature.TRACED)
NO_TRANSFORMS = Interface(
    "torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack",
    "importing modules during a trace",
    Feature.TRACED,
)


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
