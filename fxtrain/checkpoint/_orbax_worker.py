"""Converts between fxtrain and Orbax checkpoints: ``python _orbax_worker.py read|write OURS THEIRS``.

Runs as a subprocess of ``_orbax`` and does not import torch.
"""

import json
import logging
import pathlib
import sys
import time
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 and smaller dtypes with numpy
import numpy as np
import orbax.checkpoint as ocp
import xxhash


def write(ours: pathlib.Path, theirs: pathlib.Path) -> None:
    """Converts the fxtrain checkpoint ``ours`` to the Orbax checkpoint ``theirs``."""
    rows = [json.loads(line) for line in (ours / "manifest.jsonl").read_bytes().splitlines()[1:-1]]
    content = np.memmap(ours / "leaves.bin", np.uint8, "r") if any(row["bytes"] for row in rows) else None
    names: dict[str, str] = {}
    leaves: list[tuple[list[list[str | int]], np.ndarray]] = []
    for row in rows:
        name = ".".join(str(key) for _, key in row["entries"])
        if name in names:
            raise SystemExit(f"Orbax would store both {names[name]} and {row['path']} as {name}. Rename a key.")
        if content is None or not row["bytes"]:
            raise SystemExit(f"{row['path']} has no elements, which Orbax cannot store. Remove it.")
        names[name] = row["path"]
        raw = content[row["offset"] : row["offset"] + row["bytes"]]
        leaves.append((row["entries"], np.array(raw).view(np.dtype(row["dtype"])).reshape(row["shape"])))
    if not leaves:
        raise SystemExit("the tree is empty, which Orbax cannot store.")
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(theirs, args=ocp.args.StandardSave(_nested(leaves)))


def read(ours: pathlib.Path, theirs: pathlib.Path) -> None:
    """Converts the Orbax checkpoint ``theirs`` to the fxtrain checkpoint ``ours``."""
    place = next((at for at in (theirs, theirs / "default") if (at / "_METADATA").exists()), theirs)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        found = checkpointer.metadata(place)
        wanted = _restore_args(getattr(found.item_metadata, "tree", found.item_metadata))
        tree = checkpointer.restore(place, args=ocp.args.PyTreeRestore(restore_args=wanted))
    ours.mkdir()
    leaves = [(entries, np.ascontiguousarray(leaf), list(np.shape(leaf))) for entries, leaf in _flattened(tree, [])]
    rows: list[dict[str, Any]] = [{}] * len(leaves)
    offset = 0
    with open(ours / "leaves.bin", "wb") as file:
        # The widest dtypes come first, as in the files of fxtrain.
        for index in sorted(range(len(leaves)), key=lambda index: -leaves[index][1].itemsize):
            entries, array, shape = leaves[index]
            raw = array.tobytes()
            path = "tree" + "".join(f"[{key!r}]" for _, key in entries)
            row = {"path": path, "entries": entries, "dtype": array.dtype.name, "shape": shape}
            rows[index] = {**row, "offset": offset, "bytes": len(raw), "xxh3": xxhash.xxh3_64_hexdigest(raw)}
            file.write(raw)
            offset += len(raw)
    unset = dict.fromkeys(["step", "run", "role", "sequence"])
    head = {"format": 2, "bytes": offset, "time": time.time(), "metrics": {}, "environment": {}, **unset}
    text = b"".join(json.dumps(line).encode() + b"\n" for line in [head, *rows])
    checksum = xxhash.xxh3_64_hexdigest(text).encode()
    (ours / "manifest.jsonl").write_bytes(b'%s{"xxh3": "%s"}\n' % (text, checksum))


def _nested(leaves: list[tuple[list[list[str | int]], np.ndarray]]) -> Any:
    if len(leaves) == 1 and not leaves[0][0]:
        return leaves[0][1]
    groups: dict[Any, list[tuple[list[list[str | int]], np.ndarray]]] = {}
    for entries, leaf in leaves:
        groups.setdefault(entries[0][1], []).append((entries[1:], leaf))
    if leaves[0][0][0][0] == "index":
        return [_nested(groups[index]) for index in sorted(groups)]
    return {str(key): _nested(group) for key, group in groups.items()}


def _restore_args(metadata: object) -> Any:
    """Returns restore arguments that request numpy arrays, because JAX truncates 64-bit dtypes to 32 bits."""
    if isinstance(metadata, dict):
        return {key: _restore_args(value) for key, value in metadata.items()}
    if isinstance(metadata, list | tuple):
        return [_restore_args(value) for value in metadata]
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _flattened(node: object, entries: list[list[str | int]]) -> list[tuple[list[list[str | int]], Any]]:
    if isinstance(node, dict):
        return [found for key, inner in node.items() for found in _flattened(inner, [*entries, ["key", key]])]
    if isinstance(node, list | tuple):
        return [found for i, inner in enumerate(node) for found in _flattened(inner, [*entries, ["index", i]])]
    return [] if node is None else [(entries, node)]


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    {"read": read, "write": write}[sys.argv[1]](pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))
