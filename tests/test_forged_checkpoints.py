"""Manifests with forged or damaged content: restores return a verified state or raise CheckpointError."""

import copy
import json
import random

import problem
import pytest
import torch
from saved_steps import put, rewrite, saved

import fxtrain as fx
from fxtrain.checkpoint import DamagedError


class TestForged:
    """Manifests with a valid checksum and invalid content."""

    @pytest.mark.parametrize(
        ("what", "change"),
        {
            "bytes of": lambda head, row: row.update(bytes=0),
            "a shape": lambda head, row: row.update(shape=[-1]),
            "a shape that a tensor can have": lambda head, row: row.update(shape=[2**40, 2**40]),
            "a shape that a tensor can have ": lambda head, row: row.update(shape=[2**62, 2**62, 0], bytes=0),
            "a dtype": lambda head, row: row.update(dtype="float"),
            "a dtype ": lambda head, row: row.update(dtype="quint8"),
            "a dtype  ": lambda head, row: row.update(dtype="nn"),
            "at the offset": lambda head, row: row.update(offset=row["offset"] + 8),
            "at the offset ": lambda head, row: row.update(offset=-8),
            "a row": lambda head, row: row.pop("xxh3"),
            "a row ": lambda head, row: row.update(more=1),
            "a checksum": lambda head, row: row.update(xxh3="0" * 15),
            "a path that matches its entries": lambda head, row: row.update(path="state.other"),
            "entries of a path": lambda head, row: row.update(entries=[["attribute", ["x"]]]),
            "a number of bytes": lambda head, row: head.update(bytes=10**4000),
            "bytes in total": lambda head, row: head.update(bytes=head["bytes"] + 1),
            "a step": lambda head, row: head.update(step=-1),
            "a time": lambda head, row: head.update(time=float("nan")),
            "metrics": lambda head, row: head.update(metrics={"loss": "low"}),
            "an environment": lambda head, row: head.update(environment=[]),
            "a run": lambda head, row: head.update(run="../../x"),
            "a role": lambda head, row: head.update(role=["snapshot"]),
            "a sequence number": lambda head, row: head.update(sequence=1.5),
            "a head with the keys": lambda head, row: head.pop("metrics"),
            "a format number": lambda head, row: head.update(format="2"),
        }.items(),
    )
    def test_invalid_field_is_named(self, tmp_path, what, change):
        (path,) = saved(tmp_path, 1)

        def apply(lines):
            change(lines[0], lines[1])

        rewrite(path, apply)
        with pytest.raises(DamagedError, match=rf"manifest\.jsonl is damaged: expected .*({what.strip()}).*, got "):
            fx.restore(path, like=problem.start())

    def test_duplicate_path_is_rejected(self, tmp_path):
        (path,) = saved(tmp_path, 1)
        rewrite(path, lambda lines: [*lines, lines[-1]])
        with pytest.raises(DamagedError, match="expected a unique path"):
            fx.restore(path, like=problem.start())

    def test_other_format_is_not_damage(self, tmp_path):
        (path,) = saved(tmp_path, 1)
        rewrite(path, lambda lines: lines[0].update(format=1))
        with pytest.raises(
            fx.CheckpointError, match=r"expected a checkpoint of format 2 or 3 at .*, got format 1"
        ) as caught:
            fx.checkpointer(tmp_path).restore(problem.start())
        assert not isinstance(caught.value, DamagedError)
        assert path.exists()

    @pytest.mark.parametrize(
        "text",
        [
            b"",
            b"\n",
            b"[]\n",
            b"null\n",
            b"{}\n",
            b"\xff\xfe{\x00}\x00\n",
            b"[" * 100_000 + b"]" * 100_000 + b"\n",
            b'{"format": ' + b"9" * 10_000 + b"}\n",
            b'{"format": NaN}\n',
            b'{"format": 2' + b" " * 10_000_000 + b"}\n",
            b'{"format": {"format": 2}}\n',
        ],
        ids=lambda text: f"{text[:14]!r} {len(text)}",
    )
    def test_invalid_manifest_text_is_damage(self, tmp_path, text):
        (path,) = saved(tmp_path, 1)
        put(path / "manifest.jsonl", text)
        with pytest.raises(DamagedError, match=r"manifest\.jsonl is damaged: expected"):
            fx.restore(path, like=problem.start())

    def test_manifest_of_other_checkpoint_is_damage(self, tmp_path):
        _, second, third = saved(tmp_path, 1, 2, 3)
        third.rename(tmp_path / "away")
        second.rename(third)
        with pytest.warns(UserWarning, match=r"expected a manifest with the sequence of the folder's name, got 1"):
            assert int(fx.checkpointer(tmp_path).restore(problem.start()).step) == 1

    def test_renamed_checkpoint_can_be_restored(self, tmp_path):
        (path,) = saved(tmp_path, 1)
        path.rename(tmp_path / "final")
        assert int(fx.restore(tmp_path / "final", like=problem.start()).step) == 1


