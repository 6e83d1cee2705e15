"""Observers: functions ``(state, event, control)`` with side effects. They cannot influence training."""

from fxtrain.observers._artifacts import write_checkpoints
from fxtrain.observers._debug import debug
from fxtrain.observers._export import export
from fxtrain.observers._machine import memory, system
from fxtrain.observers._profile import profile
from fxtrain.observers._progress import progress
from fxtrain.observers._record_code import record_code
from fxtrain.observers._record_run import record_run
from fxtrain.observers._summary import summary
from fxtrain.observers._wrapped import every_rank, rank_zero, required
from fxtrain.observers._write import write

__all__ = [
    "debug",
    "every_rank",
    "export",
    "memory",
    "profile",
    "progress",
    "rank_zero",
    "record_code",
    "record_run",
    "required",
    "summary",
    "system",
    "write",
    "write_checkpoints",
]
