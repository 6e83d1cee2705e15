"""Data that differ between the members of a batch of runs, as in cross-validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Batch, describe
from fxtrain.core._members import PerMember
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.data import Source, SourceLike, as_source
from fxtrain.ensemble._states import paired_leaves


@with_short_traceback
def per_member(data: SourceLike | Sequence[SourceLike]) -> Source:
    """Makes data whose batches differ between the members of a batch of runs.

    Without it, all members share each batch.

    Args:
        data: A list or tuple of sources, one for each member, whose batches are stacked. Or one source of batches whose
            tensors have a leading axis of members. A list of tensors or dicts is a source of batches.

    Raises:
        ValueError: If there are no sources, or they differ in length. At a batch, if its leaves differ in shape or
            dtype between the sources, or have no leading axis of members.
        TypeError: At a batch of several sources, if it has other leaves than tensors.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.5)
        >>> step = fx.train_step(lambda model, batch: (model["w"] - batch).square().mean(), tx)
        >>> runs = fx.ensemble.stack([fx.init({"w": torch.tensor(0.0)}, tx)] * 2)
        >>> folds = fx.ensemble.per_member([[torch.ones(4)], [torch.full((4,), 2.0)]])
        >>> fx.fit(runs, step, folds, steps=1).state.params["w"]
        tensor([1., 2.])
    """
    if not isinstance(data, list | tuple):
        return _MemberBatches([as_source(data)], PerMember)
    if not data:
        raise ValueError("expected data for one or more members, got none. Give one source for each member.")
    if isinstance(data[0], Tensor | Mapping):
        return _MemberBatches([as_source(data)], PerMember)
    return _MemberBatches([as_source(source) for source in data], _stacked)


class _MemberBatches(Source):
    """The batches of one or several sources, marked as those of the members."""

    def __init__(self, sources: Sequence[Source], join: Callable[..., Batch]) -> None:
        lengths = [source.epoch_length for source in sources]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"expected sources with as many batches per epoch, got {', '.join(map(str, lengths))}. Take equal "
                "numbers of examples, for example with drop_last."
            )
        unsuited = next((source for source in sources if source.has_snapshots or source.has_variable_epochs), None)
        if unsuited is not None and len(sources) > 1:
            raise ValueError(
                f"expected sources that are read by position for each member, got {type(unsuited).__name__}, which is "
                "read in order. Give lists of batches or fxtrain.data.batches, or one source of stacked batches."
            )
        # The first dimension is that of the members, so the batch size is the second.
        super().__init__(num_shapes=sources[0].num_shapes)
        self._sources, self._join = sources, join
        self.interruptible = all(source.interruptible for source in sources)
        self.random_access = all(source.random_access for source in sources)
        if len(sources) == 1:
            for name in ("snapshot", "restore", "begin_epoch", "expect_epoch_length"):
                setattr(self, name, getattr(sources[0], name))

    @property
    def epoch_length(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._sources[0].epoch_length

    @property
    def epoch_length_may_change(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._sources[0].epoch_length_may_change

    @property
    def has_snapshots(self) -> bool:
        return self._sources[0].has_snapshots

    @property
    def has_variable_epochs(self) -> bool:
        return self._sources[0].has_variable_epochs

    def close(self) -> None:
        for source in self._sources:
            source.close()

    def fetch(self, position: int) -> Batch:
        return self._join(*(source[position] for source in self._sources))


def _stacked(*batches: Any) -> PerMember:
    for index, batch in enumerate(batches):
        for path, ours, theirs in paired_leaves(batches[0], batch, "batch"):
            if ours is None or theirs is None:
                has, lacks = (0, index) if theirs is None else (index, 0)
                raise ValueError(
                    f"expected batches of one structure for all members, got {path} for member {has} only, not for "
                    f"member {lacks}. Give all members the same keys."
                )
            if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
                raise TypeError(
                    f"expected batches of tensors for the members, got {describe(theirs)} at {path}. Leave it out, or "
                    "convert it."
                )
            if ours.shape != theirs.shape:
                raise ValueError(
                    f"expected batches of one shape for all members, got {describe(ours)} at {path} for member 0 and "
                    f"{describe(theirs)} for member {index}. Use batches of equal size, for example with drop_last."
                )
            if ours.dtype != theirs.dtype:
                raise ValueError(
                    f"expected batches of one dtype for all members, got {describe(ours)} at {path} for member 0 and "
                    f"{describe(theirs)} for member {index}. Convert one of them."
                )
    return PerMember(tree.map(lambda *leaves: torch.stack(leaves), *batches))
