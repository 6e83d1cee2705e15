"""Observers: functions ``(state, event, control)`` with side effects. They cannot influence training."""

from fxtrain.observers._memory import memory
from fxtrain.observers._profile import profile
from fxtrain.observers._progress import progress
from fxtrain.observers._rank_zero import rank_zero
from fxtrain.observers._record_code import record_code
from fxtrain.observers._record_run import record_run
from fxtrain.observers._required import required
from fxtrain.observers._summary import summary
from fxtrain.observers._system import system
from fxtrain.observers._write import write

__all__ = [
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
]
