"""The functional model: a module's parameters and buffers as trees of tensors, and its code as a function of them."""

from fxtrain.model._architecture import Model as Model
from fxtrain.model._architecture import model_of as model_of
from fxtrain.model._captured import captured as captured
from fxtrain.model._first_calls import ValuesNeededError as ValuesNeededError
from fxtrain.model._following import UnseededError as UnseededError
from fxtrain.model._forward import forward_by as forward_by
from fxtrain.model._freezing import with_trainable
from fxtrain.model._init import init
from fxtrain.model._layout import Called as Called
from fxtrain.model._outside import CapturedStateError
from fxtrain.model._purity import refuse_writes as refuse_writes
from fxtrain.model._purity import versions as versions
from fxtrain.model._recompute import recompute_statistics
from fxtrain.model._state_dict import load_state_dict, state_dict
from fxtrain.model._view import View as View
from fxtrain.model._view import view

__all__ = [
    "CapturedStateError",
    "init",
    "load_state_dict",
    "recompute_statistics",
    "state_dict",
    "view",
    "with_trainable",
]
