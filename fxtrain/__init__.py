"""Functional training for PyTorch: one immutable state, a pure compiled step, callbacks that fold over it."""

import gc as _gc

# Objects allocated by the imports are permanent. A garbage collection in the middle would traverse torch's objects in
# vain, and would take as long as importing fxtrain itself.
_collecting = _gc.isenabled()
_gc.disable()

from fxtrain import callbacks as callbacks
from fxtrain import data as data
from fxtrain import metrics as metrics
from fxtrain import observers as observers
from fxtrain import optim as optim
from fxtrain import rng as rng
from fxtrain import schedules as schedules
from fxtrain import tree as tree
from fxtrain import values as values
from fxtrain import writers as writers
from fxtrain.checkpoint import CheckpointError as CheckpointError
from fxtrain.checkpoint import checkpointer as checkpointer
from fxtrain.checkpoint import restore as restore
from fxtrain.checkpoint import save as save
from fxtrain.compiler import GraphBreakError as GraphBreakError
from fxtrain.compiler import RecompileError as RecompileError
from fxtrain.compiler import compile as compile  # noqa: A004
from fxtrain.core import Callback as Callback
from fxtrain.core import Control as Control
from fxtrain.core import DonatedError as DonatedError
from fxtrain.core import EpochBegin as EpochBegin
from fxtrain.core import EpochEnd as EpochEnd
from fxtrain.core import EvalBegin as EvalBegin
from fxtrain.core import EvalEnd as EvalEnd
from fxtrain.core import EvalStep as EvalStep
from fxtrain.core import Event as Event
from fxtrain.core import FitBegin as FitBegin
from fxtrain.core import FitEnd as FitEnd
from fxtrain.core import Gradients as Gradients
from fxtrain.core import Interrupted as Interrupted
from fxtrain.core import Logged as Logged
from fxtrain.core import LoopEvent as LoopEvent
from fxtrain.core import Microbatch as Microbatch
from fxtrain.core import Observer as Observer
from fxtrain.core import Restored as Restored
from fxtrain.core import Rewound as Rewound
from fxtrain.core import Saved as Saved
from fxtrain.core import StepBegin as StepBegin
from fxtrain.core import StepEnd as StepEnd
from fxtrain.core import StepFn as StepFn
from fxtrain.core import StepOutput as StepOutput
from fxtrain.core import TrainState as TrainState
from fxtrain.core import Updated as Updated
from fxtrain.diagnostics import Explanation as Explanation
from fxtrain.diagnostics import explain as explain
from fxtrain.finders import find_batch_size as find_batch_size
from fxtrain.finders import lr_finder as lr_finder
from fxtrain.fold import after as after
from fxtrain.fold import at as at
from fxtrain.fold import attach as attach
from fxtrain.fold import compose as compose
from fxtrain.fold import every as every
from fxtrain.fold import needs as needs
from fxtrain.fold import on as on
from fxtrain.fold import slotted as slotted
from fxtrain.fold import stateful as stateful
from fxtrain.fold import when as when
from fxtrain.interop import load_optimizer_state as load_optimizer_state
from fxtrain.interop import load_weights as load_weights
from fxtrain.interop import optimizer_state_dict as optimizer_state_dict
from fxtrain.interop import save_weights as save_weights
from fxtrain.loop import Result as Result
from fxtrain.loop import evaluate as evaluate
from fxtrain.loop import fit as fit
from fxtrain.loop import steps as steps
from fxtrain.model import init as init
from fxtrain.model import load_state_dict as load_state_dict
from fxtrain.model import recompute_statistics as recompute_statistics
from fxtrain.model import state_dict as state_dict
from fxtrain.model import view as view
from fxtrain.model import with_trainable as with_trainable
from fxtrain.precision import Policy as Policy
from fxtrain.step import Step as Step
from fxtrain.step import apply_gradients as apply_gradients
from fxtrain.step import eval_step as eval_step
from fxtrain.step import gradients as gradients
from fxtrain.step import tap as tap
from fxtrain.step import train_step as train_step
from fxtrain.step import weighted as weighted
from fxtrain.step import wrap_step as wrap_step

if _collecting:
    _gc.enable()
