"""Loops without a remainder, for which Inductor generates no code for one.

Inductor vectorizes a loop in blocks of a few elements, and generates a second kernel for the elements that remain. It
does so even where none remain, and then leaves the second kernel out of the code.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

from fxtrain._torch_internals.interface import Interface
from fxtrain._torch_internals.replaced_methods import ReplacedMethods

KERNELS = Interface("torch._inductor.codegen.cpp.CppKernelProxy", "loops without kernels for an empty remainder")
LOOPS = Interface("torch._inductor.codegen.cpp.LoopNest", "loops without kernels for an empty remainder")
SETTING = Interface("torch._inductor.config.cpp.enable_loop_tail_vec", "loops without kernels for an empty remainder")
CONFIG = Interface("torch._inductor.config.patch", "loops without kernels for an empty remainder")

_NAME = "cpp.enable_loop_tail_vec"


class _Current(threading.local):
    """The stack of settings of the loops that this thread generates code for. None outside of such loops."""

    settings: contextlib.ExitStack | None = None
    has_tail = False


_current = _Current()


@contextlib.contextmanager
def empty_tails_skipped() -> Generator[None]:
    """A context in which Inductor, in this thread, skips the remainders of loops that have none.

    The kernels are the same as outside of this context.
    """
    with _PROXIES.active(), _NESTS.active():
        yield


def _of_elements(generate: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(generate)
    def codegen_functions(self: Any, fn_list: Sequence[Any], var_sizes_list: Sequence[Any]) -> None:
        # A reduction declares the variables of its remainder in any case.
        if not _PROXIES.are_active or any(reduced for _, reduced in var_sizes_list):
            return generate(self, fn_list, var_sizes_list)
        with contextlib.ExitStack() as _current.settings:
            _current.has_tail = False
            try:
                return generate(self, fn_list, var_sizes_list)
            finally:
                _current.settings = None

    return codegen_functions


def _noting_tails(tile: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(tile)
    def tile_and_note(self: Any, depth: int, factor: int) -> Any:
        loop = tile(self, depth, factor)
        settings = _current.settings
        if settings is not None:
            # Of two nested loops, all remainders are vectorized if one of them has elements.
            _current.has_tail |= loop.size != loop.tiled_size
            settings.close()
            if not _current.has_tail:
                settings.enter_context(CONFIG.get()({_NAME: False}))
        return loop

    return tile_and_note


_PROXIES = ReplacedMethods(KERNELS, {"codegen_functions": _of_elements}, LOOPS, SETTING, CONFIG)
_NESTS = ReplacedMethods(LOOPS, {"tile": _noting_tails}, KERNELS, SETTING, CONFIG)
