"""The functional model: a module's memory as trees of tensors, and its code as a function of them."""

from fxtrain.model.architecture import Model as Model
from fxtrain.model.architecture import model_of as model_of
from fxtrain.model.captured import captured as captured
from fxtrain.model.first_calls import ValuesNeededError as ValuesNeededError
from fxtrain.model.following import UnseededError as UnseededError
from fxtrain.model.forward import forward_by as forward_by
from fxtrain.model.freezing import with_trainable as with_trainable
from fxtrain.model.init import init as init
from fxtrain.model.layout import Called as Called
from fxtrain.model.outside import CapturedStateError as CapturedStateError
from fxtrain.model.purity import refuse_writes as refuse_writes
from fxtrain.model.purity import versions as versions
from fxtrain.model.recompute import recompute_statistics as recompute_statistics
from fxtrain.model.state_dict import load_state_dict as load_state_dict
from fxtrain.model.state_dict import state_dict as state_dict
from fxtrain.model.view import View as View
from fxtrain.model.view import view as view
