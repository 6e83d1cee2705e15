"""Names of the slots in which the loop keeps its own state."""

from __future__ import annotations

LOOP = "loop/"
"""Prefix of the loop's slots. Callbacks cannot claim a name that begins with it."""

EPOCH = f"{LOOP}epoch"  # dict of int64 []: the fields of `Epoch`
EVALUATED = f"{LOOP}evaluated"  # metrics of the last evaluation, and its step
REWINDS = f"{LOOP}rewinds"  # int64 [n, 2]: steps that the run rewound to, and how often
SNAPSHOTS = f"{LOOP}snapshots"  # int64 [keep]: steps whose states are retained for rewinds; -1 in unused entries
CHANGED_AT_END = f"{LOOP}changed_at_end"  # bool []: callbacks changed this state at FitEnd, so no run continues from it

# These exist in checkpoints only.
BATCH = f"{LOOP}batch"  # int64 [2]: index and checksum of the batch read last
DATA = f"{LOOP}data"  # uint8 [n]: iterator state of a stateful data source
STOP_REASONS = f"{LOOP}stop_reasons"  # uint8 [n]: JSON list of the reasons of a pending stop
