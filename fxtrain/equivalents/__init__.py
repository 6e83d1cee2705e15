"""Translates optimizers and schedulers of ``torch.optim``, transformers and optax to expressions of fxtrain."""

from __future__ import annotations

from torch import Tensor


def refuse_foreign(
    argument: str, expected: str, value: object, model: object = None, *, as_schedule: bool = False
) -> None:
    """Raises if ``value`` is an optimizer or a scheduler of another library, or a class of either.

    The message contains an expression that evaluates to the equivalent, with ``fx`` for ``fxtrain``. All other values
    pass.

    Args:
        argument: The argument's name.
        expected: A noun phrase for what is expected there, with its article.
        value: The value that was passed.
        model: The module that is trained, for the names of parameters in groups.
        as_schedule: Whether a scheduler is translated to a schedule alone, without its optimizer.

    Raises:
        TypeError: If ``value`` is such an object or class.
    """
    if value is None or isinstance(value, int | float | Tensor):
        return
    # Imported lazily to keep `import fxtrain` fast.
    from fxtrain.equivalents._advice import advice_on

    found = advice_on(value, model, as_schedule=as_schedule)
    if found is not None:
        kind, advice = found
        raise TypeError(f"expected {argument} to be {expected}, got {kind}. {advice}")
