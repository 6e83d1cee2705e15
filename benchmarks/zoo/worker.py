"""The checks of one case, as a result that can be written down."""

from __future__ import annotations

import importlib
import traceback
import warnings
from typing import Any

import torch
import zoo
from zoo import checks
from zoo.operators import import_without_operators

_BY_AUTOGRAD = "is differentiated by torch.autograd from now on"
_LONGEST_ERROR = 200  # characters


def imported(package: str) -> dict[str, Any]:
    """Imports a package as the cases do; ``error`` is empty if that succeeds."""
    try:
        import_without_operators()
        importlib.import_module(package)
    except Exception as error:
        return {"error": _line(error)}
    return {"error": ""}


def checked(key: str, eager_only: bool) -> dict[str, Any]:
    """What the checks found for a case.

    Returns:
        ``status``: "skipped", if that is so; ``error``: a line, empty if all holds; ``trace``: its traceback;
        ``parity``: the difference from a plain loop; ``differentiate``: "func" or "autograd"; ``route``,
        ``difference`` from uncompiled, and ``seconds`` of the first step, if it compiled.
    """
    torch.set_num_threads(1)
    case = zoo.cases()[key]
    missing = imported(case.package)
    if missing["error"]:
        return {"status": "skipped", **missing}
    found: dict[str, Any] = {"error": ""}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found["parity"] = checks.parity(case)
            chosen = any(_BY_AUTOGRAD in str(warning.message) for warning in caught)
            found["differentiate"] = "autograd" if chosen else "func"
            if not eager_only:
                outcome = checks.compiled(case)
                found.update(route=outcome.route, difference=outcome.difference, seconds=outcome.first_seconds)
        except Exception as error:
            found.update(error=_line(error), trace="".join(traceback.format_exception(error)[-12:]))
    return found


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:_LONGEST_ERROR]
