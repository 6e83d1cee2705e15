"""The forward pass under a precision policy: modules kept in float32, and dtype errors that name the module."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxtrain import rng, tree
from fxtrain._torch_internals.dynamo import constant_in_dynamo
from fxtrain._torch_internals.modules import CALLS, add_idle_hook, set_forward_pre_hooks
from fxtrain.core import Batch, TrainState, Tree, dtype_name, matching
from fxtrain.core._shard import holds_shards
from fxtrain.core._tracebacks import locals_of, place
from fxtrain.model import CallResult, Model, model_of
from fxtrain.model._model_calls import Inside
from fxtrain.precision import HALF, Policy
from fxtrain.step._batch_note import noting_batch
from fxtrain.tree import as_name, leaf_paths

if TYPE_CHECKING:
    from fxtrain.distributed import Mesh
    from fxtrain.distributed._split_modules import SplitModules


def forward(
    policy: Policy,
    state: TrainState,
    function: Callable[..., object],
    batch: Batch,
    *,
    train: bool,
    key: rng.Key,
    finish: Callable[[Tree], Tree] | None = None,
    mesh: Mesh | None = None,
) -> CallResult:
    """Calls ``function(model, batch)`` in the dtypes of a policy.

    Args:
        policy: The precision policy.
        state: State whose parameters and buffers are used.
        function: A loss function, or the function of an evaluation step.
        batch: Its second argument.
        train: Whether the modules are in training mode.
        key: Key of the random samples.
        finish: Applied to the output while the tensors are still in place.
        mesh: The ranks, if modules of the state may be split among those of a model.

    Returns:
        The output, the buffers after the call, and the frozen parameters that calls write.

    Raises:
        RuntimeError: If dtypes do not match inside a module. The error names the module.
        ValueError: If a pattern of ``policy.keep`` matches no module.
        TypeError: If the state is sharded otherwise than by a plan for ``mesh``.
    """
    model = model_of(state)
    params, buffers, inside = state.params, state.buffers, None
    if not torch.compiler.is_dynamo_compiling() and holds_shards(params):
        from fxtrain.distributed._split_modules import SplitModules  # keeps the import of fxtrain fast

        split = SplitModules(params, mesh)
        params, inside = split.params, functools.partial(_computing_with_parts, split)
        finish = functools.partial(_checked, split.checked, finish)
    if policy.keep:
        params, buffers = _kept(policy, params), _kept(policy, buffers)
        kept = functools.partial(_in_float32, policy, state.step.device)
        inside = kept if inside is None else functools.partial(_both, inside, kept)
    device = state.step.device
    with noting_batch(batch, device), policy.autocast(device), _naming_module(model, policy, train):
        called = model.call(
            params, buffers, function, batch, train=train, key=key, check=True, finish=finish, inside=inside
        )
    if not policy.keep:
        return called
    after = tree.map(lambda leaf, like: leaf.to(like.dtype), called.buffers, state.buffers)
    return CallResult(called.output, after, model.cast_written(called.written, state.params))


@contextlib.contextmanager
def _computing_with_parts(split: SplitModules, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    with forwards_wrapped(split.wrappers(modules)), split.watching(modules):
        yield


@contextlib.contextmanager
def _both(outer: Inside, inner: Inside, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    with outer(modules), inner(modules):
        yield


def _checked(check: Callable[[Tree], Tree], finish: Callable[[Tree], Tree] | None, output: Tree) -> Tree:
    output = check(output)
    return output if finish is None else finish(output)


def _kept(policy: Policy, tensors: Tree) -> Tree:
    """Returns the tensors, with those of kept modules in float32."""
    if policy.param not in HALF:
        return tensors
    leaves, structure = tree.flatten(tensors)
    names = [as_name(path).rpartition(".")[0] for path in leaf_paths(tensors)]
    return tree.unflatten(
        structure,
        [_widened(leaf) if _is_kept(policy, name) else leaf for name, leaf in zip(names, leaves, strict=True)],
    )


def _is_kept(policy: Policy, name: str) -> bool:
    """Whether a module or one of its parents matches a pattern."""
    parts = name.split(".")
    return any(_matches(".".join(parts[:count]), policy.keep) for count in range(len(parts) + 1))


@constant_in_dynamo  # which cannot trace fnmatch
def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _widened(leaf: Tree) -> Tree:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in HALF else leaf


@contextlib.contextmanager
def _in_float32(policy: Policy, device: torch.device, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Makes the kept modules compute in float32, by instance attributes that shadow their ``forward`` methods."""
    if not torch.compiler.is_dynamo_compiling():
        # Raises if a pattern matches no module.
        matching([name for name in modules if name] or list(modules), policy.keep, "module")
    kept = [module for name, module in modules.items() if _matches(name, policy.keep)]
    # Submodules of a kept module run inside it, so their outputs stay in float32.
    parts = {id(part) for module in kept for part in module.modules() if part is not module}
    outer = {id(module): module for module in kept if id(module) not in parts}.values()
    with forwards_wrapped([(module, functools.partial(_float32_forward, policy, device.type)) for module in outer]):
        yield


