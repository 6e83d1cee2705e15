"""The ranks of a command that torchrun starts, of which rank 0 alone prints."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, TypeVar

from fxtrain.cli._errors import CommandError

# Functions import fxtrain.distributed, so that --help is fast.
if TYPE_CHECKING:
    from fxtrain.distributed import Mesh

T = TypeVar("T")

Parallel = Literal["none", "ddp", "fsdp", "tp"]
_LAUNCH = "torchrun --standalone --nproc-per-node 2 -m fxtrain"


def mesh_of(parallel: Parallel, command: str, *, divides: tuple[str, int]) -> Mesh | None:
    """Returns the ranks of a command, after joining them, or None for one process.

    Args:
        parallel: The value of ``--parallel``.
        command: The name of the command, for errors.
        divides: An option and its value, which the number of processes must divide with ``--parallel tp``.

    Raises:
        CommandError: If the kind of parallelism does not fit the number of processes.
    """
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if parallel == "none" and size > 1:
        raise CommandError(
            f"expected --parallel ddp, fsdp or tp in {size} processes, got none, which would train {size} times. Add "
            "--parallel ddp, or start the command without torchrun."
        )
    if parallel != "none" and size == 1:
        raise CommandError(
            f"expected several processes with --parallel {parallel}, got one. Start them: {_LAUNCH} {command} "
            f"--parallel {parallel}. To continue a run in one process, add --parallel none."
        )
    option, value = divides
    if parallel == "tp" and value % size:
        raise CommandError(
            f"expected {option} to be a multiple of the {size} processes with --parallel tp, got {value}. Start "
            "another number of processes, or use --parallel ddp."
        )
    if parallel == "none":
        return None
    from fxtrain.distributed import mesh

    return mesh(model=size if parallel == "tp" else 1)


def refuse_several(command: str) -> None:
    """Raises CommandError if torchrun has started several processes of a command that trains in one."""
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if size > 1:
        raise CommandError(
            f"expected one process of fxtrain {command}, got {size}. Start it without torchrun, or call "
            "fxtrain.fit(..., mesh=fxtrain.distributed.mesh()) in a script."
        )


def of_main(ranks: Mesh | None, what: str, function: Callable[[], T]) -> T:
    """Returns the result of a function that only rank 0 calls, or raises its error on all ranks.

    Args:
        ranks: The ranks, or None for one process.
        what: The result, as a noun for errors.
        function: Its result can be pickled.
    """
    if ranks is None:
        return function()
    error: Exception | None = None
    result: T | None = None
    if ranks.is_main:
        try:
            result = function()
        except Exception as raised:
            error = raised
    text, result = ranks.broadcast((error and f"{what}: {type(error).__name__}: {error}", result), what)
    if text is not None:
        from fxtrain.distributed import FailedRankError

        raise error or FailedRankError.from_reports({0: text})
    return result  # pyright: ignore[reportReturnType] -- it is rank 0's


def is_main() -> bool:
    """Whether this process is rank 0, or the only one."""
    return int(os.environ.get("RANK") or 0) == 0


def is_said_elsewhere(error: Exception) -> bool:
    """Whether another rank prints this error, or its cause."""
    if is_main():
        return False
    from fxtrain.distributed import FailedRankError, LostRankError

    return isinstance(error, CommandError | FailedRankError | LostRankError)


@contextlib.contextmanager
def printing_on_main() -> Iterator[None]:
    """Drops standard output on all ranks but rank 0."""
    with contextlib.nullcontext() if is_main() else contextlib.redirect_stdout(io.StringIO()):
        yield
