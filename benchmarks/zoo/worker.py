"""Runs the checks of one case, and returns a result that can be stored as JSON."""

from __future__ import annotations

import contextlib
import importlib
import traceback
import warnings
from collections.abc import Generator
from typing import Any
from unittest import mock

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


def checked(key: str, compiler: str | None) -> dict[str, Any]:
    """Runs the checks of a case.

    Args:
        key: The key of the case.
        compiler: ``"inductor"``; ``"none"`` to run the same graphs without a compiler; None to check only uncompiled
            steps.

    Returns:
        A dict with ``error``, a line that is empty if all checks pass, and those of these keys that apply:

        - ``status``: ``"skipped"`` if the package cannot be imported.
        - ``trace``: the traceback of the error.
        - ``parity``: the difference from a plain loop.
        - ``differentiate``: ``"func"`` or ``"autograd"``.
        - ``route`` and ``difference``: the compile route, and the difference from uncompiled steps.
        - ``seconds``: the time of the first step; ``interpreted``, True, with ``compiler="none"``.
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
            if compiler is not None:
                with _without_inductor() if compiler == "none" else contextlib.nullcontext():
                    outcome = checks.compiled(case)
                timing = {"interpreted": True} if compiler == "none" else {"seconds": outcome.first_seconds}
                found.update(route=outcome.route, difference=outcome.difference, **timing)
        except Exception as error:
            found.update(error=_line(error), trace="".join(traceback.format_exception(error)[-12:]))
    return found


@contextlib.contextmanager
def _without_inductor() -> Generator[None]:
    """Replaces Inductor: traced graphs run as they are, and graphs of Dynamo run with the backend ``aot_eager``."""
    from torch._dynamo.backends.debugging import aot_eager

    with (
        mock.patch("torch._inductor.compile", lambda graph, fakes, options=None: graph),
        mock.patch(
            "torch._inductor.compile_fx.compile_fx", lambda graph, examples, *_, **__: aot_eager(graph, examples)
        ),
    ):
        yield


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:_LONGEST_ERROR]
