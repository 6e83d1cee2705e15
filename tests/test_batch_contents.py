"""Contents of a batch: tensors in containers of any library, and values such as text that stay outside the step."""

import collections
import dataclasses
import datetime
import pathlib
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import tree
from fxtrain.data import as_source, batches, checksum, for_step, from_iterable, prefetch

TX = fx.optim.sgd(0.1)


def loss_fn(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def problem(loss=loss_fn, **options):
    torch.manual_seed(0)
    return fx.init(nn.Linear(2, 1), TX), fx.train_step(loss, TX, **options)


def mixed(index=0):
    generator = torch.Generator().manual_seed(index)
    return {
        "x": torch.randn(4, 2, generator=generator),
        "y": torch.randn(4, 1, generator=generator).numpy(),
        "scale": 0.5,
        "text": [f"row {index * 4 + i}" for i in range(4)],
        "meta": [{"path": pathlib.Path(f"{index}.png"), "when": datetime.date(2026, 1, 1 + index)}] * 4,
        "names": np.array([f"{index}{i}" for i in range(4)]),
        "none": None,
        "raw": b"abc",
    }


def test_text_stays_in_batch_and_scalars_become_tensors():
    batch = as_source([mixed(3)])[0]
    assert batch["text"] == ["row 12", "row 13", "row 14", "row 15"]
    assert batch["meta"][1]["when"] == datetime.date(2026, 1, 4)
    assert batch["names"].tolist() == ["30", "31", "32", "33"]
    assert batch["none"] is None
    assert batch["scale"].equal(torch.tensor(0.5))
    assert batch["y"].shape == (4, 1)


@pytest.mark.parametrize(
    ("value", "tensor"),
    [
        (3, torch.tensor(3)),
        (True, torch.tensor(True)),
        ([1, 2], torch.tensor([1, 2])),
        ([1, 2.5], torch.tensor([1.0, 2.5])),
        ([np.int32(1), np.int32(2)], torch.tensor([1, 2], dtype=torch.int32)),
        (np.float64(2), torch.tensor(2.0, dtype=torch.float64)),
        (1j, torch.tensor(1j)),
    ],
)
def test_data_and_step_convert_scalars_to_tensors(value, tensor):
    for found in (as_source([{"x": torch.ones(1), "n": value}])[0]["n"], for_step({"n": value})["n"]):
        assert found.equal(tensor)
        assert found.dtype == tensor.dtype


def nested(layout):
    with warnings.catch_warnings(action="ignore"):
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


class Image:
    __array_interface__ = {"shape": (2, 2), "typestr": "|u1", "version": 3, "data": b"abcd"}  # noqa: RUF012


class Boxes:
    def __init__(self):
        self.corners = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Image(), r"expected batch\['v'\] to be .*, got a .*Image. Convert it in the dataset or with data.map"),
        (Boxes(), r"batch\['v'\] to be a pytree, got a Boxes, .* Make the class a dataclass, register it"),
        ({torch.zeros(1)}, "got a set, an unregistered class that contains tensors"),
        (2**70, r"numbers that fit in 64 bits at batch\['v'\], got 1180591620717411303424"),
        (np.zeros(1, np.longdouble), "supports, got float128. Convert it"),
        (nested(torch.strided), "a nested tensor. .*to_padded_tensor"),
        (nested(torch.jagged), "a nested tensor. .*to_padded_tensor"),
    ],
)
def test_unsupported_value_is_rejected_with_path(value, message):
    for make in (lambda batch: as_source([batch]), for_step):
        with pytest.raises(TypeError, match=message):
            make({"x": torch.zeros(1), "v": value})


@pytest.mark.parametrize(
    "read",
    [
        *(str, len, bool, list, hash, lambda t: t == "a", lambda t: t[0] == "a", lambda t: t.upper()),
        *(torch.relu, lambda t: torch.stack([torch.ones(1), t]), lambda t: torch.ones(1).add(other=t)),
    ],
)
@pytest.mark.parametrize("kind", ["eager", "compiled"])
def test_loss_that_reads_text_is_rejected(read, kind):
    def reads(model, batch):
        read(batch["text"])
        return loss_fn(model, batch)

    state, step = problem(reads)
    step = fx.compile(step, backend="aot_eager") if kind == "compiled" else step
    with pytest.raises(TypeError, match=r"got one that reads batch\['text'\](\[0\])?, which does not enter the step"):
        step(state, mixed())