VALUES = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63), 10**400, 0.0, -0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "state", "state.step", "state.slots", "float32", "int4", "bits8", "quint8", "\0", "\ud800", "9" * 99),
    *([], {}, [[]], [0], [-1], [2**63], [2**32, 2**32], [1] * 70, {"a": 1}, {"": []}, [["index", 0]]),
    *([["key", True]], [["attribute", "slots"]], [["attribute", "slots"], ["key", 1]], ["x"] * 3),
]


def places(value, path=()):
    """Yields the paths of all values in a JSON document."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places(inner, (*path, key))


def mutate(lines, chance):
    lines = copy.deepcopy(lines)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        *above, last = chance.choice([place for place in places(lines) if place])
        holder = lines
        for key in above:
            holder = holder[key]
        match chance.randrange(8):
            case 0:
                del holder[last]
            case 1 if isinstance(holder, list):
                holder.insert(last, copy.deepcopy(chance.choice(holder)))
            case 2 if isinstance(holder, list):
                other = chance.randrange(len(holder))
                holder[last], holder[other] = holder[other], holder[last]
            case 3 if isinstance(holder, dict):
                holder[str(chance.choice(VALUES))] = chance.choice(VALUES)
            case 4 if type(holder[last]) is int:
                holder[last] += chance.choice([-8, -1, 1, 8, 2**40])
            case _:
                holder[last] = copy.deepcopy(chance.choice(VALUES))
        if not lines:
            return lines
    return lines


def rewritten(text, chance):
    text = bytearray(text)
    for _ in range(chance.choice([1, 2, 5])):
        place = chance.randrange(len(text))
        piece = chance.choice(
            [b"", b"\xff", b"\0", b"\n", b"\r", b"[" * 2000, b"{", b'"', b"\\u0000", b"1e999", b"\x80"]
        )
        text[place : place + chance.choice([0, 1, 1, 30])] = piece
    return bytes(text)


def fuzz(tmp_path, count, seed):
    slots = {
        "a": {"b": torch.ones(2), "c": [torch.zeros(1), torch.ones(1)]},
        "d": torch.tensor(True),
        "e": {1: torch.ones(1)},
    }
    state = fx.init(torch.nn.Linear(2, 1)).replace(slots=slots)
    path, chance = fx.save(tmp_path / "c", state), random.Random(seed)
    file = path / "manifest.jsonl"
    text = b"".join(file.read_bytes().splitlines(keepends=True)[:-1])
    lines = [json.loads(line) for line in text.splitlines()]
    likes = [
        (state, None),
        (state.replace(slots={}), None),
        (state, ["state.slots['a']"]),
        (fx.init(torch.nn.Linear(2, 1)), None),
    ]
    outcomes = {True: 0, False: 0}
    for _ in range(count):
        mutated = mutate(lines, chance) if chance.random() < 0.8 else None
        made = (
            b"".join(json.dumps(line).encode() + b"\n" for line in mutated)
            if mutated is not None
            else rewritten(text, chance)
        )
        put(file, made)
        like, where = chance.choice(likes)
        try:
            restored = fx.restore(path, like=like, where=where)
        except fx.CheckpointError:
            outcomes[False] += 1
        else:
            saved_bytes = {leaf.numpy().tobytes() for leaf in fx.tree.leaves(state)}
            assert all(leaf.numpy().tobytes() in saved_bytes for leaf in fx.tree.leaves(restored))
            outcomes[True] += 1
    return outcomes


@pytest.mark.filterwarnings("ignore")
def test_mutated_manifests_restore_or_raise_checkpoint_error(tmp_path):
    outcomes = fuzz(tmp_path, 600, seed=1)
    assert outcomes[False] > 400


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_mutated_manifests_restore_or_raise_checkpoint_error(tmp_path):
    assert fuzz(tmp_path, 5_000, seed=2)[False] > 3_000
