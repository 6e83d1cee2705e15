"""The ranks of a command that torchrun starts, of which rank 0 alone prints."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fxtrain.cli._errors import CommandError
from fxtrain.core._rank import rank

# Functions import fxtrain.distributed, so that --help is fast.
if TYPE_CHECKING:
    from fxtrain.core import TrainState
    from fxtrain.distributed import Mesh

T = TypeVar("T")

Parallel = Literal["none", "ddp", "fsdp", "tp"]
_LAUNCH = "torchrun --standalone --nproc-per-node {} -m fxtrain"


def num_processes() -> int:
    """Returns the number of processes that torchrun has started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def check_parallel(parallel: Parallel, command: str, option: str) -> None:
    """Raises CommandError if the kind of parallelism does not fit the number of processes.

    Args:
        parallel: The kind.
        command: The command, for errors.
        option: What precedes the kind on the command line.
    """
    size = num_processes()
    if parallel == "none" and size > 1:
        raise CommandError(
            f"expected {option}ddp, fsdp or tp in {size} processes, got none, which would train {size} times. Add "
            f"{option}ddp, or start the command without torchrun."
        )
    if parallel != "none" and size == 1:
        raise CommandError(
            f"expected several processes with {option}{parallel}, got one. Start them: {_LAUNCH.format(2)} {command} "
            f"{option}{parallel}. To continue a run in one process, add {option}none."
        )


def joined(parallel: Parallel) -> Mesh | None:
    """Returns the ranks of a command, after joining them, or None for one process.

    Args:
        parallel: The kind of parallelism, which fits the number of processes.
    """
    if parallel == "none":
        return None
    from fxtrain.distributed import mesh

    return mesh(model=num_processes() if parallel == "tp" else 1)


def placed(state: TrainState, ranks: Mesh | None, parallel: Parallel, plan: Mapping[str, Any] | None) -> TrainState:
    """Returns rank 0's state, placed on the ranks of a command.

    Args:
        state: The state of this process.
        ranks: The ranks, as ``joined`` returns them.
        parallel: The kind of parallelism.
        plan: The plan of ``tensor_parallel``, for "tp".
    """
    if ranks is None:
        return state
    import fxtrain as fx

    if parallel == "tp":
        return fx.shard(state, ranks, fx.distributed.tensor_parallel(plan or {}))
    return fx.shard(state, ranks, fx.distributed.fsdp() if parallel == "fsdp" else None)


def launch(command: str) -> str:
    """Returns a command of fxtrain for as many processes as there are now."""
    count = num_processes()
    return f"{'fxtrain' if count == 1 else _LAUNCH.format(count)} {command}"


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
    return rank() == 0


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
