"""The core types: the training state, its events, the requests of callbacks, and the function protocols."""

from fxtrain.core._checks import check_choice as check_choice
from fxtrain.core._checks import check_fraction as check_fraction
from fxtrain.core._checks import check_int as check_int
from fxtrain.core._checks import check_non_negative as check_non_negative
from fxtrain.core._checks import check_positive as check_positive
from fxtrain.core._checks import check_positive_int as check_positive_int
from fxtrain.core._checks import describe as describe
from fxtrain.core._checks import did_you_mean as did_you_mean
from fxtrain.core._cleanup import try_all as try_all
from fxtrain.core._compiling import compiling as compiling
from fxtrain.core._control import KINDS as KINDS
from fxtrain.core._control import Control, Logged
from fxtrain.core._control import Flag as Flag
from fxtrain.core._devices import device_name as device_name
from fxtrain.core._devices import wide_dtype as wide_dtype
from fxtrain.core._docs import args_from as args_from
from fxtrain.core._donated import Donated as Donated
from fxtrain.core._donated import DonatedError
from fxtrain.core._donated import invalidate as invalidate
from fxtrain.core._epochs import Epoch as Epoch
from fxtrain.core._epochs import fractional_epoch as fractional_epoch
from fxtrain.core._events import EVENTS as EVENTS
from fxtrain.core._events import SESSION as SESSION
from fxtrain.core._events import TRACED as TRACED
from fxtrain.core._events import TRAJECTORY as TRAJECTORY
from fxtrain.core._events import (
    EpochBegin,
    EpochEnd,
    EvalBegin,
    EvalEnd,
    EvalStep,
    Event,
    FitBegin,
    FitEnd,
    Gradients,
    Interrupted,
    LoopEvent,
    Microbatch,
    Restored,
    Rewound,
    Saved,
    StepBegin,
    StepEnd,
    Updated,
)
from fxtrain.core._events import event_of as event_of
from fxtrain.core._formats import dtype_name as dtype_name
from fxtrain.core._formats import escape_html as escape_html
from fxtrain.core._formats import first_lines as first_lines
from fxtrain.core._formats import first_names as first_names
from fxtrain.core._formats import format_bytes as format_bytes
from fxtrain.core._formats import format_duration as format_duration
from fxtrain.core._formats import format_number as format_number
from fxtrain.core._formats import format_scaled as format_scaled
from fxtrain.core._formats import name_of as name_of
from fxtrain.core._formats import pluralize as pluralize
from fxtrain.core._formats import truncate as truncate
from fxtrain.core._formats import truncate_middle as truncate_middle
from fxtrain.core._patterns import by_number as by_number
from fxtrain.core._patterns import matching as matching
from fxtrain.core._protocols import Callback, Observer, StepFn, StepOutput
from fxtrain.core._pytrees import NAMESPACE as NAMESPACE
from fxtrain.core._pytrees import NODES as NODES
from fxtrain.core._pytrees import ops as ops
from fxtrain.core._pytrees import register_node as register_node
from fxtrain.core._slots import BATCH as BATCH
from fxtrain.core._slots import CHANGED_AT_END as CHANGED_AT_END
from fxtrain.core._slots import DATA as DATA
from fxtrain.core._slots import EPOCH as EPOCH
from fxtrain.core._slots import EVALUATED as EVALUATED
from fxtrain.core._slots import LOOP as LOOP
from fxtrain.core._slots import REWINDS as REWINDS
from fxtrain.core._slots import SNAPSHOTS as SNAPSHOTS
from fxtrain.core._slots import STOP_REASONS as STOP_REASONS
from fxtrain.core._state import Due as Due
from fxtrain.core._state import TrainState
from fxtrain.core._text import encodable as encodable
from fxtrain.core._text import printable as printable
from fxtrain.core._text import printable_lines as printable_lines
from fxtrain.core._types import Batch, Metrics, Tree
from fxtrain.core._types import Scalar as Scalar

__all__ = [
    "Batch",
    "Callback",
    "Control",
    "DonatedError",
    "EpochBegin",
    "EpochEnd",
    "EvalBegin",
    "EvalEnd",
    "EvalStep",
    "Event",
    "FitBegin",
    "FitEnd",
    "Gradients",
    "Interrupted",
    "Logged",
    "LoopEvent",
    "Metrics",
    "Microbatch",
    "Observer",
    "Restored",
    "Rewound",
    "Saved",
    "StepBegin",
    "StepEnd",
    "StepFn",
    "StepOutput",
    "TrainState",
    "Tree",
    "Updated",
]
