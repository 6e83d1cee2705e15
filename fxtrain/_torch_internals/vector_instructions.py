"""The vector instructions of this processor, of which Inductor uses the widest.

Inductor compiles and loads a small program for every set of instructions that the processor has, one after the other,
when it generates its first kernel. With an empty cache that takes seconds for each. Here only the widest set that works
is found, in another thread, while Inductor is imported and prepares the graph.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Generator
from typing import Any

from fxtrain._torch_internals.interface import Interface
from fxtrain._torch_internals.replaced_methods import ReplacedMethods

_PURPOSE = "fewer checks of vector instructions"
OWNER = Interface("torch._inductor.cpu_vec_isa", _PURPOSE)
ALL = Interface("torch._inductor.cpu_vec_isa.valid_vec_isa_list", _PURPOSE)
CANDIDATES = Interface("torch._inductor.cpu_vec_isa.supported_vec_isa_list", _PURPOSE)
FEATURES = Interface("torch._inductor.cpu_vec_isa.x86_isa_checker", _PURPOSE)
OPTIONS = Interface("torch._inductor.config.cpp", _PURPOSE)
WIDTH = Interface("torch._inductor.config.cpp.simdlen", _PURPOSE)
# Imported before the other thread needs them, because two threads must not import modules that import each other.
CODE = Interface("torch._inductor.codecache", _PURPOSE)
LOCK = Interface("torch.utils._filelock.FileLock", _PURPOSE)

_lock = threading.Lock()


@contextlib.contextmanager
def widest_sought() -> Generator[None]:
    """A context in which Inductor, in this thread, knows only the widest set of instructions, which is found meanwhile.

    If a setting asks for another set, Inductor looks for all, as outside of this context.
    """
    with _FUNCTIONS.active():
        if not _FUNCTIONS.are_replaced:
            yield
            return
        thread = threading.Thread(target=_seek, name="fxtrain-instructions", daemon=True)
        thread.start()
        yield
        # Not after an error or Ctrl-C, because the search takes seconds.
        thread.join()


def _seek() -> None:
    ignore_interrupts_of_compilers()
    # An error is raised again where Inductor needs the result.
    with contextlib.suppress(Exception):
        widest()


def ignore_interrupts_of_compilers() -> None:
    """Lets compilers that this thread starts run on after Ctrl-C, which a terminal sends to all processes of a program.

    A search that fails because its compiler was killed would count as missing instructions for the whole process.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited by processes


def widest() -> list[Any] | None:
    """Returns a list of the widest set of instructions. None if it cannot be found without looking for all."""
    with _lock:  # another thread waits for the result
        return _widest()


@functools.cache
def _widest() -> list[Any] | None:
    features = FEATURES.get()()
    ordered = (each for each in CANDIDATES.get() if all(name in features for name in str(each).split()))
    found = next((each for each in ordered if each), None)
    return None if found is None else [found]


def _widest_only(find_all: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
    @functools.wraps(find_all)
    def valid_vec_isa_list() -> list[Any]:
        is_free = OPTIONS.get().simdlen is None and "ATEN_CPU_CAPABILITY" not in os.environ
        return (widest() if _FUNCTIONS.are_active and is_free else None) or find_all()

    return valid_vec_isa_list


def _reset_after_fork() -> None:
    # A forked child has no thread that would release the lock.
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)

_FUNCTIONS = ReplacedMethods(
    OWNER, {"valid_vec_isa_list": _widest_only}, ALL, CANDIDATES, FEATURES, OPTIONS, WIDTH, CODE, LOCK
)