def test_changed_text_does_not_recompile():
    state, step = problem()
    compiled = fx.compile(step, on_recompile="error")
    found = fx.fit(state, compiled, [mixed(i) for i in range(3)], epochs=2)
    expected = fx.fit(state, step, [mixed(i) for i in range(3)], epochs=2)
    assert compiled.with_donation().graphs == 1
    assert found.state.params["weight"].allclose(expected.state.params["weight"])


def test_callbacks_see_the_whole_batch():
    seen = []

    def look(state, event: fx.StepBegin):
        seen.append(event.batch["text"][0])
        return state, fx.Control()

    state, step = problem(accumulate=2)
    fx.fit(state, step, [mixed(i) for i in range(3)], callbacks=[look], epochs=1)
    assert seen == ["row 0", "row 4", "row 8"]


def test_loss_cannot_modify_stored_batch():
    def pops(model, batch):
        batch["x"] = batch["x"] * 2
        return (model(batch["x"]) - batch.pop("y")).square().mean()

    state, step = problem(pops)
    data = [{"x": torch.ones(2, 2), "y": torch.ones(2, 1)}]
    fx.fit(state, step, data, epochs=3)
    assert data[0].keys() == {"x", "y"}
    assert data[0]["x"].equal(torch.ones(2, 2))


def test_prefetch_and_evaluate_accept_text():
    state, step = problem()
    rows = [mixed(i) for i in range(2)]
    measure = fx.eval_step(loss_fn)
    expected = sum(float(measure(state, batch).metrics["loss"]) for batch in rows) / 2
    tensors = [{name: batch[name] for name in ("x", "y")} for batch in rows]
    assert fx.evaluate(state, measure, tensors)["loss"] == pytest.approx(expected, rel=1e-6)
    result = fx.fit(state, step, prefetch(rows, device="cpu"), epochs=2)
    assert int(result.state.step) == 4


def test_prefetch_moves_only_tensors():
    batch = prefetch([mixed(1)], device="meta")[0]
    assert {batch[name].device.type for name in ("x", "y", "scale")} == {"meta"}
    assert batch["text"] == mixed(1)["text"]


def test_checksum_covers_text_paths_and_dates():
    values = [mixed(0), mixed(1)]
    assert checksum(mixed(0)) == checksum(values[0]) != checksum(values[1])
    for name in ("text", "names", "meta"):
        assert checksum({**values[0], name: values[1][name]}) != checksum(values[0])


@pytest.mark.parametrize("leaf", [torch.arange(6.0)[::2], torch.arange(2.0)[::2], torch.ones(1).expand(3)])
def test_checksum_does_not_depend_on_strides(leaf):
    assert checksum(leaf) == checksum(leaf.clone(memory_format=torch.contiguous_format)) != checksum(leaf + 1)


# Containers


@dataclasses.dataclass
class Plain:
    x: Any
    y: Any
    text: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any
    y: Any
    text: Any

    def __post_init__(self):
        object.__setattr__(self, "rows", len(self.x))


@dataclasses.dataclass(slots=True)
class Slots(Plain):
    extra: Any = 1.0


class Named(NamedTuple):
    x: Any
    y: Any
    text: Any


class Encoding(collections.UserDict):
    """Mimics a tokenizer's batch encoding, with attributes besides the entries."""

    def __init__(self, data, encodings=None):
        super().__init__(data)
        self._encodings = encodings

    def __getattr__(self, name):
        if name in self.__dict__.get("data", {}):
            return self.data[name]
        raise AttributeError(name)


class Attributes(dict):
    """A dictionary whose entries are also attributes."""

    def __init__(self, **entries):
        super().__init__(**entries)
        self.__dict__.update(entries)
        self.rows = 4


class Registered:
    def __init__(self, x, y, text):
        self.x, self.y, self.text = x, y, text


torch.utils._pytree.register_pytree_node(
    Registered, lambda node: ([node.x, node.y, node.text], None), lambda parts, _: Registered(*parts)
)

CONTAINERS = {
    "dataclass": Plain,
    "frozen": Frozen,
    "slots": Slots,
    "named": Named,
    "user dict": lambda x, y, text: Encoding({"x": x, "y": y, "text": text}, encodings=[object()]),
    "dict subclass": lambda x, y, text: Attributes(x=x, y=y, text=text),
    "torch pytree": Registered,
}


