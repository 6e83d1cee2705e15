"""Saves and restores training states, verified by checksums and bitwise exact.

A checkpoint is a folder. ``leaves.bin`` holds the bytes of all leaves. ``manifest.jsonl`` holds the path, shape, dtype
and checksum of each leaf, and the environment that a resumed run needs to be bitwise equal. Of a sharded state, rank n
writes its slices to ``leaves-n.bin``, and the manifest holds the range and checksum of each.

``save`` and ``restore`` handle one checkpoint, ``checkpointer`` those of a run. ``from_orbax`` and ``to_orbax``
exchange trees with JAX programs. ``fxtrain.state_dict`` and ``fxtrain.load_state_dict`` exchange weights with torch.
"""

from fxtrain.checkpoint._checkpointer import Checkpointer, checkpointer
from fxtrain.checkpoint._errors import CheckpointError, DamagedError
from fxtrain.checkpoint._orbax import from_orbax, to_orbax
from fxtrain.checkpoint._restore import Restoration, restore
from fxtrain.checkpoint._retention import Role
from fxtrain.checkpoint._save import Committed, Save, save

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "DamagedError",
    "Restoration",
    "Role",
    "checkpointer",
    "from_orbax",
    "restore",
    "save",
    "to_orbax",
]
