"""Factories of callbacks whose settings may be tensors, with a value for each member of a batch of runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

from torch import Tensor

from fxtrain.fold._handler import Handler

P = ParamSpec("P")


def accepts_settings_per_member(factory: Callable[P, Handler]) -> Callable[P, Handler]:
    """Lets a factory of callbacks take a tensor [members] in place of a Python scalar, or a tensor of shape [].

    Example:
        >>> import torch, fxtrain as fx
        >>> fx.callbacks.early_stopping("loss", patience=torch.tensor([1, 2]))
        <callback early_stopping on EvalEnd, slot 'early_stopping'>
    """

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> Handler:
        if not any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            return factory(*args, **kwargs)
        from fxtrain.fold._per_member import with_tensors  # keeps the import of fxtrain fast

        return with_tensors(factory, args, kwargs)

    return make
