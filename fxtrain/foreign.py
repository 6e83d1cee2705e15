"""Foreign: packages that stand on JAX, imported so that JAX leaves the GPU alone."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


def import_on_cpu(name: str) -> ModuleType:
    """Imports the module ``name``. If that brings JAX in, JAX is kept on the CPU.

    Even for numpy arrays Orbax starts a JAX backend, and with CUDA it would take most of the memory that torch is to
    have. A program that has imported JAX itself has made its choice, and is left alone.
    """
    if "jax" not in sys.modules:
        import jax

        jax.config.update("jax_platforms", "cpu")
    return importlib.import_module(name)