@contextlib.contextmanager
def forwards_wrapped(wrappers: Iterable[tuple[nn.Module, Callable[..., Tree]]]) -> Iterator[None]:
    """Makes modules call ``wrapper(forward, *args, **kwargs)`` inside the context, also while Dynamo traces it.

    Instance attributes shadow the methods ``forward``.

    Args:
        wrappers: Modules with their wrappers.
    """
    methods = [(module, "forward" in module.__dict__, module.forward, wrapper) for module, wrapper in wrappers]
    for module, _, method, wrapper in methods:
        module.forward = functools.partial(wrapper, method)
    # Dynamo of torch 2.11 would call the method of the class.
    hooks = [add_idle_hook(module) for module, *_ in methods] if torch.compiler.is_dynamo_compiling() else []
    try:
        yield
    finally:
        for (module, *_), own in zip(methods, hooks, strict=False):
            set_forward_pre_hooks(module, own)
        for module, is_own, method, _ in methods:
            # Dynamo cannot delete attributes that it has added.
            if is_own or hooks:
                module.forward = method
            else:
                del module.forward


def _float32_forward(
    policy: Policy, device_type: str, forward: Callable[..., Tree], *args: Tree, **kwargs: Tree
) -> Tree:
    args, kwargs = tree.map(_widened, (args, kwargs))
    with torch.autocast(device_type, enabled=False):
        output = forward(*args, **kwargs)
    if policy.param not in HALF:
        return output
    return tree.map(
        lambda leaf: leaf.to(policy.param) if isinstance(leaf, Tensor) and leaf.dtype == torch.float32 else leaf,
        output,
    )


_DTYPE_ERROR = re.compile(
    r"dtype|scalar type|data type|Input type|result type|not implemented for '(BFloat16|Half|Float|Double)'"
)
_DTYPES = {"bfloat16": "bfloat16", "half": "float16", "float16": "float16", "float": "float32", "float32": "float32"}
_DTYPES |= {"double": "float64", "float64": "float64", "long": "int64", "int": "int32"}


@contextlib.contextmanager
def _naming_module(model: Model, policy: Policy, train: bool) -> Iterator[None]:
    """Names the module in errors about dtypes that do not match."""
    try:
        yield
    except RuntimeError as error:
        if torch.compiler.is_dynamo_compiling() or not _DTYPE_ERROR.search(str(error)):
            raise
        found = _innermost(error, model.named_modules(train=train))
        if found is None:
            raise
        raise _mismatch(policy, *found, error) from error


def _innermost(error: Exception, modules: Mapping[str, nn.Module]) -> tuple[str, FrameType, int] | None:
    """Returns the module name, the frame and the line of the innermost frame that runs a module's method."""
    names = {id(module): name for name, module in modules.items()}
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = names.get(id(_owner(frame)))
        if name is not None and frame.f_code.co_name not in CALLS:
            found = name, frame, line
    return found


def _owner(frame: FrameType) -> object:
    """Returns the first argument of a frame, which is the object if the frame runs a method."""
    return locals_of(frame).get(frame.f_code.co_varnames[0]) if frame.f_code.co_argcount else None


def _mismatch(policy: Policy, name: str, frame: FrameType, line: int, error: Exception) -> RuntimeError:
    said = re.findall(r"\b(?:c10::)?(BFloat16|Half|[Ff]loat(?:16|32|64)?|[Dd]ouble|bfloat16|Long|Int)\b", str(error))
    dtypes = dict.fromkeys(_DTYPES[dtype.lower()] for dtype in said)
    if len(dtypes) < 2:
        read = (value for value in locals_of(frame).values() if isinstance(value, Tensor) and value.is_floating_point())
        dtypes |= dict.fromkeys(dtype_name(value.dtype) for value in read)
    owner = type(_owner(frame)).__name__
    where = f"the module {name!r} ({owner})" if name else f"the model ({owner})"
    if policy.casts or policy.param in HALF:
        remedy = f"Cast the tensors to one dtype, or keep the module in float32: {_keeping(policy, name or '*')}."
    else:
        remedy = "Cast the batch, the tensors on that line, or the parameters with fxtrain.init(..., dtype=...)."
    return RuntimeError(
        f"expected {where} to compute with tensors of matching dtypes, got {' and '.join(dtypes)} at "
        f"{place(frame.f_code.co_filename, line)}: {str(error).rstrip('.')}. {remedy}"
    )


def _keeping(policy: Policy, pattern: str) -> str:
    """Returns the code of the policy with one more pattern in ``keep``."""
    given = dataclasses.replace(policy, keep=(*policy.keep, pattern))
    changed = [field.name for field in dataclasses.fields(Policy) if getattr(given, field.name) != field.default]
    return f"precision=fxtrain.Policy({', '.join(f'{name}={getattr(given, name)!r}' for name in changed)})"
