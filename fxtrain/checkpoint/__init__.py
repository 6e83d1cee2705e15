"""Checkpoints: a state on disk, whole, verified, and exact to the bit."""

from fxtrain.checkpoint.checkpointer import Checkpointer as Checkpointer
from fxtrain.checkpoint.checkpointer import checkpointer as checkpointer
from fxtrain.checkpoint.pack import CheckpointError as CheckpointError
from fxtrain.checkpoint.single import Restoration as Restoration
from fxtrain.checkpoint.single import restore as restore
from fxtrain.checkpoint.single import save as save
