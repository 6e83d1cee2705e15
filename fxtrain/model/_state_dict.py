"""Converts between states and PyTorch state dicts, and reports which names match."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fxtrain import tree
from fxtrain.core import (
    Record,
    TrainState,
    Tree,
    check_train_state,
    dtype_name,
    first_lines,
    first_names,
    matching,
    warn,
)
from fxtrain.core._shard import refuse_shards
from fxtrain.model._model import model_of
from fxtrain.model._named_tensors import EXTRA_STATE, NamedTensors, Rename, proposed, renamed
from fxtrain.model._tensor_access import copies
from fxtrain.model._types import Modules, StateDict

_MAX_LINES = 8


def state_dict(state: TrainState) -> Tree:
    """Returns the ``state_dict()`` of the state's module, with copied tensors.

    Tied parameters appear under each of their names. Non-persistent buffers are left out. State dict hooks of the
    modules run.

    Args:
        state: A state from ``init``. If ``init`` was given a tree of modules, the result is a tree of state dicts.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(2, 1))
        >>> module = torch.nn.Linear(2, 1)
        >>> module.load_state_dict(fx.state_dict(state))
        <All keys matched successfully>
    """

    def read(modules: Tree) -> Tree:
        return tree.map(
            lambda part: (
                {name: copies(value) for name, value in part.state_dict().items()}
                if isinstance(part, nn.Module)
                else part.clone()
            ),
            modules,
        )

    model = model_of(state)
    refuse_shards(state.params, "state_dict(state)")
    return model.call(state.params, state.buffers, read, train=False)[0]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LoadReport(Record):
    """The report of ``load_state_dict``: which names were loaded, and which were not.

    Names are those of ``state_dict(state)``. In a tree of modules they begin with the path of the module, joined by
    dots.

    Args:
        state: The state with the weights.
        loaded: Names whose values come from the state dict, tied names included.
        missing: Names that are not in the state dict. They keep their values in the given state.
        unexpected: Names in the state dict that the model does not have.
        mismatched: Names with another shape in the state dict, mapped to that shape and the model's. They keep their
            values in the given state.
        cast: Names with another dtype in the state dict, mapped to that dtype and the model's.

    Example:
        >>> import fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(2, 1))
        >>> report = fx.load_state_dict(state, {"bias": torch.zeros(1)}, strict=False, report=True)
        >>> report.loaded, report.missing, report.state.params["bias"]
        (['bias'], ['weight'], tensor([0.]))
    """

    state: TrainState
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, tuple[torch.Size, torch.Size]]
    cast: dict[str, tuple[torch.dtype, torch.dtype]]

    def warn(self) -> None:
        """Warns about names that were not loaded or not used."""
        lines: list[str] = []
        if self.missing:
            lines.append(f"Not in the state dict ({len(self.missing)}): {first_names(self.missing)}.")
        if self.unexpected:
            lines.append(f"Not in the model ({len(self.unexpected)}): {first_names(self.unexpected)}.")
        if self.mismatched:
            shapes = [f"{name} {list(there)} for {list(here)}" for name, (there, here) in self.mismatched.items()]
            lines.append(f"With another shape ({len(shapes)}): {first_names(shapes)}.")
        if lines:
            kept = len(self.missing) + len(self.mismatched)
            warn(
                f"Loaded {len(self.loaded)} of {len(self.loaded) + kept} names of the model, and kept the state's "
                f"values for the others. {' '.join(lines)}",
                UserWarning,
            )


class LoadOptions(TypedDict, total=False):
    """The options of ``load_state_dict``, which documents them."""

    part: str
    strict: bool
    where: str | Sequence[str] | None
    rename: Rename
    ignore_mismatched_sizes: bool
    cast: bool


@overload
def load_state_dict(
    state: TrainState, state_dict: StateDict, *, report: Literal[False] = False, **options: Unpack[LoadOptions]
) -> TrainState: ...


@overload
def load_state_dict(
    state: TrainState, state_dict: StateDict, *, report: Literal[True], **options: Unpack[LoadOptions]
) -> LoadReport: ...


def load_state_dict(
    state: TrainState,
    state_dict: StateDict,
    *,
    part: str = "",
    strict: bool = True,
    where: str | Sequence[str] | None = None,
    rename: Rename = None,
    ignore_mismatched_sizes: bool = False,
    cast: bool = False,
    report: bool = False,
) -> TrainState | LoadReport:
    """Returns ``state`` with the weights of a state dict. All else is unchanged, including the optimizer state.

    One of several tied names is enough. A warning summarizes the names that were skipped.

    Args:
        state: A state from ``init``. It is not modified.
        state_dict: A mapping from name to tensor, from ``module.state_dict()`` or ``torch.load``. For a tree of
            modules: a tree of such mappings, or one mapping whose names begin with the path of the module, such as
            ``"generator.layers.0.weight"``. ``fxtrain.load_weights`` reads files.
        part: Path of the submodule that the state dict belongs to, such as ``"encoder"``. All names are then relative
            to it.
        strict: Whether the model and the state dict must have the same names.
        where: Shell-style patterns of names of the model, such as ``"encoder.*"``. Other names are ignored.
        rename: A mapping from prefixes of names in the state dict to those in the model: ``{"module.": ""}`` for a
            module that was wrapped by DDP, ``{"": "encoder."}`` for weights of a submodule, ``{"head.": None}`` to
            leave names out. Or a function of the name.
        ignore_mismatched_sizes: Whether to skip tensors of another shape, such as a head for other classes.
        cast: Whether to cast tensors of another dtype to that of the state.
        report: Whether to return a ``LoadReport``, which lists the names that were and were not loaded, instead of
            warning. Its field ``state`` is the new state.

    Returns:
        The new state, or a ``LoadReport`` that holds it.

    Raises:
        ValueError: If a name is missing or unexpected, a shape or a dtype differs, or tied names have different values.
            The message names them, and the argument that allows or fixes the difference. A state dict in which no name
            matches always raises.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(2, 1))
        >>> wrapped = {"module.weight": torch.ones(1, 2), "module.bias": torch.zeros(1)}
        >>> state = fx.load_state_dict(state, wrapped, rename={"module.": ""})
        >>> state.params["weight"]
        tensor([[1., 1.]])
        >>> found = fx.load_state_dict(state, {"weight": torch.zeros(1, 2)}, strict=False, report=True)
        >>> found.loaded, found.missing
        (['weight'], ['bias'])
    """
    check_train_state(state, "load_state_dict(state, state_dict)")
    if any(leaf.is_meta for leaf in tree.leaves((state.params, state.buffers))):
        raise ValueError(
            "expected a state with values, got one on the meta device. Create it on another device to load into it."
        )
    params = tree.clone(state.params)
    names: dict[str, Any] = {}

    def fill(modules: Modules) -> None:
        model = NamedTensors(modules, part)
        values = model.flat(state_dict)
        old_names = {new: old for old, new in renamed(values, rename).items()}
        values = {new: values[old] for new, old in old_names.items()}
        chosen = list(model.tensors)
        if where is not None:
            chosen = [chosen[i] for i in matching(chosen, where, "name of the model")]
            patterns = [where] if isinstance(where, str) else where
            values = {name: values[name] for name in values if any(fnmatchcase(name, each) for each in patterns)}
        shared = _shared_tensors(model.tensors, values)
        mismatched = {
            name: (there.shape, here.shape) for name, (there, here) in shared.items() if _shape(there) != _shape(here)
        }
        if mismatched and not ignore_mismatched_sizes:
            raise ValueError(_shapes_differ(mismatched))
        values = {name: value for name, value in values.items() if name not in mismatched}
        _refuse_extra_state(model.tensors, values)
        _refuse_untied(model.ties, values)
        shared = {name: pair for name, pair in shared.items() if name not in mismatched}
        casts = {name: (there.dtype, here.dtype) for name, (there, here) in shared.items() if there.dtype != here.dtype}
        if casts and not cast:
            raise ValueError(_dtypes_differ(casts))
        _refuse_lossy_casts(values, casts)
        absent, unused = model.load(values, cast=cast, with_versions=rename is None)
        fits = values.keys() & model.tensors.keys()
        fits |= {name for group in model.ties if fits & {*group} for name in group}
        # Used names that the model lacks are those of older module versions, which modules convert.
        if values.keys() - model.tensors.keys() - {*unused}:
            fits |= model.tensors.keys() - {*absent} - mismatched.keys()
        skipped = mismatched.keys() | {name for group in model.ties if mismatched.keys() & {*group} for name in group}
        missing = [name for name in chosen if name in absent and name not in fits | skipped]
        loaded = [name for name in chosen if name in fits]
        unexpected = [old_names.get(name, name) for name in unused]
        if (missing or unexpected) and (strict or not (loaded or mismatched)):
            raise ValueError(_names_differ(model.tensors, values, missing, unexpected, loaded))
        names.update(
            loaded=model.whole(loaded),
            missing=model.whole(missing),
            unexpected=unexpected,
            mismatched=dict(zip(model.whole(mismatched), mismatched.values(), strict=True)),
            cast=dict(zip(model.whole(casts), casts.values(), strict=True)),
        )

    buffers = model_of(state).call(params, state.buffers, fill, train=False).buffers
    loaded = LoadReport(state.replace(params=params, buffers=buffers), **names)
    if report:
        return loaded
    loaded.warn()
    return loaded.state


def _shape(value: Tensor) -> torch.Size:
    # torch loads a tensor of shape [1] into a scalar.
    return torch.Size([]) if value.shape == (1,) else value.shape


def _shared_tensors(here: Mapping[str, Tree], values: Mapping[str, Tree]) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the tensors of the state dict and of the model that have the same names."""
    return {
        name: (value, here[name])
        for name, value in values.items()
        if isinstance(value, Tensor) and isinstance(here.get(name), Tensor)
    }


