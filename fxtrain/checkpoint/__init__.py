"""Checkpoints: a state on disk, whole, verified, and exact to the bit."""

from fxtrain.checkpoint.checkpointer import Checkpointer as Checkpointer
from fxtrain.checkpoint.checkpointer import Committed as Committed
from fxtrain.checkpoint.checkpointer import checkpointer as checkpointer
from fxtrain.checkpoint.errors import CheckpointError as CheckpointError
from fxtrain.checkpoint.errors import DamagedError as DamagedError
from fxtrain.checkpoint.orbax import from_orbax as from_orbax
from fxtrain.checkpoint.orbax import to_orbax as to_orbax
from fxtrain.checkpoint.single import Restoration as Restoration
from fxtrain.checkpoint.single import restore as restore
from fxtrain.checkpoint.single import save as save
