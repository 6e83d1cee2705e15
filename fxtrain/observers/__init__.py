"""Observers: functions ``(state, event, control)`` that act on the world. They can change nothing."""

from fxtrain.observers._memory import memory as memory
from fxtrain.observers._profile import profile as profile
from fxtrain.observers._progress import progress as progress
from fxtrain.observers._rank_zero import rank_zero as rank_zero
from fxtrain.observers._record_code import record_code as record_code
from fxtrain.observers._record_run import record_run as record_run
from fxtrain.observers._required import required as required
from fxtrain.observers._summary import summary as summary
from fxtrain.observers._system import system as system
from fxtrain.observers._write import write as write