def _refuse_lossy_casts(values: Mapping[str, Tree], casts: Mapping[str, tuple[torch.dtype, torch.dtype]]) -> None:
    """Raises for casts that drop imaginary parts, fractions or high bits. Rounding is allowed."""
    for name, (there, here) in casts.items():
        whole = not here.is_floating_point and not here.is_complex
        if not torch.can_cast(there, here) or (whole and not bool((values[name].to(here) == values[name]).all())):
            raise ValueError(
                f"expected values of {name} that {dtype_name(here)} can hold, got {dtype_name(there)}. Convert them in "
                "the state dict, or leave them out with rename."
            )


def _refuse_extra_state(here: Mapping[str, object], values: Mapping[str, object]) -> None:
    """Raises if an extra state differs, because ``set_extra_state`` changes attributes that a state does not hold."""
    for name, value in values.items():
        if name.rpartition(".")[2] == EXTRA_STATE and name in here and not _is_same(here[name], value):
            raise ValueError(
                f"expected {name} to be the model's, {reprlib.repr(here[name])}, got {reprlib.repr(value)}. A state "
                "does not contain it. Load it into the module before fxtrain.init."
            )


def _is_same(value: object, other: object) -> bool:
    if isinstance(value, Tensor) or isinstance(other, Tensor):
        return isinstance(value, Tensor) and isinstance(other, Tensor) and torch.equal(value, other)
    try:
        return bool(value == other)
    except Exception:  # Containers of tensors or arrays do not compare to a bool.
        return False


