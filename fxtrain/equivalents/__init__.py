"""Expressions of fx for what other libraries made: optimizers and schedulers of ``torch.optim``, and optax."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def refuse_foreign(argument: str, expected: str, value: Any, model: Any = None, *, as_schedule: bool = False) -> None:
    """Refuses an optimizer, a scheduler, or a class of either, that another library made.

    The message has an expression that evaluates to the equivalent, with ``fx`` for ``fxtrain``. Anything else passes.

    Args:
        argument: The name of the argument.
        expected: What is expected there, with its article.
        value: What was given.
        model: The module that is trained, for the names of parameters in groups.
        as_schedule: Whether a scheduler is translated to a schedule, without its optimizer.

    Raises:
        TypeError: If the value is one.
    """
    if value is None or isinstance(value, int | float | Tensor):
        return
    # Imported when it is needed, because an import of fxtrain must stay cheap.
    from fxtrain.equivalents._refusal import described

    found = described(value, model, as_schedule=as_schedule)
    if found is not None:
        kind, advice = found
        raise TypeError(f"expected {argument} to be {expected}, got {kind}. {advice}")