@pytest.mark.parametrize("name", list(CONTAINERS))
def test_container_class_is_preserved(name):
    make = CONTAINERS[name]
    rows = [make(torch.full((4, 2), float(i)), np.ones((4, 1), np.float32), ["a"] * 4) for i in range(2)]
    seen = []

    def loss(model, batch):
        seen.append(batch)
        return (model(batch.x) - batch.y).square().mean()

    state, step = problem(loss)
    data = as_source(rows)
    assert type(data[0]) is type(rows[0])
    assert data[1].text == ["a"] * 4
    assert getattr(data[1], "rows", 4) == 4
    result = fx.fit(state, step, prefetch(from_iterable(rows), device="cpu"), epochs=2)
    expected = fx.fit(state, problem()[1], [{"x": row.x, "y": row.y} for row in rows], epochs=2)
    assert result.state.params["weight"].equal(expected.state.params["weight"])
    assert {type(batch) for batch in seen} == {type(rows[0])}
    assert fx.evaluate(state, fx.eval_step(loss), rows)["loss"] > 0


def test_standard_library_dicts_are_containers():
    entries = {"x": torch.ones(4, 2), "y": torch.ones(4, 1)}
    state, step = problem()
    expected, _ = step(state, entries)
    for make in (collections.OrderedDict, lambda e: collections.defaultdict(list, e), collections.UserDict):
        found, _ = step(state, make(entries))
        assert found.params["weight"].equal(expected.params["weight"])
        assert checksum(as_source([make(entries)])[0])


# Lists of tensors of different sizes


def detection(index, count=2):
    images = [torch.full((3, 4 + index, 5 + i), 1.0) for i in range(count)]
    targets = [{"boxes": torch.ones(i + index, 4), "name": f"{index}-{i}"} for i in range(count)]
    return images, targets


def detection_loss(model, batch):
    images, targets = batch
    found = torch.stack([image.mean((1, 2))[:2] for image in images])
    return (model(found).sum() - sum(target["boxes"].sum() for target in targets)).square()


@pytest.mark.parametrize("make", [list, tuple])
def test_evaluation_weights_image_lists_by_length(make):
    rows = [tuple(make(part) for part in detection(i)) for i in range(3)]
    rows.append(tuple(make(part) for part in detection(3, count=1)))
    state, step = problem(detection_loss)
    data = from_iterable(rows)
    result = fx.fit(state, step, data, epochs=2)
    assert int(result.state.step) == 8
    measure = fx.eval_step(detection_loss)
    losses = [float(measure(state, row).metrics["loss"]) for row in rows]
    mean = sum(loss * len(row[0]) for loss, row in zip(losses, rows, strict=True)) / 7
    assert fx.evaluate(state, measure, rows)["loss"] == pytest.approx(mean)


def test_changed_list_length_or_dtype_is_rejected():
    with pytest.raises(ValueError, match=r"expected batch\['a'\] to have 2 elements as before, got 3"):
        as_source([{"a": [torch.ones(1)] * n} for n in (2, 3, 2)])
    with pytest.raises(ValueError, match=r"expected batch\['a'\]\[0\] to be .*, got a float64 tensor"):
        as_source([{"a": [torch.ones(1, dtype=kind)] * 2} for kind in (torch.float32, torch.float64)])


def test_packed_sequences_train():
    rows = [nn.utils.rnn.pack_sequence([torch.ones(n, 2), torch.ones(1, 2)]) for n in (3, 3)]
    state, step = problem(lambda model, batch: model(batch.data).square().mean())
    result = fx.fit(state, step, rows, epochs=1)
    assert int(result.state.step) == 2
    assert type(for_step(rows[0])) is type(rows[0])


def test_sparse_tensors_train_only_uncompiled():
    batch = {"a": torch.eye(2).to_sparse(), "x": torch.ones(2, 2)}
    state, step = problem(lambda model, batch: (batch["a"] @ model(batch["x"])).square().mean())
    assert int(fx.fit(state, step, [batch], steps=2).state.step) == 2
    with pytest.raises(ValueError, match=r"expected dense tensors .* got batch\['a'\] with the layout sparse_coo"):
        fx.compile(step)(state, batch)


def test_text_columns_are_batched_with_arrays():
    data = batches({"x": torch.arange(4.0), "text": np.array(list("abcd"))}, 2, shuffle=False)
    assert data[1]["text"].tolist() == ["c", "d"]


def test_text_column_may_be_all_none():
    rows = [{"x": torch.ones(2), "text": text} for text in (["a", None], [None, None], ["a", "b"])]
    assert as_source(rows)[1]["text"] == [None, None]
    assert tree.structure(for_step(rows[0])) == tree.structure(for_step(rows[1]))


def test_placeholder_has_no_leaves():
    assert tree.leaves(for_step({"text": ["a", None], "x": torch.ones(1)})) == [torch.ones(1)]
    assert for_step(None) is None