def _refuse_untied(ties: Sequence[Sequence[str]], values: Mapping[str, Tree]) -> None:
    for group in ties:
        given = [name for name in group if isinstance(values.get(name), Tensor)]
        for name in given[1:]:
            one, other = values[given[0]], values[name]
            if one.shape != other.shape or not bool(((one == other) | (one.isnan() & other.isnan())).all()):
                raise ValueError(
                    f"expected equal values for {given[0]} and {name}, which the model ties, got different ones. Make "
                    f"a model that does not tie them, or leave one out: rename={{{name!r}: None}}."
                )


def _shapes_differ(mismatched: Mapping[str, tuple[torch.Size, torch.Size]]) -> str:
    lines = [f"{name}: expected {list(here)}, got {list(there)}" for name, (there, here) in mismatched.items()]
    return (
        f"expected the shapes of the model, got others in the state dict:\n{_listed(lines)}\n"
        "Pass ignore_mismatched_sizes=True to keep the state's values for these."
    )


def _dtypes_differ(casts: Mapping[str, tuple[torch.dtype, torch.dtype]]) -> str:
    lines = [f"{name}: expected {dtype_name(here)}, got {dtype_name(there)}" for name, (there, here) in casts.items()]
    return (
        f"expected the dtypes of the state, got others in the state dict:\n{_listed(lines)}\n"
        "Pass cast=True, or make the state in their dtype with fxtrain.init(..., dtype=)."
    )


def _names_differ(
    here: Mapping[str, object],
    values: Mapping[str, object],
    missing: Sequence[str],
    unexpected: Sequence[str],
    loaded: Sequence[str],
) -> str:
    lines = [
        f"{kind} ({len(names)}): {first_names(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if loaded:
        head = "expected the names of the model, got others in the state dict:"
        remedy = f"Pass strict=False to load the {len(loaded)} names that match."
    else:
        head = "expected the names of the model, got a state dict in which no name matches:"
        remedy = "Pass rename, a mapping from prefixes in the state dict to prefixes of the model."
    proposal = proposed(here, values)
    if proposal is not None:
        code, count = proposal
        whole = count == len(here) and count == len(values)
        remedy = (
            f"Pass {code}, with which all names match."
            if whole
            else f"Pass {code} and strict=False, with which {count} of {len(here)} names match."
        )
    return f"{head}\n{_listed(lines)}\n{remedy}"


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"  {line}" for line in first_lines(lines, _MAX_LINES))
