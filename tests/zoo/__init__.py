"""A zoo of models from other packages and of typical user code. ``python -m benchmarks.zoo`` trains each."""

from __future__ import annotations

import importlib

from zoo.case import Case

FAMILIES = (
    "transformers_text",
    "transformers_vision",
    "audio",
    "time_series",
    "more_transformers",
    "timm_models",
    "torchvision_models",
    "detection",
    "medical",
    "diffusers_models",
    "graphs",
    "adapters",
    "flows_and_odes",
    "gaussian_processes",
    "vector_quantization",
    "gans",
    "physics",
    "reinforcement",
    "self_supervised",
    "by_users",
)


def cases() -> dict[str, Case]:
    """All cases by ``package: name``, grouped by family."""
    found: dict[str, Case] = {}
    for family in FAMILIES:
        for case in importlib.import_module(f"zoo.{family}").CASES:
            if case.key in found:
                raise ValueError(f"expected a unique key for each case, got {case.key!r} twice. Rename one.")
            found[case.key] = case
    return found
