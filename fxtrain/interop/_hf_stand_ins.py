"""Stand-ins for the optimizer, the scheduler and the data loaders that ``Trainer`` gives to its callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch import nn

_NAMES = {"lr": "learning_rate"}
"""Names of hyperparameters in torch, and those of fxtrain."""


class OptimizerView:
    """Shows learning rates and parameters as ``torch.optim.Optimizer`` does.

    Args:
        module: Its parameters are those of the groups.
        rates: Returns the learning rates by group.
        write: Writes an injected hyperparameter.
    """

    def __init__(
        self, module: nn.Module, rates: Callable[[], dict[str, float]], write: Callable[[str, float], None]
    ) -> None:
        self._module, self._rates, self._write = module, rates, write

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of learning rates. Each shows all parameters, because groups of fxtrain are not lists of them."""
        params = list(self._module.parameters())
        return [_Group(self._write, name=name, lr=rate, params=params) for name, rate in self._rates().items()]

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"expected an attribute that the optimizer of a callback has (param_groups), got {name!r}. In fxtrain the "
            "optimizer is a function, whose state a callback of fxtrain reads from state.opt_state."
        )


class _Group(dict[str, Any]):
    def __init__(self, write: Callable[[str, float], None], **values: object) -> None:
        super().__init__(values)
        self._write = write

    def __setitem__(self, key: str, value: Any) -> None:
        self._write(_NAMES.get(key, key), float(value))
        super().__setitem__(key, value)


class SchedulerView:
    """Shows learning rates as the schedulers of torch do.

    Args:
        rates: Returns the learning rates by group.
    """

    def __init__(self, rates: Callable[[], dict[str, float]]) -> None:
        self._rates = rates

    def get_last_lr(self) -> list[float]:
        """Returns the learning rate of each group."""
        return list(self._rates().values())

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"expected an attribute that the scheduler of a callback has (get_last_lr), got {name!r}. In fxtrain a "
            "schedule is a function of the step. To change learning rates during a run, use "
            "fxtrain.callbacks.reduce_on_plateau or fxtrain.optim.inject_hyperparams."
        )


class DataView:
    """Has the length of a data loader.

    Args:
        name: The argument of the callback.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.length: int | None = None

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError(
                f"expected {self._name} to have a length, got data of unknown length. Give it: "
                f"fxtrain.interop.hf(callback, {self._name}=...)."
            )
        return self.length

    def __iter__(self) -> Iterator[Any]:
        raise TypeError(
            f"expected {self._name} to be given for a callback that reads batches, got its length only. Give it: "
            f"fxtrain.interop.hf(callback, {self._name}=...)."
        )
