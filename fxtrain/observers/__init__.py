"""Observers: functions ``(state, event, control)`` that act on the world. They can change nothing."""

from fxtrain.observers.memory import memory as memory
from fxtrain.observers.profile import profile as profile
from fxtrain.observers.progress import progress as progress
from fxtrain.observers.rank_zero import rank_zero as rank_zero
from fxtrain.observers.record_code import record_code as record_code
from fxtrain.observers.record_run import record_run as record_run
from fxtrain.observers.required import required as required
from fxtrain.observers.summary import summary as summary
from fxtrain.observers.system import system as system
from fxtrain.observers.write import write as write
