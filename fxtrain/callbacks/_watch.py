"""Histograms of weights and gradients in one call."""

from __future__ import annotations

from collections.abc import Sequence

from fxtrain.callbacks._histograms import histograms
from fxtrain.fold import Composed, When, compose


def watch(*of: str, every: When = 100, parameter: str | Sequence[str] = "*", sample: int = 4096) -> Composed:
    """Logs histograms of weights and gradients: several ``histograms``, composed.

    Gradients exist only inside the compiled step, so this is a callback and not an observer.

    Args:
        of: Any of ``"weights"``, ``"grads"`` and ``"updates"``; the first two by default.
        every: As for ``histograms``.
        parameter: Patterns of the parameters to include.
        sample: Elements per parameter, 1 or more.

    Raises:
        ValueError: As for ``histograms``.

    Example:
        >>> watch("grads", every=50)
        1 callback
          Updated    histograms/grads
          StepEnd    histograms/grads
          slots: 'histograms/grads'
    """
    chosen = of or ("weights", "grads")
    return compose(*(histograms(each, every=every, parameter=parameter, sample=sample) for each in chosen))
