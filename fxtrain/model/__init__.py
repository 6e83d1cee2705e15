"""The functional model: a module's parameters and buffers as trees of tensors, and its code as a function of them."""

from fxtrain.model._batch_norm_statistics import recompute_statistics
from fxtrain.model._captured_values import captured_values
from fxtrain.model._first_call_checks import ValuesNeededError
from fxtrain.model._freezing import with_trainable
from fxtrain.model._init import init
from fxtrain.model._model import Model, model_of
from fxtrain.model._model_calls import forward_wrapped_by
from fxtrain.model._outside_values import CapturedStateError
from fxtrain.model._parameter_trees import CallResult
from fxtrain.model._remat import remat
from fxtrain.model._state_dict import LoadReport, load_state_dict, state_dict
from fxtrain.model._summary import Summary, summary
from fxtrain.model._tensor_access import refuse_in_place_writes, versions
from fxtrain.model._to_module import to_module
from fxtrain.model._types import Modules, StateDict, Transforms
from fxtrain.model._unseeded_values import UnseededError
from fxtrain.model._view import View, view

__all__ = [
    "CapturedStateError",
    "LoadReport",
    "Modules",
    "StateDict",
    "Summary",
    "Transforms",
    "UnseededError",
    "ValuesNeededError",
    "View",
    "init",
    "load_state_dict",
    "recompute_statistics",
    "remat",
    "state_dict",
    "summary",
    "to_module",
    "view",
    "with_trainable",
]
