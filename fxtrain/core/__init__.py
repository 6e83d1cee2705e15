# pyright: reportUnusedImport=false
"""The core types: the training state, its events, the requests of callbacks, and the function protocols."""

from fxtrain.core._calls import Call, argument_text, records_call
from fxtrain.core._checks import (
    check_callable,
    check_choice,
    check_device,
    check_fraction,
    check_int,
    check_new_path,
    check_non_negative,
    check_path,
    check_positive,
    check_positive_int,
    describe,
    did_you_mean,
    takes,
)
from fxtrain.core._cleanup import try_all
from fxtrain.core._compiling import compiling
from fxtrain.core._control import KINDS, Control, Flag, Logged
from fxtrain.core._docs import args_from
from fxtrain.core._events import (
    EVENTS,
    SESSION,
    TRACED,
    TRAJECTORY,
    EpochBegin,
    EpochEnd,
    EvalBegin,
    EvalEnd,
    EvalStep,
    EvalStepBegin,
    Event,
    FitBegin,
    FitEnd,
    Gradients,
    Interrupted,
    Microbatch,
    Published,
    Restored,
    Rewound,
    SaveBegin,
    Saved,
    StepBegin,
    StepEnd,
    Updated,
)
from fxtrain.core._formats import (
    decimal_text,
    device_name,
    dtype_name,
    encodable,
    escape_html,
    first_lines,
    first_names,
    format_bytes,
    format_duration,
    format_number,
    format_scaled,
    name_of,
    pluralize,
    printable,
    printable_lines,
    public_name,
    truncate,
    truncate_middle,
)
from fxtrain.core._history import History, Series
from fxtrain.core._leaf_values import is_freed, leaf_bytes, leaf_values
from fxtrain.core._loop_event import LoopEvent, event_of
from fxtrain.core._patterns import by_number, matching, matching_blocks
from fxtrain.core._plots import HasHistory, XAxis, new_figure, plot, style
from fxtrain.core._protocols import Callback, Observer, StepFn, StepOutput
from fxtrain.core._pytrees import NAMESPACE, NODES, ops, register_node
from fxtrain.core._record import Record
from fxtrain.core._run_info import Json, RunInfo, plain_config
from fxtrain.core._slots import (
    BATCH,
    CHANGED_AT_END,
    DATA,
    EPOCH,
    EPOCH_METRICS,
    EVALUATED,
    LOOP,
    REWINDS,
    SNAPSHOTS,
    STOP_REASONS,
    Epoch,
    fractional_epoch,
)
from fxtrain.core._state import Donated, DonatedError, Due, TrainState, check_train_state, invalidate
from fxtrain.core._state_diff import LeafDiff, StateDiff, same_bits
from fxtrain.core._timestamps import WallClock, timestamp, utc_now
from fxtrain.core._tracebacks import warn
from fxtrain.core._types import Batch, Metrics, Scalar, Tree, wide_dtype

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
    "EvalStepBegin",
    "Event",
    "FitBegin",
    "FitEnd",
    "Gradients",
    "History",
    "Interrupted",
    "LeafDiff",
    "Logged",
    "LoopEvent",
    "Metrics",
    "Microbatch",
    "Observer",
    "Published",
    "Restored",
    "Rewound",
    "RunInfo",
    "SaveBegin",
    "Saved",
    "Series",
    "StateDiff",
    "StepBegin",
    "StepEnd",
    "StepFn",
    "StepOutput",
    "TrainState",
    "Tree",
    "Updated",
    "plot",
]
