"""Watch: how weights and gradients are distributed, as training goes."""

from __future__ import annotations

from collections.abc import Sequence

from fxtrain.callbacks._histograms import histograms
from fxtrain.fold import Composed, compose


def watch(*of: str, every: int = 100, parameter: str | Sequence[str] = "*", sample: int = 4096) -> Composed:
    """Histograms of weights and gradients, counted inside the compiled step: several ``histograms`` at once.

    Gradients exist nowhere else, so this is a callback and no observer: give it to ``train_step(..., callbacks=)`` as
    well as to ``fit``.

    Args:
        of: ``"weights"``, ``"grads"`` and ``"updates"``; by default the first two.
        every: Count at the multiples of so many steps.
        parameter: Patterns of the parameters to look at.
        sample: Elements of each, 1 or more.

    Raises:
        ValueError: As ``histograms``.

    Example:
        >>> watch("grads", every=50)
        1 callback
          Updated    histograms/grads
          StepEnd    histograms/grads
          slots: 'histograms/grads'
    """
    chosen = of or ("weights", "grads")
    return compose(*(histograms(each, every=every, parameter=parameter, sample=sample) for each in chosen))
